"""Rows into packs: several sequences end to end in one micro-batch (``thd``, ``cu_seqlens``).

Packing is where token-aligned fields become *prediction-aligned*: slot p of a pack, which holds token t of its
row, carries the fields of token t + 1, the one its hidden state predicts.  The slot of a row's last token carries
zeros and ``targets`` False.  ``unpack`` undoes it.

The only padding: each sequence up to a multiple of 2 x cp (so that context parallelism can cut it in zigzag), and
one dummy sequence at the end of a pack where sequence parallelism or a pipeline's fixed shape needs it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_zj.data.batch import Batch, Rows


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch as one context-parallel rank sees it.  T: slots here; R: rows (dummies excluded).

    With cp = 1 the slots are the whole pack.  ``cu_seqlens`` always describes the whole pack.
    """

    tokens: Tensor  # [T] int64
    labels: Tensor  # [T] int64: the next token of the row; 0 where there is none
    targets: Tensor  # [T] bool: labels holds a real next token
    positions: Tensor  # [T] int64: index in the row
    slots: Tensor  # [T] int64: this slot's place in the whole pack
    cu_seqlens: Tensor  # [S + 1] int32: ends of the sequences, padding and dummy included
    cu_seqlens_list: tuple[int, ...]  # the same on the host: no device synchronisation
    max_seqlen: int  # longest sequence of the pack, tokens
    last: Tensor  # [R] int64: slot (an index of [T] here) of each row's last token; -1: on another cp rank
    row_ids: tuple[int, ...]  # the rows' indices in the batch they came from
    lengths: tuple[int, ...]  # [R] real tokens of each row
    per_token: dict[str, Tensor]  # [T] prediction-aligned
    per_row: dict[str, Tensor]  # [R, ...]
    read: Tensor | None = None  # [N] int64, rising: the slots whose outputs are asked for; None: all

    @property
    def num_rows(self) -> int:
        """Rows of the pack."""
        return len(self.row_ids)


def plan_packs(lengths: Sequence[int], units: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    """Rows into packs of at most ``budget`` tokens, in order; a unit is never split.

    A unit longer than the budget gets a pack of its own.  Returns row indices, one list a pack.
    """
    packs: list[list[int]] = []
    room = 0
    for unit in units:
        size = sum(lengths[row] for row in unit)
        if not packs or size > room:
            packs.append([])
            room = budget
        packs[-1].extend(unit)
        room -= size
    return packs


def padded_length(lengths: Sequence[int], cp: int) -> int:
    """Slots the rows take in a pack: each row rounded up to a multiple of 2 x cp (of 1 without cp)."""
    unit = 2 * cp if cp > 1 else 1
    return sum(_round_up(length, unit) for length in lengths)


def pack(
    batch: Batch, row_ids: Sequence[int], *, cp: int = 1, cp_rank: int | None = 0, length: int | None = None
) -> PackedBatch:
    """Pack these rows of ``batch``.

    ``cp_rank``: whose share of the slots; None: all slots, padded as for the cut.
    ``length``: slots of the whole pack (a multiple of 2 x cp with cp > 1); the rest is one dummy sequence.
    None: no dummy.  An empty ``row_ids`` with a ``length`` gives a pack that is all dummy.
    """
    unit = 2 * cp if cp > 1 else 1
    picked = batch.select(row_ids)
    real = picked.tokens.lengths.tolist()
    sizes = [_round_up(size, unit) for size in real]
    total = sum(sizes)
    if length is not None and length > total:
        sizes.append(length - total)
    elif length is not None and length < total:
        raise ValueError(f"rows of {total} slots do not fit a pack of {length}")
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    device = picked.tokens.values.device
    source, slot = _places(real, ends, device)
    whole = _whole_pack(picked, source, slot, ends[-1], device)
    if cp > 1 and cp_rank is not None:
        local = _zigzag_slots(ends, cp, cp_rank).to(device)
    else:
        local = torch.arange(ends[-1], device=device)
    where = torch.full((ends[-1],), -1, dtype=torch.int64, device=device)
    where[local] = torch.arange(local.shape[0], device=device)
    last = torch.tensor([ends[row] + size - 1 for row, size in enumerate(real)], dtype=torch.int64, device=device)
    return PackedBatch(
        **{name: values[local] for name, values in whole[0].items()},
        slots=local,
        cu_seqlens=torch.tensor(ends, dtype=torch.int32, device=device),
        cu_seqlens_list=tuple(ends),
        max_seqlen=max(sizes, default=0),
        last=where[last],
        row_ids=tuple(int(row) for row in row_ids),
        lengths=tuple(real),
        per_token={name: values[local] for name, values in whole[1].items()},
        per_row=dict(picked.per_row),
    )


def unpack(values: Tensor, packed: PackedBatch) -> Rows:
    """Prediction-aligned values of the whole pack [total slots] back to token-aligned rows (index 0 holds 0)."""
    rows = []
    for start, length in zip(packed.cu_seqlens_list, packed.lengths, strict=False):
        row = values.new_zeros(length)
        row[1:] = values[start : start + length - 1] if length > 0 else 0
        rows.append(row)
    lengths = torch.tensor(packed.lengths, dtype=torch.int64)
    return Rows(torch.cat(rows) if rows else values[:0], lengths)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _places(real: Sequence[int], ends: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Index of every real token in the concatenated rows, and its slot in the pack."""
    source = torch.arange(sum(real), device=device)
    starts = [torch.arange(ends[row], ends[row] + size, device=device) for row, size in enumerate(real)]
    return source, torch.cat(starts) if starts else source


def _whole_pack(
    picked: Batch, source: Tensor, slot: Tensor, total: int, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The fields of the pack before any cut over cp."""
    lengths = picked.tokens.lengths
    starts = picked.tokens.offsets[:-1]
    index = source - torch.repeat_interleave(starts, lengths).to(device)
    predicted = index > 0  # these tokens are the target of the slot before them
    tokens = torch.zeros(total, dtype=torch.int64, device=device)
    tokens[slot] = picked.tokens.values
    labels, positions = torch.zeros_like(tokens), torch.zeros_like(tokens)
    labels[slot[predicted] - 1] = picked.tokens.values[predicted]
    positions[slot] = index
    targets = torch.zeros(total, dtype=torch.bool, device=device)
    targets[slot[predicted] - 1] = True
    shifted = {}
    for name, rows in picked.per_token.items():
        values = rows.values.new_zeros(total)
        values[slot[predicted] - 1] = rows.values[predicted]
        shifted[name] = values
    return {"tokens": tokens, "labels": labels, "targets": targets, "positions": positions}, shifted


def _zigzag_slots(ends: Sequence[int], cp: int, cp_rank: int) -> Tensor:
    """Slots of one cp rank: pieces ``cp_rank`` and ``2 cp - 1 - cp_rank`` of each sequence cut in 2 cp."""
    pieces = []
    for start, end in itertools.pairwise(ends):
        blocks = torch.arange(start, end).view(2 * cp, -1)
        pieces += [blocks[cp_rank], blocks[2 * cp - 1 - cp_rank]]
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64)
