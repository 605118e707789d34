"""What every input format becomes: four canonical records, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from megatron_zj.data.chat import Message, RoleName
from megatron_zj.data.errors import BadRecord
from megatron_zj.data.tokenizer import has_lone_surrogate

Kind = Literal["corpus", "chat", "preference", "prompts"]


@dataclass(frozen=True)
class TextRecord:
    """A document."""

    text: str


@dataclass(frozen=True)
class DialogueRecord:
    """A dialogue that ends with an answer.  ``source``: the raw record's field with the turns, for complaints."""

    messages: tuple[Message, ...]
    source: str = field(default="messages", compare=False)


@dataclass(frozen=True)
class PreferenceRecord:
    """Ranked continuations of one prompt.  ``ranks``: one a response, smaller is better, equal is a tie."""

    prompt: tuple[Message, ...]
    responses: tuple[tuple[Message, ...], ...]  # each begins and ends with the assistant
    ranks: tuple[float, ...]
    source: str = field(default="prompt", compare=False)  # the raw record's field with the prompt, for complaints

    def __post_init__(self) -> None:
        if len(self.responses) < 2:
            raise BadRecord(f"{len(self.responses)} response: a ranking needs at least two", field="responses")
        if len(self.ranks) != len(self.responses):
            raise BadRecord(f"{len(self.ranks)} ranks for {len(self.responses)} responses", field="ranks")
        if not all(math.isfinite(rank) for rank in self.ranks):
            raise BadRecord(f"ranks must be finite numbers, found {list(self.ranks)}", field="ranks")
        if len(set(self.ranks)) == 1:
            raise BadRecord("all responses have the same rank, so none is preferred", field="ranks")
        for index, response in enumerate(self.responses):
            for place, message in enumerate(response):
                expected = "user" if place % 2 else "assistant"
                if message.role != expected:
                    reason = f"turn {place + 1} is from {message.role!r} where {expected!r} must speak"
                    raise BadRecord(reason, field=f"responses[{index}][{place}].role")
            if len(response) % 2 == 0:
                raise BadRecord("a response must end with the assistant", field=f"responses[{index}]")
        seen: dict[tuple[Message, ...], float] = {}
        for response, rank in zip(self.responses, self.ranks, strict=True):
            if seen.setdefault(response, rank) != rank:
                raise BadRecord("two equal responses have different ranks", field="responses")

    def dense_ranks(self) -> tuple[int, ...]:
        """0 for the best, the same for ties, no gaps."""
        order = sorted(set(self.ranks))
        return tuple(order.index(rank) for rank in self.ranks)


@dataclass(frozen=True)
class PromptRecord:
    """A dialogue that ends with the user.  ``source``: the raw record's field with the turns, for complaints."""

    messages: tuple[Message, ...]
    source: str = field(default="messages", compare=False)


Record = TextRecord | DialogueRecord | PreferenceRecord | PromptRecord

_PRODUCES: dict[type, Kind] = {
    TextRecord: "corpus",
    DialogueRecord: "chat",
    PreferenceRecord: "preference",
    PromptRecord: "prompts",
}

DERIVED: Mapping[tuple[type, Kind], str] = MappingProxyType(  # what ``derive`` makes of a record of another kind
    {
        (PreferenceRecord, "chat"): "each ranking gives a dialogue with its first best response; the others are unused",
        (PreferenceRecord, "prompts"): "each ranking gives its prompt; its responses are unused",
        (DialogueRecord, "prompts"): "each dialogue gives a prompt: all but its last answer",
        (DialogueRecord, "corpus"): "each dialogue gives a text: its turns, a line each",
    }
)


def derive(record: Record, kind: Kind) -> Record:
    """The record a stream of this kind needs, where it follows from the one the file has (``DERIVED``)."""
    if _PRODUCES[type(record)] == kind:
        return record
    if isinstance(record, PreferenceRecord) and kind == "prompts":
        return PromptRecord(record.prompt, record.source)
    if isinstance(record, PreferenceRecord) and kind == "chat":
        best = record.ranks.index(min(record.ranks))
        return DialogueRecord(record.prompt + record.responses[best], record.source)
    if isinstance(record, DialogueRecord) and kind == "prompts":
        return PromptRecord(record.messages[:-1], record.source)
    if isinstance(record, DialogueRecord) and kind == "corpus":
        return TextRecord("\n".join(message.content for message in record.messages))
    if isinstance(record, PromptRecord) and kind == "chat":
        raise BadRecord(
            "the dialogue ends with the user, so it has no answer to learn",
            hint="add the answer, or set data.on_bad_record=skip to leave such records out (data.kind=prompts takes "
            "them as they are)",
        )
    raise BadRecord(
        f"the file gives {_PRODUCES[type(record)]} records, and no {kind} record follows from one",
        hint=f"give a file for data.kind={kind}, or change data.kind",
    )


def text_of(value: Any, field: str, *, empty: bool = False) -> str:
    """A string, or the only element of a list that holds one string.  ``empty`` allows blank and missing."""
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if value is None and empty:
        return ""
    if not isinstance(value, str):
        raise BadRecord(f"expected text, found {type(value).__name__}", field=field)
    if has_lone_surrogate(value):
        raise BadRecord("half of a character: a \\ud... escape without its other half", field=field)
    if not value.strip() and not empty:
        raise BadRecord("the text is empty", field=field)
    return value.strip()


def messages_of(value: Any, field: str, roles: dict[str, RoleName], *, role: str, content: str) -> tuple[Message, ...]:
    """Turns from a list of objects whose keys ``role`` and ``content`` name the speaker and the text."""
    if not isinstance(value, list):
        raise BadRecord(f"expected a list of turns, found {type(value).__name__}", field=field)
    if not value:
        raise BadRecord("the list of turns is empty", field=field)
    turns = []
    for index, turn in enumerate(value):
        if not isinstance(turn, dict) or role not in turn or content not in turn:
            raise BadRecord(f"a turn must be an object with {role!r} and {content!r}", field=f"{field}[{index}]")
        speaker = turn[role]
        if speaker not in roles:
            raise BadRecord(f"unknown speaker {speaker!r}, known: {', '.join(roles)}", field=f"{field}[{index}].{role}")
        turns.append(Message(roles[speaker], text_of(turn[content], f"{field}[{index}].{content}")))
    return tuple(turns)


def exchange(history: Sequence[tuple[str, str]], question: str) -> tuple[Message, ...]:
    """Messages of earlier (question, answer) pairs and the question now."""
    turns: list[Message] = []
    for asked, answered in history:
        turns += [Message("user", asked), Message("assistant", answered)]
    return (*turns, Message("user", question))
