"""FlashAttention in Triton: packed sequences, grouped heads, windows, query slots; forward, backward and decoding.

A program finds its sequence by a search in cu_seqlens, so the grid needs no maximum length and no program is idle.
Scores are kept in base 2 (one exp2 an element).  The backward pass has one owner for every output element: no atomics.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import configs
from kernels.attention import dense
from kernels.dispatch import Registry, launch

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MAX_HEAD_DIM = 256
WIDE_FROM = 1 << 31  # numbers in a tensor from which offsets take 64 bits: they cost registers
SLOT_CHUNK = 256  # query slots the dK/dV kernel counts at once


@triton.jit
def _find_tile(ends_ptr, num_sequences, tile, BLOCK: tl.constexpr, SEQUENCES: tl.constexpr):
    """The sequence that holds this tile of BLOCK tokens (num_sequences or more: none) and the tile's index in it."""
    index = tl.arange(0, SEQUENCES)
    known = index < num_sequences
    start = tl.load(ends_ptr + index, mask=known, other=0)
    end = tl.load(ends_ptr + index + 1, mask=known, other=0)
    tiles = (end - start + BLOCK - 1) // BLOCK
    sequence = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    before = tl.sum(tl.where(index < sequence, tiles, 0), 0)
    return sequence, tile - before


@triton.jit
def _query_positions(slot_ptr, row, first_row, last_row, q_start, k_start, shift, num_q, HAS_SLOTS: tl.constexpr):
    """Position among the sequence's keys of the tile's rows, of its first row and of its last one."""
    if HAS_SLOTS:
        position = tl.load(slot_ptr + q_start + row, mask=row < num_q, other=0).to(tl.int32) - k_start
        first = tl.load(slot_ptr + q_start + first_row).to(tl.int32) - k_start
        last = tl.load(slot_ptr + q_start + last_row).to(tl.int32) - k_start
    else:
        position = row + shift
        first = first_row + shift
        last = last_row + shift
    return position, first, last


@triton.jit
def _key_range(first, last, num_k, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BN: tl.constexpr):
    """Keys [low, high) a tile of queries reads; those below ``full`` need no mask."""
    low = 0
    high = num_k
    full = num_k // BN * BN
    if CAUSAL:
        high = tl.minimum(num_k, last + 1)
        full = tl.maximum(tl.minimum(first + 1, num_k), 0) // BN * BN
    if WINDOW > 0:
        low = tl.maximum(first - WINDOW + 1, 0) // BN * BN
        full = low
    return low, full, high


@triton.jit
def _inside(row, num_rows, dim, D: tl.constexpr, BD: tl.constexpr):
    """Mask of a [rows, BD] tile; the head size is looked at only where it is not a power of two."""
    inside = row[:, None] < num_rows
    if BD != D:
        inside = inside & (dim[None, :] < D)
    return inside


