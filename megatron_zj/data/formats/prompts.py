"""Questions without answers, for rollouts.  Registered last: most other formats have a question too."""

from __future__ import annotations

from typing import Any

from megatron_zj.data.chat import Message
from megatron_zj.data.formats.rankings import prompt_of
from megatron_zj.data.formats.registry import Format, has_keys
from megatron_zj.data.records import PromptRecord, text_of


def _question(value: dict[str, Any]) -> PromptRecord:
    return PromptRecord((Message("user", text_of(value["question"], "question")),))


FORMATS = (
    Format(
        name="prompts",
        shape='{"prompt": a question, or a list of turns that ends with one}',
        matches=has_keys("prompt"),
        convert=lambda value: PromptRecord(*prompt_of(value)),
    ),
    Format(name="questions", shape='{"question": ...}', matches=has_keys("question"), convert=_question),
)
