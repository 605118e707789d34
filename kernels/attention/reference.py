"""Attention in torch: the CPU path, and what the Triton kernels are compared with.

Each sequence becomes one or more tiles; tiles of one shape go through torch's fused CPU attention together (on another
device, through ``plain``), so no [T, T] mask and no [T, T] score matrix ever exists.  Only context parallelism and
windows need masks, and those are of ``MASK_ROWS`` queries at a time.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention import plain
from kernels.guards import without_autocast

MASK_ROWS = 256  # queries a masked tile holds at most
_fused_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Tile:
    """Queries [q0, q0 + num_q) against keys [k0, k0 + num_k) of the pack."""

    q0: int
    num_q: int
    k0: int
    num_k: int
    causal: bool  # square and lower triangular
    first: int | None  # masked tile: key index, from k0, that the first query's position has; else None
    positions: tuple[int, ...] | None  # masked tile: each query's position, from k0

    @property
    def form(self) -> tuple[object, ...]:
        """Tiles of one form can share a call."""
        return self.num_q, self.num_k, self.causal, self.positions


def tiles(
    ends_q: Sequence[int], ends_k: Sequence[int], slots: Sequence[int] | None, causal: bool, window: int
) -> list[Tile]:
    """Cut a pack into tiles.  ``window`` 0: none.  Queries that see no key get no tile."""
    found: list[Tile] = []
    for q0, q1, k0, k1 in zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True):
        num_q, num_k = q1 - q0, k1 - k0
        if num_q == 0 or num_k == 0:
            continue
        if not causal:
            found.append(Tile(q0, num_q, k0, num_k, False, None, None))
            continue
        if slots is None:
            positions = range(num_k - num_q, num_k)
        else:
            positions = [slot - k0 for slot in slots[q0:q1]]  # type: ignore[assignment]
            _check_slots(positions, num_k)
        aligned = num_q == num_k and (slots is None or list(positions) == list(range(num_k)))
        if aligned and (window == 0 or window >= num_k):
            found.append(Tile(q0, num_q, k0, num_k, True, None, None))
        else:
            found += _masked_tiles(q0, k0, positions, window)
    return found


def _check_slots(positions: Sequence[int], num_k: int) -> None:
    rising = all(a < b for a, b in itertools.pairwise(positions))
    if not rising or positions[0] < 0 or positions[-1] >= num_k:
        raise ValueError("q_slots must rise within each sequence and stay inside the sequence's keys")


def _masked_tiles(q0: int, k0: int, positions: Sequence[int], window: int) -> list[Tile]:
    found = []
    start = next((index for index, position in enumerate(positions) if position >= 0), len(positions))
    for row in range(start, len(positions), MASK_ROWS):
        here = tuple(positions[row : row + MASK_ROWS])
        low = max(0, here[0] - window + 1) if window else 0
        relative = tuple(position - low for position in here)
        found.append(Tile(q0 + row, len(here), k0 + low, here[-1] - low + 1, False, relative[0], relative))
    return found


def _mask(tile: Tile, window: int, like: Tensor) -> Tensor | None:
    if tile.positions is None:
        return None
    position = torch.tensor(tile.positions, device=like.device)[:, None]
    key = torch.arange(tile.num_k, device=like.device)[None, :]
    hidden = key > position
    if window:
        hidden |= key <= position - window
    if not bool(hidden.any()):
        return None
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)[None, None]


def _unit(x: Tensor) -> Tensor:
    """Stride 1 on the last dimension: torch's fused CPU attention takes it for granted and does not look."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _stack(x_THD: Tensor, starts: Sequence[int], length: int) -> Tensor:
    """[tiles, heads, length, D]: a view where the tiles are evenly spaced."""
    if len(starts) == 1:
        return x_THD[starts[0] : starts[0] + length].transpose(0, 1)[None]
    step = starts[1] - starts[0]
    if step > 0 and all(b - a == step for a, b in itertools.pairwise(starts)):
        stride_T, stride_H, stride_D = x_THD.stride()
        view = x_THD.as_strided(
            (len(starts), length, x_THD.shape[1], x_THD.shape[2]),
            (step * stride_T, stride_T, stride_H, stride_D),
            x_THD.storage_offset() + starts[0] * stride_T,
        )
    else:
        view = torch.stack([x_THD[start : start + length] for start in starts])
    return view.transpose(1, 2)


def _stack_rows(x_HT: Tensor, starts: Sequence[int], length: int) -> Tensor:
    """[tiles, heads, length]."""
    parts = [x_HT[:, start : start + length] for start in starts]
    return parts[0][None] if len(parts) == 1 else torch.stack(parts)


