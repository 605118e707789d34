"""Dialogues as a stream's units: one row each, with the mask of its answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from megatron_zj.data.batch import Batch, Rows
from megatron_zj.data.order import Draw
from megatron_zj.data.store import StoredRow, UnitStore


class StoredUnits(ABC):
    """A choice of the units of a store, in a given order; the part that the three kinds of rows share."""

    def __init__(self, store: UnitStore, chosen: Sequence[int]) -> None:
        self._store = store
        self._chosen = chosen

    @property
    def num_units(self) -> int:
        return len(self._chosen)

    @property
    def checksum(self) -> str:
        return self._store.checksum

    def describe(self, draw: Draw) -> str:
        return self._store.origin(self._chosen[draw.index])

    @abstractmethod
    def batch(self, draws: Sequence[Draw]) -> Batch:
        """The rows of these draws, with the fields of the kind; also of none."""

    def rows(self, draw: Draw) -> list[StoredRow]:
        """The stored rows of one draw."""
        return self._store.unit(self._chosen[draw.index])


class DialogueUnits(StoredUnits):
    """``loss_mask`` [per token] int64: 1 on every answer and its eos.  Per row, int64: ``draw`` (see Stream.describe),
    ``index`` (the dialogue's place in the data)."""

    def batch(self, draws: Sequence[Draw]) -> Batch:
        rows = [row for draw in draws for row in self.rows(draw)]
        return Batch(
            Rows.of([row.tokens for row in rows], torch.int64),
            {"loss_mask": Rows.of([row.loss_mask for row in rows], torch.int64)},
            {
                "draw": torch.tensor([draw.number for draw in draws], dtype=torch.int64),
                "index": torch.tensor([draw.index for draw in draws], dtype=torch.int64),
            },
        )
