"""Records to token rows, and what happens to a row that is longer than the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_zj.config.data import Overlong
from megatron_zj.data.chat import ChatTemplate, Message, Span, check_order, render, render_prompt
from megatron_zj.data.errors import BadRecord, DataError
from megatron_zj.data.records import DialogueRecord, PreferenceRecord, PromptRecord, Record, TextRecord
from megatron_zj.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Unit:
    """Rows that stay together: one dialogue, one prompt, or the responses of one ranking.

    A row is its spans, context and target in turn, context first; the first span of a response is its prompt.
    """

    rows: tuple[tuple[Span, ...], ...]
    ranks: tuple[int, ...]  # one a row; 0 where rows are not ranked


@dataclass
class Counts:
    """What became of the records of an input."""

    records: int = 0
    units: int = 0
    tokens: int = 0
    bad: int = 0  # left out by on_bad_record=skip
    too_long: int = 0  # left out by overlong=skip
    shortened: int = 0  # cut or split
    first_bad: list[str] = field(default_factory=list)  # the first complaints, for the report

    def add(self, other: Counts) -> None:
        """Sum; at most five complaints are kept."""
        for name in ("records", "units", "tokens", "bad", "too_long", "shortened"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.first_bad = [*self.first_bad, *other.first_bad][:5]


class TooLong(DataError):
    """A row is longer than the context and the policy is ``error``."""


class Encoder:
    """Turns records of one kind into units of token rows, under one policy for overlong ones."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, max_length: int, overlong: Overlong) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._max_length = max_length
        self._overlong = overlong

    def __call__(self, record: Record, counts: Counts) -> list[Unit]:
        """The units of one record (several for a split dialogue, none for one that is skipped)."""
        if isinstance(record, TextRecord):
            units = [self._document(record)]
        elif isinstance(record, DialogueRecord):
            units = self._dialogue(record, counts)
        elif isinstance(record, PreferenceRecord):
            units = self._ranking(record, counts)
        else:
            units = self._prompt(record, counts)
        counts.units += len(units)
        counts.tokens += sum(len(span.ids) for unit in units for row in unit.rows for span in row)
        return units

    def _document(self, record: TextRecord) -> Unit:
        """bos + text + eos; documents have no length limit, the corpus stream cuts them into samples."""
        ids = (self._tokenizer.bos_id, *self._tokenizer.encode(record.text), self._tokenizer.eos_id)
        return Unit(((Span(ids, False),),), (0,))

    def _dialogue(self, record: DialogueRecord, counts: Counts) -> list[Unit]:
        check_order(record.messages, "assistant", record.source)
        row = render(record.messages, self._template, self._tokenizer)
        if self._fits(row) or not self._may_shorten(_length(row), counts):
            return [_single(row)] if self._fits(row) else []
        parts = self._split(record.messages) if self._overlong == "split" else [record.messages]
        return [_single(self._shortened(part)) for part in parts]

    def _split(self, messages: tuple[Message, ...]) -> list[tuple[Message, ...]]:
        """As few dialogues as hold the exchanges in order, each in a row; the system turn stands in each."""
        first = 1 if messages[0].role == "system" else 0
        head, turns = messages[:first], messages[first:]
        parts: list[tuple[Message, ...]] = []
        for index in range(0, len(turns), 2):
            pair = turns[index : index + 2]
            if parts and self._fits(render([*parts[-1], *pair], self._template, self._tokenizer)):
                parts[-1] += pair
            else:
                parts.append((*head, *pair))
        return parts

    def _shortened(self, messages: tuple[Message, ...]) -> list[Span]:
        """A dialogue cut on the right; before that, a first question that leaves no room for an answer is cut."""
        row = render(messages, self._template, self._tokenizer)
        if len(row[0].ids) >= self._max_length:
            first = 1 + next(index for index, message in enumerate(messages) if message.role == "user")
            prompt = self._shorter_prompt(messages[:first], self._room(len(row[1].ids)))
            row = render([*prompt, *messages[first:]], self._template, self._tokenizer)
        return self._cut(row)

    def _room(self, answer: int) -> int:
        """Tokens that a prompt may take of a row beside an answer of that many: half of them, or what is over."""
        return max(self._max_length // 2, self._max_length - answer)

    def _cut(self, row: Sequence[Span]) -> list[Span]:
        """Cut on the right; what is left ends with an answer's tokens (without eos where the cut fell inside)."""
        kept: list[Span] = []
        room = self._max_length
        for span in row:
            if room > 0:
                kept.append(Span(span.ids[:room], span.target))
            room -= len(span.ids)
        while not kept[-1].target:
            kept.pop()
        return kept

    def _ranking(self, record: PreferenceRecord, counts: Counts) -> list[Unit]:
        check_order(record.prompt, "user", record.source)
        rows = [self._response(record.prompt, response) for response in record.responses]
        longest = max(_length(row) for row in rows)
        if longest > self._max_length:
            if not self._may_shorten(longest, counts):
                return []
            prompt = self._shorter_prompt(record.prompt, self._room(max(_length(row[1:]) for row in rows)))
            rows = [self._cut(self._response(prompt, response)) for response in record.responses]
        return [Unit(tuple(tuple(row) for row in rows), record.dense_ranks())]

    def _response(self, prompt: tuple[Message, ...], response: tuple[Message, ...]) -> list[Span]:
        """[prompt, response ...]: the first span is the prompt, whatever turns it has."""
        head = tuple(render_prompt(prompt, self._template, self._tokenizer))
        whole = render([*prompt, *response], self._template, self._tokenizer)
        answers = len([message for message in prompt if message.role == "assistant"])
        return [Span(head, False), *whole[2 * answers + 1 :]]

    def _prompt(self, record: PromptRecord, counts: Counts) -> list[Unit]:
        check_order(record.messages, "user", record.source)
        ids = render_prompt(record.messages, self._template, self._tokenizer)
        if len(ids) > self._max_length:
            if not self._may_shorten(len(ids), counts):
                return []
            shorter = self._shorter_prompt(record.messages, self._max_length)
            ids = render_prompt(shorter, self._template, self._tokenizer)
        return [_single([Span(tuple(ids), False)])]

    def _shorter_prompt(self, messages: tuple[Message, ...], room: int) -> tuple[Message, ...]:
        """The prompt without its oldest exchanges, then with the end of its question cut, until it fits."""
        first = 1 if messages[0].role == "system" else 0
        head, turns = messages[:first], messages[first:]
        while len(turns) > 1 and self._prompt_length((*head, *turns)) > room:
            turns = turns[2:]
        if self._prompt_length((*head, *turns)) <= room:
            return (*head, *turns)
        question = turns[-1].content
        low, high = 0, len(question) - 1  # the most characters that fit
        while low < high:
            middle = (low + high + 1) // 2
            cut = question[:middle]
            fits = cut.strip() == "" or self._prompt_length((*head, Message("user", cut))) <= room
            low, high = (middle, high) if fits else (low, middle - 1)
        if not question[:low].strip():
            least = self._prompt_length((*head, Message("user", question.strip()[:1])))
            raise BadRecord(
                f"the prompt's frame alone takes {least} tokens of a row, where {room} are for the prompt",
                hint=f"raise data.max_length (now {self._max_length}), or leave such records out: data.overlong=skip",
            )
        return (*head, Message("user", question[:low]))

    def _prompt_length(self, messages: tuple[Message, ...]) -> int:
        return len(render_prompt(messages, self._template, self._tokenizer))

    def _fits(self, row: Sequence[Span]) -> bool:
        return _length(row) <= self._max_length

    def _may_shorten(self, length: int, counts: Counts) -> bool:
        """Whether the policy cuts the row; False: leave it out.  Raises TooLong under ``error``."""
        if self._overlong == "error":
            raise TooLong(
                f"{length} tokens, and data.max_length is {self._max_length}\n"
                "  -> raise data.max_length, or set data.overlong to truncate, split (dialogues) or skip"
            )
        if self._overlong == "skip":
            counts.too_long += 1
            return False
        counts.shortened += 1
        return True


def _length(row: Sequence[Span]) -> int:
    return sum(len(span.ids) for span in row)


def _single(row: Sequence[Span]) -> Unit:
    return Unit((tuple(row),), (0,))
