"""Prompts as a stream's units."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

import megatron_zj.data.formats  # noqa: F401  (registers the formats)
from megatron_zj.config.data import OnBadRecord
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.data.chat import check_order
from megatron_zj.data.dialogue import StoredUnits
from megatron_zj.data.errors import BadRecord
from megatron_zj.data.formats.registry import choose_format, convert_item, raw_items
from megatron_zj.data.order import Draw
from megatron_zj.data.records import PromptRecord


class PromptUnits(StoredUnits):
    """One row a prompt, up to where the answer begins.  Per row, int64: ``sample_id`` (the draw's number, which keys
    the randomness of its response and never repeats), ``prompt_length`` (tokens), ``draw``."""

    def batch(self, draws: Sequence[Draw]) -> Batch:
        rows = [row for draw in draws for row in self.rows(draw)]
        numbers = torch.tensor([draw.number for draw in draws], dtype=torch.int64)
        return Batch(
            Rows.of([row.tokens for row in rows], torch.int64),
            {},
            {
                "sample_id": numbers,
                "draw": numbers.clone(),
                "prompt_length": torch.tensor([row.prompt_length for row in rows], dtype=torch.int64),
            },
        )


def read_prompts(files: Sequence[str], form: str, on_bad_record: OnBadRecord) -> list[PromptRecord]:
    """The prompts of raw files as messages, in order: all of a dialogue but its last answer, or a question.

    Raises DataError at a record that cannot be used, or leaves it out, as the policy says.
    """
    found = []
    for name in files:
        path = Path(name)
        chosen = choose_format(path, form)
        for item in raw_items(path, chosen):
            try:
                record = convert_item(item, chosen, "prompts")
                if isinstance(record, PromptRecord):
                    check_order(record.messages)
                    found.append(record)
            except BadRecord as error:
                if on_bad_record == "error":
                    raise error.located(path, item.line) from error
    return found
