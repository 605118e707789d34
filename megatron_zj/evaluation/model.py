"""What an evaluation needs of a model: callables on whole lists, and one place that makes their ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_zj.data.chat import ChatTemplate, Message, render, render_prompt
from megatron_zj.data.tokenizer import Tokenizer

Ids = Sequence[int]
ScoreOptions = Callable[[Sequence[tuple[Ids, Ids]]], Sequence[float]]
"""(prompt ids, option ids) pairs to the sum of the option's log-probabilities (nats) after the prompt."""
Generate = Callable[[Sequence[Ids]], Sequence[tuple[str, bool]]]
"""Prompt ids to answers: the text, and whether it ended by itself (eos)."""
ScoreRows = Callable[[Sequence[Ids]], Sequence[float]]
"""Whole dialogues to the reward model's scores."""


@dataclass(frozen=True)
class Codec:
    """The chat string that training used, so that evaluation cannot differ from it."""

    tokenizer: Tokenizer
    template: ChatTemplate

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids up to where the answer begins; ``messages`` end with the user."""
        return render_prompt(messages, self.template, self.tokenizer)

    def question(self, text: str) -> list[int]:
        """The prompt of one user turn."""
        return self.prompt([Message("user", text)])

    def text(self, text: str) -> list[int]:
        """Ids of plain text, as an answer begins."""
        return self.tokenizer.encode(text)

    def dialogue(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a whole dialogue, every answer with its eos."""
        return [token_id for span in render(messages, self.template, self.tokenizer) for token_id in span.ids]


def checked(values: Sequence[float], expected: int, what: str) -> list[float]:
    """The values as a list.  Raises ValueError when a callable gave another number of them, or a NaN."""
    found = [float(value) for value in values]
    if len(found) != expected:
        raise ValueError(f"{what} gave {len(found)} values for {expected} items")
    if any(value != value for value in found):
        raise ValueError(f"{what} gave NaN for item {next(i for i, value in enumerate(found) if value != value)}")
    return found
