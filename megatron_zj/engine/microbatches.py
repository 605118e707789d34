"""A data-parallel shard's rows as micro-batches, and outputs of micro-batches as rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_zj.config.derived import FP8_MULTIPLE
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.data.packing import PackedBatch, pack, padded_length, plan_packs, unpack
from megatron_zj.parallel.groups import ParallelGroups


@dataclass(frozen=True)
class MicroBatches:
    """The packs of one step on this rank; some may be all dummy."""

    packs: tuple[PackedBatch, ...]
    length: int  # slots of the longest whole pack; with a pipeline, of every pack
    batch: Batch  # whose rows they are

    def whole(self, packed: PackedBatch, groups: ParallelGroups) -> PackedBatch:
        """One of the packs as it was before the cut over cp."""
        return pack(self.batch, packed.row_ids, cp=groups.cp_size, cp_rank=None, length=packed.cu_seqlens_list[-1])

    def describe(self, index: int) -> str:
        """For messages: which rows of the shard's batch a pack holds."""
        return f"micro-batch {index}, rows {list(self.packs[index].row_ids)}"


def slot_multiple(groups: ParallelGroups, fp8: bool = False) -> int:
    """Slots of a whole pack are a multiple of this: 2 x cp for the zigzag cut, cp x tp for sequence parallelism.

    ``fp8``: and every rank's share is one of 16, as Transformer Engine's FP8 products demand of all their sizes.
    """
    zigzag = 2 * groups.cp_size if groups.cp_size > 1 else 1
    shards = groups.cp_size * (groups.tp_size if groups.parallel.sequence_parallel else 1)
    return math.lcm(zigzag, shards * (FP8_MULTIPLE if fp8 else 1))


def split(batch: Batch, groups: ParallelGroups, budget: int, *, fp8: bool = False) -> MicroBatches:
    """Pack the rows of ``batch``, at most ``budget`` slots a pack (more where one unit alone is longer).

    A pipeline moves activations of one shape, so there every pack is as long as the longest.  An interleaved
    pipeline runs micro-batches in groups of ``pp``, and a shard without rows takes part in every collective: both get
    packs that are all dummy.  Without a pipeline a pack has a dummy sequence only where ``slot_multiple`` needs one.
    """
    cp, multiple = groups.cp_size, slot_multiple(groups, fp8)
    lengths = batch.tokens.lengths.tolist()
    slots = [padded_length([length], cp) for length in lengths]
    plan = [rows for rows in plan_packs(slots, batch.units(), budget) if rows]
    totals = [-(-sum(slots[row] for row in rows) // multiple) * multiple for rows in plan]
    longest = max(totals, default=0) or multiple
    count = max(1, len(plan))
    if groups.vpp_size > 1:
        count = -(-count // groups.pp_size) * groups.pp_size
    plan += [[] for _ in range(count - len(plan))]
    totals += [longest] * (count - len(totals))
    if groups.pp_size > 1:
        totals = [longest] * count
    packs = tuple(
        pack(batch, rows, cp=cp, cp_rank=groups.cp_rank, length=total) for rows, total in zip(plan, totals, strict=True)
    )
    return MicroBatches(packs, longest, batch)


def rows_from_packs(outputs: Sequence[Tensor], micro: MicroBatches, groups: ParallelGroups) -> Rows:
    """[T] outputs of every pack back to token-aligned rows in the batch's row order; collective over cp."""
    whole = whole_over_cp(outputs, micro.packs, groups)
    parts = [unpack(values, packed) for values, packed in zip(whole, micro.packs, strict=True) if packed.num_rows]
    if not parts:
        return Rows(whole[0][:0], micro.batch.tokens.lengths)
    return Rows.concat(parts).select(_order(micro))


def whole_over_cp(outputs: Sequence[Tensor], packs: Sequence[PackedBatch], groups: ParallelGroups) -> list[Tensor]:
    """[T] outputs of every cp rank's share of each pack -> [slots] of the whole pack, the zigzag undone.

    One exchange for all the packs, collective over cp.  Backward gives each rank, at its own slots, the sum of what
    all cp ranks gave to their copies: a loss over whole packs must be counted on one of them.
    """
    if groups.cp_size == 1:
        return list(outputs)
    sizes = [packed.cu_seqlens_list[-1] for packed in packs]
    starts = itertools.accumulate(sizes, initial=0)
    slots = torch.cat([packed.slots + start for packed, start in zip(packs, starts, strict=False)])
    values, places = (
        gather_from_sequence_parallel_region(own, tensor_parallel_output_grad=True, group=groups.pgc.cp)
        for own in (torch.cat(list(outputs)), slots)
    )
    return list(torch.split(values[torch.argsort(places)], sizes))


def scores_from_packs(outputs: Sequence[Tensor], micro: MicroBatches) -> Tensor:
    """[R] outputs of every pack in the batch's row order."""
    scores = torch.cat(list(outputs))
    return scores[torch.tensor(_order(micro), dtype=torch.int64, device=scores.device)]


def _order(micro: MicroBatches) -> list[int]:
    """For each row of the batch, its place among the rows of all packs."""
    packed = [row for one in micro.packs for row in one.row_ids]
    return sorted(range(len(packed)), key=packed.__getitem__)
