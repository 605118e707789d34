"""Documents for pre-training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_zj.data.errors import BadRecord
from megatron_zj.data.formats.reading import Item
from megatron_zj.data.formats.registry import Format, Lines, has_keys
from megatron_zj.data.records import TextRecord, text_of

_BOOK_TITLE = "<篇名>"
_BOOK_CONTENTS = "<目录>"
_BOOK_BODY = "属性："


def _classics(value: dict[str, Any]) -> TextRecord:
    """A section of a book under its heading."""
    parts = (text_of(value["title"], "title"), text_of(value.get("section"), "section", empty=True))
    heading = " ".join(part for part in parts if part)
    return TextRecord(f"{heading}\n{text_of(value['text'], 'text')}")


def blankline_documents(lines: Lines) -> Iterator[Item]:
    """A document is what stands between blank lines."""
    yield from _blocks(lines, starts=lambda line: False, ends=lambda line: not line.strip())


def line_documents(lines: Lines) -> Iterator[Item]:
    """A document is a line."""
    for number, line in lines:
        if line.strip():
            yield Item(number, line)


def _book_sections(lines: Lines) -> Iterator[Item]:
    """A section begins at ``<篇名>``; the first one (title and author of the book) is no section."""
    for item in _blocks(lines, starts=lambda line: line.startswith(_BOOK_TITLE), ends=lambda line: False):
        if _BOOK_BODY in item.value:
            yield item


def _blocks(lines: Lines, starts: Any, ends: Any) -> Iterator[Item]:
    held: list[str] = []
    first = 1
    for number, line in lines:
        if held and (starts(line) or ends(line)):
            yield Item(first, "\n".join(held))
            held = []
        if line.strip():
            first = number if not held else first
            held.append(line.strip())
    if held:
        yield Item(first, "\n".join(held))


def _book_text(value: str) -> TextRecord:
    heading, _, body = value.partition(_BOOK_BODY)
    title = heading.replace(_BOOK_TITLE, "").replace(_BOOK_CONTENTS, "").strip()
    if not body.strip():
        raise BadRecord(f"section {title!r} has no text after {_BOOK_BODY}")
    return TextRecord(f"{title}\n{body.strip()}")


FORMATS = (
    Format(
        name="tcm_classics",
        shape='{"title": book, "section": heading, "text": ...}',
        matches=has_keys("title", "section", "text"),
        convert=_classics,
    ),
    Format(
        name="text_records",
        shape='{"text": ...}',
        matches=has_keys("text"),
        convert=lambda value: TextRecord(text_of(value["text"], "text")),
    ),
    Format(
        name="strings",
        shape='["text", ...]',
        matches=lambda value: isinstance(value, str),
        convert=lambda value: TextRecord(text_of(value, "text")),
    ),
    Format(
        name="tcm_book",
        shape=f"a .txt book with {_BOOK_TITLE} before a section's heading and {_BOOK_BODY} before its text",
        matches=lambda sample: _BOOK_TITLE in sample,
        convert=_book_text,
        items=_book_sections,
    ),
)
