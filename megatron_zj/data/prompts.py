"""Prompts as a stream's units."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_zj.data.batch import Batch, Rows
from megatron_zj.data.dialogue import StoredUnits
from megatron_zj.data.order import Draw


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
