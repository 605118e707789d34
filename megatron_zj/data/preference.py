"""Ranked responses as a stream's units: the rows of a group stand together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_zj.data.batch import GROUP, Batch, Rows
from megatron_zj.data.dialogue import StoredUnits
from megatron_zj.data.order import Draw


class PreferenceUnits(StoredUnits):
    """K >= 2 rows a unit.  Per row, int64: ``group`` (the draw's number, so a ranking that a batch meets twice, at the
    seam of two epochs, is two groups), ``rank`` (0 best, ties equal), ``prompt_length`` (tokens), ``draw``."""

    def batch(self, draws: Sequence[Draw]) -> Batch:
        groups = [(draw.number, self.rows(draw)) for draw in draws]
        rows = [row for _, group in groups for row in group]
        numbers = torch.tensor([number for number, group in groups for _ in group], dtype=torch.int64)
        return Batch(
            Rows.of([row.tokens for row in rows], torch.int64),
            {},
            {
                GROUP: numbers,
                "draw": numbers.clone(),
                "rank": torch.tensor([row.rank for row in rows], dtype=torch.int64),
                "prompt_length": torch.tensor([row.prompt_length for row in rows], dtype=torch.int64),
            },
        )