@dataclass(frozen=True)
class Group:
    """Tiles of one form: one call."""

    like: Tile
    starts_q: tuple[int, ...]
    starts_k: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """The calls that make up a pack.

    ``order``: the tiles, as (group, member), in the pack's order, where they lie end to end and cover it, so that their
    results can be joined.  None: a key has several tiles or a query none, and results are added into zeros.
    """

    groups: tuple[Group, ...]
    order: tuple[tuple[int, int], ...] | None

    @property
    def even(self) -> bool:
        """One call whose results are the pack's as they are."""
        return self.order is not None and self.order == tuple((0, member) for member in range(len(self.order)))


@functools.lru_cache(maxsize=16)  # the packs of a step that are under way
def _plan(
    ends_q: tuple[int, ...],
    ends_k: tuple[int, ...],
    slots: tuple[int, ...] | None,
    causal: bool,
    window: int,
    mask_rows: int,
) -> Plan:
    """Kept, because every layer asks for the same one, forward and backward."""
    found = tiles(ends_q, ends_k, slots, causal, window)
    members: dict[tuple[object, ...], list[Tile]] = {}
    for tile in found:
        members.setdefault(tile.form, []).append(tile)
    groups = [
        Group(same[0], tuple(tile.q0 for tile in same), tuple(tile.k0 for tile in same)) for same in members.values()
    ]
    places = {
        (start_q, start_k): (index, member)
        for index, group in enumerate(groups)
        for member, (start_q, start_k) in enumerate(zip(group.starts_q, group.starts_k, strict=True))
    }
    next_q = next_k = 0
    for tile in found:
        if (tile.q0, tile.k0) != (next_q, next_k):
            return Plan(tuple(groups), None)
        next_q, next_k = tile.q0 + tile.num_q, tile.k0 + tile.num_k
    whole = bool(found) and (next_q, next_k) == (ends_q[-1], ends_k[-1])
    return Plan(tuple(groups), tuple(places[tile.q0, tile.k0] for tile in found) if whole else None)