@triton.jit
def _visible(position, key, num_k, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    seen = key < num_k
    if CAUSAL:
        seen = seen & (key <= position)
    if WINDOW > 0:
        seen = seen & (key > position - WINDOW)
    return seen


@triton.jit
def _forward_keys(
    acc, total, highest, q, k_ptr, v_ptr, stride_k, stride_v, low, high, position, num_k, scale,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    MASKED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One pass of the online softmax (Milakov and Gimelshein 2018) over keys [low, high)."""
    dim = tl.arange(0, BD)
    for start in tl.range(low, high, BN):
        key = start + tl.arange(0, BN)
        at = key.to(tl.int64) if WIDE else key
        k_place = k_ptr + at[None, :] * stride_k + dim[:, None]
        v_place = v_ptr + at[:, None] * stride_v + dim[None, :]
        if MASKED:
            k = tl.load(k_place, mask=tl.trans(_inside(key, num_k, dim, D, BD)), other=0.0)
        elif BD != D:
            k = tl.load(k_place, mask=dim[:, None] < D, other=0.0)
        else:
            k = tl.load(k_place)
        score = tl.dot(q, k, input_precision=PRECISION) * scale
        if MASKED:
            score = tl.where(_visible(position[:, None], key[None, :], num_k, CAUSAL, WINDOW), score, -float("inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        # A row that has seen no key keeps its maximum at -inf; subtracting 0 instead gives it weights of 0.
        origin = tl.where(higher == -float("inf"), 0.0, higher) if MASKED else higher
        weight = tl.math.exp2(score - origin[:, None])
        rescale = tl.math.exp2(highest - origin)
        total = total * rescale + tl.sum(weight, 1)
        acc = acc * rescale[:, None]
        if MASKED:
            v = tl.load(v_place, mask=_inside(key, num_k, dim, D, BD), other=0.0)
        elif BD != D:
            v = tl.load(v_place, mask=dim[None, :] < D, other=0.0)
        else:
            v = tl.load(v_place)
        acc = tl.dot(weight.to(v.dtype), v, acc, input_precision=PRECISION)
        highest = higher
    return acc, total, highest


@triton.jit
def attention_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, ends_q_ptr, ends_k_ptr, slot_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, num_sequences, num_tokens, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, HAS_SLOTS: tl.constexpr, SEQUENCES: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) % HEADS).to(tl.int64)  # of a head-major tensor, head times stride is large
    # Later tiles of a causal sequence see more keys: they start first.
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // HEADS
    sequence, block = _find_tile(ends_q_ptr, num_sequences, tile, BM, SEQUENCES)
    if sequence >= num_sequences:
        return
    q_start = tl.load(ends_q_ptr + sequence)
    num_q = tl.load(ends_q_ptr + sequence + 1) - q_start
    k_start = tl.load(ends_k_ptr + sequence)
    num_k = tl.load(ends_k_ptr + sequence + 1) - k_start
    row = block * BM + tl.arange(0, BM)
    dim = tl.arange(0, BD)
    inside = _inside(row, num_q, dim, D, BD)
    position, first, last = _query_positions(
        slot_ptr, row, block * BM, tl.minimum(block * BM + BM, num_q) - 1, q_start, k_start, num_k - num_q, num_q,
        HAS_SLOTS,
    )  # fmt: skip
    low, full, high = _key_range(first, last, num_k, CAUSAL, WINDOW, BN)
    token = (q_start + row).to(tl.int64)
    q = tl.load(q_ptr + token[:, None] * stride_qt + head * stride_qh + dim[None, :], mask=inside, other=0.0)
    k_base = k_ptr + k_start.to(tl.int64) * stride_kt + (head // GROUP) * stride_kh
    v_base = v_ptr + k_start.to(tl.int64) * stride_vt + (head // GROUP) * stride_vh
    acc = tl.zeros((BM, BD), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    highest = tl.full((BM,), -float("inf"), tl.float32)
    acc, total, highest = _forward_keys(
        acc, total, highest, q, k_base, v_base, stride_kt, stride_vt, low, full, position, num_k, scale * LOG2E,
        D, BD, BN, CAUSAL, WINDOW, False, WIDE, PRECISION,
    )  # fmt: skip
    acc, total, highest = _forward_keys(
        acc, total, highest, q, k_base, v_base, stride_kt, stride_vt, full, high, position, num_k, scale * LOG2E,
        D, BD, BN, CAUSAL, WINDOW, True, WIDE, PRECISION,
    )  # fmt: skip
    lse = (highest + tl.math.log2(total)) * LN2
    out = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    place = (token[:, None] * HEADS + head) * D + dim[None, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + head * num_tokens + token, lse, mask=row < num_q)


@triton.jit
def attention_delta(out_ptr, dout_ptr, delta_ptr, num_rows, num_tokens, HEADS: tl.constexpr, D: tl.constexpr,
                    BD: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """delta = sum(out * dout) of each (token, head): what the softmax's gradient subtracts."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, BD)
    inside = _inside(row, num_rows, dim, D, BD)
    place = row[:, None] * D + dim[None, :]
    out = tl.load(out_ptr + place, mask=inside, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + place, mask=inside, other=0.0).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    tl.store(delta_ptr + (row % HEADS) * num_tokens + row // HEADS, delta, mask=row < num_rows)


@triton.jit
def _count_before(slot_ptr, q_start, num_q, bound_a, bound_b, CHUNK: tl.constexpr):
    """How many of a sequence's query slots are below each bound."""
    below_a = 0
    below_b = 0
    for start in tl.range(0, num_q, CHUNK):
        row = start + tl.arange(0, CHUNK)
        slot = tl.load(slot_ptr + q_start + row, mask=row < num_q, other=2147483647).to(tl.int32)
        below_a += tl.sum((slot < bound_a).to(tl.int32), 0)
        below_b += tl.sum((slot < bound_b).to(tl.int32), 0)
    return below_a, below_b


@triton.jit
def _query_range(
    slot_ptr, q_start, k_start, num_q, shift, key_low, key_high,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HAS_SLOTS: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Queries [low, high) that see keys key_low .. key_high; those from ``full`` on see all of them."""
    low = 0
    high = num_q
    full = 0
    if CAUSAL:
        if HAS_SLOTS:
            low, full = _count_before(slot_ptr, q_start, num_q, k_start + key_low, k_start + key_high, CHUNK)
        else:
            low = tl.minimum(tl.maximum(key_low - shift, 0), num_q)
            full = tl.minimum(tl.maximum(key_high - shift, 0), num_q)
        low = low // BM * BM
        full = tl.minimum((full + BM - 1) // BM * BM, tl.cdiv(num_q, BM) * BM)
    if WINDOW > 0:
        beyond = key_high + WINDOW
        if HAS_SLOTS:
            high, _ = _count_before(slot_ptr, q_start, num_q, k_start + beyond, k_start + beyond, CHUNK)
        else:
            high = tl.minimum(tl.maximum(beyond - shift, 0), num_q)
        full = tl.maximum(tl.cdiv(high, BM) * BM, low)
    return low, full, high


@triton.jit
def _backward_queries(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, slot_ptr, stride_q, stride_do, low, high, num_q, shift, k_start,
    key, num_k, scale,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    HAS_SLOTS: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what queries [low, high) of one head give to dK and dV of a tile of keys."""
    dim = tl.arange(0, BD)
    for start in tl.range(low, high, BM):
        row = start + tl.arange(0, BM)
        inside = _inside(row, num_q, dim, D, BD)
        at = row.to(tl.int64) if WIDE else row
        q = tl.load(q_ptr + at[:, None] * stride_q + dim[None, :], mask=inside, other=0.0)
        dout = tl.load(dout_ptr + at[:, None] * stride_do + dim[None, :], mask=inside, other=0.0)
        lse = tl.load(lse_ptr + row, mask=row < num_q, other=0.0)
        delta = tl.load(delta_ptr + row, mask=row < num_q, other=0.0)
        score = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
        weight = tl.math.exp2(score - (lse * LOG2E)[None, :])
        if MASKED:
            if HAS_SLOTS:
                position = tl.load(slot_ptr + row, mask=row < num_q, other=0).to(tl.int32) - k_start
            else:
                position = row + shift
            seen = _visible(position[None, :], key[:, None], num_k, CAUSAL, WINDOW)
            weight = tl.where(seen & (row[None, :] < num_q), weight, 0.0)
        dv = tl.dot(weight.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dweight = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        dscore = weight * (dweight - delta[None, :])
        dk = tl.dot(dscore.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def attention_dkdv(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, ends_q_ptr, ends_k_ptr, slot_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, num_sequences, num_tokens, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, HAS_SLOTS: tl.constexpr, SEQUENCES: tl.constexpr, CHUNK: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    kv_head = (tl.program_id(0) % (HEADS // GROUP)).to(tl.int64)
    sequence, block = _find_tile(ends_k_ptr, num_sequences, tl.program_id(0) // (HEADS // GROUP), BN, SEQUENCES)
    if sequence >= num_sequences:
        return
    q_start = tl.load(ends_q_ptr + sequence)
    num_q = tl.load(ends_q_ptr + sequence + 1) - q_start
    k_start = tl.load(ends_k_ptr + sequence)
    num_k = tl.load(ends_k_ptr + sequence + 1) - k_start
    shift = num_k - num_q
    key = block * BN + tl.arange(0, BN)
    dim = tl.arange(0, BD)
    inside = _inside(key, num_k, dim, D, BD)
    token = (k_start + key).to(tl.int64)
    low, full, high = _query_range(
        slot_ptr, q_start, k_start, num_q, shift, block * BN, tl.minimum(block * BN + BN, num_k) - 1,
        CAUSAL, WINDOW, HAS_SLOTS, BM, CHUNK,
    )  # fmt: skip
    k = tl.load(k_ptr + token[:, None] * stride_kt + kv_head * stride_kh + dim[None, :], mask=inside, other=0.0)
    v = tl.load(v_ptr + token[:, None] * stride_vt + kv_head * stride_vh + dim[None, :], mask=inside, other=0.0)
    dk = tl.zeros((BN, BD), tl.float32)
    dv = tl.zeros((BN, BD), tl.float32)
    first_q = q_start.to(tl.int64)
    for member in tl.range(0, GROUP):
        head = kv_head * GROUP + member
        q_base = q_ptr + first_q * stride_qt + head * stride_qh
        dout_base = dout_ptr + (first_q * HEADS + head) * D
        rows = head * num_tokens + first_q
        if CAUSAL:
            dk, dv = _backward_queries(
                dk, dv, k, v, q_base, dout_base, lse_ptr + rows, delta_ptr + rows, slot_ptr + first_q, stride_qt,
                HEADS * D, low, tl.minimum(full, high), num_q, shift, k_start, key, num_k, scale,
                D, BD, BM, CAUSAL, WINDOW, HAS_SLOTS, True, WIDE, PRECISION,
            )  # fmt: skip
        dk, dv = _backward_queries(
            dk, dv, k, v, q_base, dout_base, lse_ptr + rows, delta_ptr + rows, slot_ptr + first_q, stride_qt,
            HEADS * D, full, high, num_q, shift, k_start, key, num_k, scale,
            D, BD, BM, CAUSAL, WINDOW, HAS_SLOTS, False, WIDE, PRECISION,
        )  # fmt: skip
    place = (token[:, None] * (HEADS // GROUP) + kv_head) * D + dim[None, :]
    tl.store(dk_ptr + place, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + place, dv.to(dv_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_keys(
    dq, q, dout, lse, delta, k_ptr, v_ptr, stride_k, stride_v, low, high, position, num_k, scale,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    MASKED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what keys [low, high) give to dQ of a tile of queries."""
    dim = tl.arange(0, BD)
    for start in tl.range(low, high, BN):
        key = start + tl.arange(0, BN)
        there = _inside(key, num_k, dim, D, BD)
        at = key.to(tl.int64) if WIDE else key
        k = tl.load(k_ptr + at[:, None] * stride_k + dim[None, :], mask=there, other=0.0)
        v = tl.load(v_ptr + at[:, None] * stride_v + dim[None, :], mask=there, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        weight = tl.math.exp2(score - lse[:, None])
        if MASKED:
            weight = tl.where(_visible(position[:, None], key[None, :], num_k, CAUSAL, WINDOW), weight, 0.0)
        dscore = weight * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(dscore.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def attention_dq(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, ends_q_ptr, ends_k_ptr, slot_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, num_sequences, num_tokens, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, HAS_SLOTS: tl.constexpr, SEQUENCES: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) % HEADS).to(tl.int64)  # of a head-major tensor, head times stride is large
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // HEADS
    sequence, block = _find_tile(ends_q_ptr, num_sequences, tile, BM, SEQUENCES)
    if sequence >= num_sequences:
        return
    q_start = tl.load(ends_q_ptr + sequence)
    num_q = tl.load(ends_q_ptr + sequence + 1) - q_start
    k_start = tl.load(ends_k_ptr + sequence)
    num_k = tl.load(ends_k_ptr + sequence + 1) - k_start
    row = block * BM + tl.arange(0, BM)
    dim = tl.arange(0, BD)
    inside = _inside(row, num_q, dim, D, BD)
    position, first, last = _query_positions(
        slot_ptr, row, block * BM, tl.minimum(block * BM + BM, num_q) - 1, q_start, k_start, num_k - num_q, num_q,
        HAS_SLOTS,
    )  # fmt: skip
    low, full, high = _key_range(first, last, num_k, CAUSAL, WINDOW, BN)
    token = (q_start + row).to(tl.int64)
    place = (token[:, None] * HEADS + head) * D + dim[None, :]
    q = tl.load(q_ptr + token[:, None] * stride_qt + head * stride_qh + dim[None, :], mask=inside, other=0.0)
    dout = tl.load(dout_ptr + place, mask=inside, other=0.0)
    rows = head * num_tokens + token
    lse = tl.load(lse_ptr + rows, mask=row < num_q, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + rows, mask=row < num_q, other=0.0)
    k_base = k_ptr + k_start.to(tl.int64) * stride_kt + (head // GROUP) * stride_kh
    v_base = v_ptr + k_start.to(tl.int64) * stride_vt + (head // GROUP) * stride_vh
    dq = tl.zeros((BM, BD), tl.float32)
    dq = _backward_keys(
        dq, q, dout, lse, delta, k_base, v_base, stride_kt, stride_vt, low, full, position, num_k, scale,
        D, BD, BN, CAUSAL, WINDOW, False, WIDE, PRECISION,
    )  # fmt: skip
    dq = _backward_keys(
        dq, q, dout, lse, delta, k_base, v_base, stride_kt, stride_vt, full, high, position, num_k, scale,
        D, BD, BN, CAUSAL, WINDOW, True, WIDE, PRECISION,
    )  # fmt: skip
    tl.store(dq_ptr + place, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit
def decode_split(
    q_ptr, k_ptr, v_ptr, length_ptr, part_ptr, lse_ptr, stride_qr, stride_qh, stride_kr, stride_ks, stride_kh,
    stride_vr, stride_vs, stride_vh, num_splits, capacity, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, MEMBERS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    WINDOW: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """All query heads of one key head of one row, against CHUNK keys of the cache."""
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    num_k = tl.minimum(tl.load(length_ptr + row), capacity).to(tl.int32)  # never read the next row's cache
    member = tl.arange(0, MEMBERS)
    dim = tl.arange(0, BD)
    inside = _inside(member, GROUP, dim, D, BD)
    head = kv_head * GROUP + member
    q = tl.load(q_ptr + row * stride_qr + head[:, None] * stride_qh + dim[None, :], mask=inside, other=0.0)
    acc = tl.zeros((MEMBERS, BD), tl.float32)
    total = tl.zeros((MEMBERS,), tl.float32)
    highest = tl.full((MEMBERS,), -float("inf"), tl.float32)
    low = split * CHUNK
    if WINDOW > 0:
        low = tl.maximum(low, (num_k - WINDOW) // BN * BN)
    acc, total, highest = _forward_keys(
        acc, total, highest, q, k_ptr + row * stride_kr + kv_head * stride_kh,
        v_ptr + row * stride_vr + kv_head * stride_vh, stride_ks, stride_vs, low,
        tl.minimum(split * CHUNK + CHUNK, num_k), tl.full((MEMBERS,), 0, tl.int32) + num_k - 1, num_k, scale * LOG2E,
        D, BD, BN, False, WINDOW, True, WIDE, PRECISION,
    )  # fmt: skip
    place = (row * (KV_HEADS * GROUP) + head) * num_splits + split
    tl.store(
        part_ptr + place[:, None] * D + dim[None, :], acc / tl.where(total > 0.0, total, 1.0)[:, None], mask=inside
    )
    tl.store(lse_ptr + place, highest + tl.math.log2(total), mask=member < GROUP)


@triton.jit
def decode_combine(
    part_ptr, lse_ptr, out_ptr, num_splits, D: tl.constexpr, BD: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """The parts of one head of one row, weighted by their sums of exponentials."""
    row = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, BD)
    split = tl.arange(0, SPLITS)
    lse = tl.load(lse_ptr + row * num_splits + split, mask=split < num_splits, other=-float("inf"))
    highest = tl.max(lse, 0)
    weight = tl.math.exp2(lse - tl.where(highest == -float("inf"), 0.0, highest))
    total = tl.sum(weight, 0)
    inside = _inside(split, num_splits, dim, D, BD)
    part = tl.load(part_ptr + (row * num_splits + split[:, None]) * D + dim[None, :], mask=inside, other=0.0)
    out = tl.sum(part * weight[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out_ptr + row * D + dim, out.to(out_ptr.dtype.element_ty), mask=dim < D)


def _check(q: Tensor, *others: Tensor) -> None:
    if not 0 < q.shape[-1] <= MAX_HEAD_DIM:
        raise NotImplementedError(f"the Triton attention takes head sizes up to {MAX_HEAD_DIM}, got {q.shape[-1]}")
    if q.dtype == torch.float64:
        raise NotImplementedError("the Triton attention takes fp16, bf16 and fp32, not fp64")


def block_dim(dim: int) -> int:
    """Channels of a head's tile: a power of two, as tiles must be, and no smaller than a tl.dot takes."""
    return max(16, triton.next_power_of_2(dim))


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _int32(ends: Tensor) -> Tensor:
    """Sequence ends as the kernels are compiled for: 64 bits would cost registers."""
    return ends.to(torch.int32).contiguous()


def _num_tiles(ends: Sequence[int] | None, total: int, num_sequences: int, block: int) -> int:
    """Tiles of a pack: exact where the ends are on the host, else an upper bound."""
    if ends is None:
        return triton.cdiv(total, block) + num_sequences
    return sum(triton.cdiv(b - a, block) for a, b in itertools.pairwise(ends))


def _equal(ends: Sequence[int] | None) -> bool:
    """Whether the ends are known on the host and all sequences have one length."""
    return ends is not None and len(ends) > 1 and len({b - a for a, b in itertools.pairwise(ends)}) == 1


def _meta(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, slots: Tensor | None, causal: bool, window: int
) -> dict[str, object]:
    dim = q.shape[2]
    return {
        "HEADS": q.shape[1],
        "GROUP": q.shape[1] // k.shape[1],
        "D": dim,
        "BD": block_dim(dim),
        "CAUSAL": causal,
        "WINDOW": window,
        "HAS_SLOTS": slots is not None,
        "SEQUENCES": max(16, triton.next_power_of_2(cu_q.shape[0] - 1)),
        "WIDE": max(x.shape[0] * max(x.stride(0), x.shape[1] * dim) for x in (q, k, v)) >= WIDE_FROM,
        "PRECISION": _precision(q),
    }


def _precision(q: Tensor) -> str:
    return "ieee" if q.dtype == torch.float32 else "tf32"


def _table(kernel: str, q: Tensor) -> Mapping[str, int]:
    key = f"{q.shape[-1]}/fp32" if q.dtype == torch.float32 else str(q.shape[-1])
    return configs.config(kernel, key, q.device)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    slots: Tensor | None,
    ends_q: Sequence[int] | None,
    ends_k: Sequence[int] | None,
    scale: float,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor]:
    """out [T, H, D] and lse [H, T]; the arguments of ``zj::attention``."""
    _check(q, k, v)
    q, k, v = _unit(q), _unit(k), _unit(v)
    cu_q, cu_k, slots = _int32(cu_q), _int32(cu_k), None if slots is None else slots.contiguous()
    num_tokens, heads, _ = q.shape
    rows = cu_q.shape[0] - 1
    even = Registry.dense != "portable" and slots is None and window == 0 and _equal(ends_q) and _equal(ends_k)
    if even and (form := dense.form_of(q, k, v, rows, causal)) is not None:
        return form(q, k, v, rows, scale, causal)
    out = q.new_empty(q.shape)
    lse = q.new_empty((heads, num_tokens), dtype=torch.float32)
    config = _table("attention_forward", q)
    launch(
        attention_forward, (heads * _num_tiles(ends_q, num_tokens, cu_q.shape[0] - 1, config["BM"]),),
        q, k, v, out, lse, cu_q, cu_k, cu_q if slots is None else slots, q.stride(0), q.stride(1), k.stride(0),
        k.stride(1), v.stride(0), v.stride(1), cu_q.shape[0] - 1, num_tokens, scale,
        **_meta(q, k, v, cu_q, slots, causal, window), **config,
    )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    slots: Tensor | None,
    ends_q: Sequence[int] | None,
    ends_k: Sequence[int] | None,
    scale: float,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v: one kernel for delta, one for dK and dV, one for dQ."""
    q, k, v, dout = _unit(q), _unit(k), _unit(v), dout.contiguous()
    cu_q, cu_k, slots = _int32(cu_q), _int32(cu_k), None if slots is None else slots.contiguous()
    num_tokens, heads, dim = q.shape
    delta = torch.empty_like(lse)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    config = configs.config("attention_delta", "", q.device)
    launch(
        attention_delta, (triton.cdiv(num_tokens * heads, config["ROWS"]),), out, dout, delta, num_tokens * heads,
        num_tokens, HEADS=heads, D=dim, BD=block_dim(dim), **config,
    )  # fmt: skip
    sequences = cu_q.shape[0] - 1
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1))
    slot = cu_q if slots is None else slots
    meta = _meta(q, k, v, cu_q, slots, causal, window)
    config = _table("attention_dkdv", q)
    launch(
        attention_dkdv, (k.shape[1] * _num_tiles(ends_k, k.shape[0], sequences, config["BN"]),),
        q, k, v, dout, lse, delta, dk, dv, cu_q, cu_k, slot, *strides, sequences, num_tokens, scale,
        CHUNK=SLOT_CHUNK, **meta, **config,
    )  # fmt: skip
    config = _table("attention_dq", q)
    launch(
        attention_dq, (heads * _num_tiles(ends_q, num_tokens, sequences, config["BM"]),),
        q, k, v, dout, lse, delta, dq, cu_q, cu_k, slot, *strides, sequences, num_tokens, scale, **meta, **config,
    )  # fmt: skip
    return dq, dk, dv


def decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float, window: int) -> Tensor:
    """[R, H, D]; the arguments of ``decode_attention``."""
    _check(q, k_cache, v_cache)
    q, k, v = _unit(q), _unit(k_cache), _unit(v_cache)
    rows, heads, dim = q.shape
    kv_heads = k.shape[2]
    config = _table("decode_split", q)
    splits = max(triton.cdiv(k.shape[1], config["CHUNK"]), 1)
    part = q.new_empty((rows, heads, splits, dim), dtype=torch.float32)
    lse = q.new_empty((rows, heads, splits), dtype=torch.float32)
    out = q.new_empty(q.shape)
    launch(
        decode_split, (rows, kv_heads, splits),
        q, k, v, lengths.contiguous(), part, lse, q.stride(0), q.stride(1), *k.stride()[:3], *v.stride()[:3], splits,
        k.shape[1], scale, KV_HEADS=kv_heads, GROUP=heads // kv_heads,
        MEMBERS=max(16, triton.next_power_of_2(heads // kv_heads)), D=dim, BD=block_dim(dim), WINDOW=window,
        WIDE=max(x.shape[1] * x.stride(1) for x in (k, v)) >= WIDE_FROM, PRECISION=_precision(q), **config,
    )  # fmt: skip
    launch(
        decode_combine, (rows * heads,), part, lse, out, splits, D=dim, BD=block_dim(dim),
        SPLITS=triton.next_power_of_2(splits), **configs.config("decode_combine", "", q.device),
    )  # fmt: skip
    return out
