"""What every layer needs to know of a pack: where sequences end, where tokens stand, which keys ranks share.

Legend: T slots of this context-parallel rank, S slots of the whole pack (T = S / cp), P positions, E head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

if TYPE_CHECKING:
    from megatron_zj.data.packing import PackedBatch


@dataclass(frozen=True)
class ContextLayout:
    """How one context-parallel rank finds its tokens among keys gathered from all ranks."""

    gathered_S: Tensor  # int64: row of the gathered keys (rank after rank) that belongs in each slot of the pack
    slots_T: Tensor  # int64: slot of each token of this rank
    cu_queries: Tensor  # [sequences + 1] int32: where sequences start in T, and T
    queries: tuple[int, ...]  # the same on the host


@dataclass
class PackedLayout(PackedSeqParams):  # type: ignore[misc]
    """megatron-core's parameters of a pack, and ours.  One object a forward pass, shared by all layers."""

    positions: Tensor = field(kw_only=True)  # [T] int64: index in the sequence
    cos_PE: Tensor = field(kw_only=True)  # [P, E / 2]
    sin_PE: Tensor = field(kw_only=True)
    ends: tuple[int, ...] = ()  # cu_seqlens on the host
    context: ContextLayout | None = None  # with context parallelism
    read: Tensor | None = None  # [N] int64, rising: slots that the last layer computes after its attention; None: all


def packed_layout(
    packed: PackedBatch, cos_PE: Tensor, sin_PE: Tensor, cp: int, read: Tensor | None = None
) -> PackedLayout:
    """The layout of one pack with the model's rotary tables."""
    return PackedLayout(
        qkv_format="thd",
        cu_seqlens_q=packed.cu_seqlens,
        cu_seqlens_kv=packed.cu_seqlens,
        max_seqlen_q=packed.max_seqlen,
        max_seqlen_kv=packed.max_seqlen,
        positions=packed.positions,
        cos_PE=cos_PE,
        sin_PE=sin_PE,
        ends=packed.cu_seqlens_list,
        context=context_layout(packed.cu_seqlens_list, packed.slots, cp) if cp > 1 else None,
        read=read,
    )


def context_layout(ends: tuple[int, ...], slots_T: Tensor, cp: int) -> ContextLayout:
    """Each sequence is cut in 2 x cp blocks, of which rank r holds r and 2 cp - 1 - r (zigzag).

    Raises ValueError when a sequence's length is not a multiple of 2 x cp.
    """
    share = ends[-1] // cp
    rows = []
    for start, end in pairwise(ends):
        if (end - start) % (2 * cp):
            raise ValueError(f"a sequence of {end - start} slots cannot be cut over cp={cp}; pad it to {2 * cp}s")
        block = (end - start) // (2 * cp)
        offset = torch.arange(block)
        for piece in range(2 * cp):
            owner, second = (piece, 0) if piece < cp else (2 * cp - 1 - piece, block)
            rows.append(owner * share + start // cp + second + offset)
    queries = tuple(end // cp for end in ends)
    device = slots_T.device
    return ContextLayout(
        gathered_S=(torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)).to(device),
        slots_T=slots_T,
        cu_queries=torch.tensor(queries, dtype=torch.int32, device=device),
        queries=queries,
    )