def forward(
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    ends_q: Sequence[int],
    ends_k: Sequence[int],
    slots: Sequence[int] | None,
    scale: float,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Output [T, H, D] and log-sum-exp of the scaled scores [H, T] (fp32, fp64 for fp64 inputs)."""
    q_THD, k_SKD, v_SKD = (_unit(x) for x in (q_THD, k_SKD, v_SKD))
    num_q, num_heads, _ = q_THD.shape
    plan = _plan(tuple(ends_q), tuple(ends_k), None if slots is None else tuple(slots), causal, window, MASK_ROWS)
    calls = (_forward_group(q_THD, k_SKD, v_SKD, group, scale, window) for group in plan.groups)
    if plan.even:
        ((part, part_lse),) = calls
        lse = part_lse.transpose(0, 1).reshape(num_heads, num_q)
        return part.transpose(1, 2).reshape(q_THD.shape), lse.contiguous()
    if plan.order is not None:
        found = list(calls)
        lses = [found[group][1][member] for group, member in plan.order]
        return _joined([part for part, _ in found], plan.order), torch.cat(lses, dim=1)
    out = torch.zeros(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    lse_dtype = torch.float64 if q_THD.dtype == torch.float64 else torch.float32
    lse = torch.full((num_heads, num_q), -torch.inf, dtype=lse_dtype, device=q_THD.device)
    for group, (part, part_lse) in zip(plan.groups, calls, strict=True):  # one at a time: many may share keys
        for index, start in enumerate(group.starts_q):
            out[start : start + group.like.num_q] = part[index].transpose(0, 1)
            lse[:, start : start + group.like.num_q] = part_lse[index]
    return out, lse


def _joined(parts: Sequence[Tensor], order: Sequence[tuple[int, int]]) -> Tensor:
    """Results of groups, each [tiles, heads, length, D], as [T, heads, D]."""
    return torch.cat([parts[group][member].transpose(0, 1) for group, member in order])


def _forward_group(q: Tensor, k: Tensor, v: Tensor, group: Group, scale: float, window: int) -> tuple[Tensor, Tensor]:
    """Output [tiles, H, queries, D] and log-sum-exp [tiles, H, queries]."""
    like = group.like
    form = _fused_forward if q.device.type == "cpu" else plain.forward
    part, part_lse = form(
        _stack(q, group.starts_q, like.num_q),
        _stack(k, group.starts_k, like.num_k),
        _stack(v, group.starts_k, like.num_k),
        0.0,
        like.causal,
        attn_mask=_mask(like, window, q),
        scale=scale,
    )
    return part, part_lse


def backward(
    dout_THD: Tensor,
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    ends_q: Sequence[int],
    ends_k: Sequence[int],
    slots: Sequence[int] | None,
    scale: float,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.  Keys that several tiles share are summed in fp32."""
    q_THD, k_SKD, v_SKD = (_unit(x) for x in (q_THD, k_SKD, v_SKD))
    given = _unit(dout_THD), q_THD, k_SKD, v_SKD, _unit(out_THD), lse_HT
    plan = _plan(tuple(ends_q), tuple(ends_k), None if slots is None else tuple(slots), causal, window, MASK_ROWS)
    calls = (_backward_group(*given, group, scale, window) for group in plan.groups)
    if plan.even:
        dq, dk, dv = (part.transpose(1, 2).flatten(0, 1) for part in next(calls))
        return dq, dk, dv
    if plan.order is not None:
        dq, dk, dv = (_joined(parts, plan.order) for parts in zip(*calls, strict=True))
        return dq, dk, dv
    wide = torch.float64 if q_THD.dtype == torch.float64 else torch.float32
    dq = torch.zeros(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    dk = torch.zeros(k_SKD.shape, dtype=wide, device=q_THD.device)
    dv = torch.zeros(v_SKD.shape, dtype=wide, device=q_THD.device)
    for group, parts in zip(plan.groups, calls, strict=True):
        like = group.like
        for index, (start_q, start_k) in enumerate(zip(group.starts_q, group.starts_k, strict=True)):
            dq[start_q : start_q + like.num_q] = parts[0][index].transpose(0, 1)
            dk[start_k : start_k + like.num_k] += parts[1][index].transpose(0, 1)
            dv[start_k : start_k + like.num_k] += parts[2][index].transpose(0, 1)
    return dq, dk.to(k_SKD.dtype), dv.to(v_SKD.dtype)


def _backward_group(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse_HT: Tensor,
    group: Group,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of each tile's q, k and v, [tiles, heads, length, D]."""
    like, starts_q, starts_k = group.like, group.starts_q, group.starts_k
    form = _fused_backward if q.device.type == "cpu" else plain.backward
    parts: tuple[Tensor, Tensor, Tensor] = form(
        _stack(dout, starts_q, like.num_q),
        _stack(q, starts_q, like.num_q),
        _stack(k, starts_k, like.num_k),
        _stack(v, starts_k, like.num_k),
        _stack(out, starts_q, like.num_q),
        _stack_rows(lse_HT, starts_q, like.num_q),
        0.0,
        like.causal,
        attn_mask=_mask(like, window, q),
        scale=scale,
    )
    return parts


@without_autocast
def decode(
    q_RHD: Tensor, k_cache_RSKD: Tensor, v_cache_RSKD: Tensor, lengths_R: Tensor, scale: float, window: int
) -> Tensor:
    """One query a row against its cache; see ``decode_attention``."""
    num_rows, num_heads, dim = q_RHD.shape
    longest = int(lengths_R.max()) if num_rows else 0
    if longest > k_cache_RSKD.shape[1]:
        raise ValueError(f"lengths_R must be at most the cache's {k_cache_RSKD.shape[1]} slots, got {longest}")
    if longest <= 0:
        return torch.zeros(q_RHD.shape, dtype=q_RHD.dtype, device=q_RHD.device)
    num_kv = k_cache_RSKD.shape[2]
    key = torch.arange(longest, device=q_RHD.device)[None, :]
    hidden = key >= lengths_R[:, None]
    if window:
        hidden = hidden | (key < lengths_R[:, None] - window)
    # A group of query heads is the query dimension: the cache is read once and never repeated.
    out = torch.nn.functional.scaled_dot_product_attention(
        q_RHD.view(num_rows, num_kv, num_heads // num_kv, dim),
        k_cache_RSKD[:, :longest].transpose(1, 2),
        v_cache_RSKD[:, :longest].transpose(1, 2),
        attn_mask=torch.zeros(hidden.shape, dtype=q_RHD.dtype, device=q_RHD.device).masked_fill_(hidden, -torch.inf)[
            :, None, None, :
        ],
        scale=scale,
    )
    empty = (lengths_R <= 0)[:, None, None]
    return out.reshape(num_rows, num_heads, dim).masked_fill(empty, 0.0)
