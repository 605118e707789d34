"""Text files: ReMeDi's markup, and plain text as the last resort of ``auto``."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_zj.data.chat import Message
from megatron_zj.data.errors import BadRecord
from megatron_zj.data.formats.reading import Item
from megatron_zj.data.formats.registry import Format, Lines
from megatron_zj.data.formats.texts import blankline_documents, line_documents
from megatron_zj.data.records import DialogueRecord, TextRecord, text_of

_REMEDI_TURN = re.compile(r"<\|(user|system)\|>")
_REMEDI_FIELD = r"<\|{0}\|>(.*?)<\|endof{0}\|>"


def _remedi_dialogues(lines: Lines) -> Iterator[Item]:
    """Each line repeats the dialogue so far; a blank line ends it, so the line before one is the whole of it."""
    last: Item | None = None
    for number, line in lines:
        if line.strip():
            last = Item(number, line)
        elif last is not None:
            yield last
            last = None
    if last is not None:
        yield last


def _remedi(value: str) -> DialogueRecord:
    pieces = _REMEDI_TURN.split(_remedi_field(value, "context"))
    turns = list(zip(pieces[1::2], pieces[2::2], strict=True))
    turns += [("user", _remedi_field(value, "currentuser")), ("system", _remedi_field(value, "response"))]
    messages = [
        Message("user" if speaker == "user" else "assistant", text_of(text, f"turn {number}"))
        for number, (speaker, text) in enumerate(turns, start=1)
    ]
    return DialogueRecord(tuple(messages))


def _remedi_field(value: str, name: str) -> str:
    found = re.search(_REMEDI_FIELD.format(name), value, flags=re.DOTALL)
    if found is None:
        raise BadRecord(f"the line has no <|{name}|> ... <|endof{name}|>", field=name)
    return found.group(1)


FORMATS = (
    Format(
        name="remedi",
        shape="a .txt line a turn: <|context|> ... <|currentuser|> ... <|response|> ..., a blank line after a dialogue",
        matches=lambda sample: "<|currentuser|>" in sample and "<|response|>" in sample,
        convert=_remedi,
        items=_remedi_dialogues,
    ),
    Format(
        name="text",
        shape="a .txt file of documents with blank lines between them",
        matches=lambda sample: True,
        convert=lambda value: TextRecord(text_of(value, "text")),
        items=blankline_documents,
    ),
    Format(
        name="lines",
        shape="a .txt file with a document a line (never chosen by auto)",
        matches=lambda sample: False,
        convert=lambda value: TextRecord(text_of(value, "text")),
        items=line_documents,
    ),
)
