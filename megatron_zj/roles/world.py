"""Rows between role calls: spread evenly over all ranks, and what every rank knows about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_zj.data.batch import GROUP, Batch, Rows


@dataclass(frozen=True)
class WorldBatch:
    """A batch over the whole world.  Row ids are global: rank 0's rows first, then rank 1's.

    ``local``: this rank's rows, on the CPU.  ``lengths``: tokens of every row, by rank; ``groups``: the group of every
    row, by rank (ranked lists), or None.  Because every rank knows all lengths, a role call needs no negotiation.
    """

    local: Batch
    lengths: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...] | None = None

    @classmethod
    def gather(cls, local: Batch) -> WorldBatch:
        """Collective over the world: tell every rank the shape of every rank's rows."""
        groups = local.per_row[GROUP].tolist() if GROUP in local.per_row else None
        mine = (local.tokens.lengths.tolist(), groups)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        lengths = tuple(tuple(entry[0]) for entry in everyone)
        return cls(local, lengths, None if groups is None else tuple(tuple(entry[1]) for entry in everyone))

    @property
    def num_rows(self) -> int:
        """Rows of the world."""
        return sum(len(rows) for rows in self.lengths)

    @property
    def row_lengths(self) -> list[int]:
        """Tokens of every row, by global row id."""
        return [length for rows in self.lengths for length in rows]

    @property
    def home(self) -> list[list[int]]:
        """Global row ids by rank."""
        ends = [0]
        for rows in self.lengths:
            ends.append(ends[-1] + len(rows))
        return [list(range(start, end)) for start, end in pairwise(ends)]

    def units(self, row_ids: Sequence[int] | None = None) -> list[list[int]]:
        """Global row ids that must stay together, one list a unit, restricted to ``row_ids``."""
        ids = list(range(self.num_rows)) if row_ids is None else list(row_ids)
        if self.groups is None:
            return [[row] for row in ids]
        group_of = [group for rows in self.groups for group in rows]
        units: dict[int, list[int]] = {}
        for row in ids:
            units.setdefault(group_of[row], []).append(row)
        return list(units.values())

    def with_fields(
        self, per_token: Mapping[str, Rows] | None = None, per_row: Mapping[str, Tensor] | None = None
    ) -> WorldBatch:
        """The same rows with fields of this rank's rows added or replaced."""
        return WorldBatch(self.local.with_fields(per_token, per_row), self.lengths, self.groups)


@dataclass(frozen=True)
class World:
    """This rank's place among all ranks; what a stream needs to hand out shares."""

    rank: int
    size: int

    @classmethod
    def current(cls) -> World:
        """From the default process group."""
        return cls(dist.get_rank(), dist.get_world_size())


def world_sum(values: Tensor) -> Tensor:
    """The sum of ``values`` over all ranks, in float64 on the CPU, so that the split of rows cannot be seen in it."""
    total = values.detach().to("cpu", torch.float64).clone()
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total


def world_max(value: float) -> float:
    """The largest ``value`` of all ranks; of a process without a group, its own."""
    largest = torch.tensor(value, dtype=torch.float64)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def gather_in_order(mine: list[Any]) -> list[Any]:
    """Every rank's items, rank 0's first, on every rank.  Items are numbers, strings and lists of them."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return [item for items in everyone for item in items]
