"""Sums over the micro-batches of a step, over the placement: the one place that divides by the global weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_zj.data.batch import Batch
from megatron_zj.engine.microbatches import MicroBatches
from megatron_zj.engine.objective import LossTerms, Metrics
from megatron_zj.parallel.collectives import broadcast_floats, gather_objects
from megatron_zj.parallel.groups import ParallelGroups

_MAX_PLACES = 4  # micro-batches that a message names


class NonFiniteError(RuntimeError):
    """A NaN or Inf loss or gradient: raised on every rank of the placement, before any weight was touched."""

    def __init__(self, message: str, draws: Sequence[int] = ()) -> None:
        """``draws``: the ``draw`` of the rows that may be at fault, as far as they bear one; see Stream.describe."""
        super().__init__(message)
        self.draws = tuple(draws)


@dataclass(frozen=True)
class MicroBatchSums:
    """What one micro-batch adds, on this rank."""

    loss: Tensor  # scalar, detached
    weight: Tensor  # scalar
    metrics: dict[str, Tensor]  # scalars

    @classmethod
    def of(cls, terms: LossTerms, weight: Tensor, share: int) -> MicroBatchSums:
        """``share``: 0 where another rank of the cp group counts the same sums, else 1."""
        metrics = {name: value.detach() * share for name, value in terms.metrics.items()}
        return cls(terms.loss.detach() * share, weight * share, metrics)


@dataclass(frozen=True)
class Totals:
    """Sums over the placement, the same on all its ranks."""

    loss: float
    weight: float
    metrics: dict[str, float]

    def averages(self) -> Metrics:
        """The loss and the metrics by the global weight, and the weight.  Raises ValueError where it is zero."""
        if self.weight <= 0:
            raise ValueError(
                "the global batch has weight 0: no token (or pair) of it carries loss; look at the data's loss mask "
                "or ranks, or take a larger batch"
            )
        means = {name: value / self.weight for name, value in self.metrics.items()}
        return {"loss": self.loss / self.weight, **means, "weight": self.weight}


def total(sums: list[MicroBatchSums], groups: ParallelGroups, device: torch.device) -> Totals:
    """Add the micro-batches of all data- and context-parallel ranks; collective over the placement.

    ``sums`` is empty on inner stages: they hear the result, from the last stage's tensor rank 0.
    """
    names: list[str] = []
    values: list[float] = []
    if groups.is_last_stage:
        names = ["loss", "weight", *sums[0].metrics]
        columns = [[one.loss, one.weight, *one.metrics.values()] for one in sums]
        rows = torch.stack([torch.stack([value.to(device, torch.float64) for value in row]) for row in columns])
        added = rows.sum(0)
        if groups.pgc.dp_cp.size() > 1:
            dist.all_reduce(added, group=groups.pgc.dp_cp)
        values = added.tolist()
    source = groups.grid.ranks[0] if groups.pgc.mp.size() == 1 else _last_stage_tp0(groups)
    if groups.pp_size > 1:
        heard: list[object] = [(names, values)]
        dist.broadcast_object_list(heard, source, group=groups.pgc.mp, device=device)
        names, values = heard[0]  # type: ignore[misc]
    elif groups.tp_size > 1:
        values = broadcast_floats(values, source, groups.pgc.mp, device)
    sums_by_name = dict(zip(names, values, strict=True))
    loss, weight = sums_by_name.pop("loss"), sums_by_name.pop("weight")
    return Totals(loss, weight, sums_by_name)


def require_finite(
    result: Totals, sums: list[MicroBatchSums], micro: MicroBatches, batch: Batch, groups: ParallelGroups
) -> None:
    """Raise NonFiniteError, with the rows that did it, on all ranks alike."""
    if math.isfinite(result.loss):
        return
    guilty = [index for index, one in enumerate(sums) if not math.isfinite(float(one.loss))]
    rows = [row for index in guilty for row in micro.packs[index].row_ids]
    where = [f"data-parallel shard {groups.dp_rank}, {micro.describe(index)}" for index in guilty]
    raise nonfinite(f"the loss is {result.loss}", where, rows, batch, groups)


def nonfinite(
    what: str, where: Sequence[str], row_ids: Sequence[int], batch: Batch, groups: ParallelGroups
) -> NonFiniteError:
    """The error about some rows of each shard's batch, the same on all ranks of the placement (collective over it)."""
    draws = batch.per_row["draw"][list(row_ids)].tolist() if "draw" in batch.per_row else []
    heard = cast(list[tuple[list[str], list[int]]], gather_objects((list(where), draws), groups.world))
    places = sorted({place for places, _ in heard for place in places})
    text = f"{what} ({'; '.join(places[:_MAX_PLACES])})" if places else what
    return NonFiniteError(
        f"{text}. The weights are those before this step. Lower optim.lr, look at the data, or set "
        "engine.check_for_nan=false to skip such steps",
        sorted({draw for _, draws in heard for draw in draws}),
    )


def _last_stage_tp0(groups: ParallelGroups) -> int:
    """Global rank of the last stage's tensor rank 0, in this rank's model-parallel group."""
    return next(
        rank
        for rank in dist.get_process_group_ranks(groups.pgc.mp)
        if (place := groups.grid.coordinates(rank)) and place["tp"] == 0 and place["pp"] == groups.pp_size - 1
    )
