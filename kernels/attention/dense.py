"""Attention forward for dense batches through TMA descriptors (sm_90 and newer).

Every sequence has one length, so a tile of keys is one bulk copy, rows past the end arrive as zeros, and the addresses
leave the registers.  ``dispatch.use_tma`` turns it on: the portable kernel stays the default until both have been
timed on a device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import configs
from kernels.dispatch import launch

HEAD_DIMS = (64, 128)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _dense_keys(
    acc, total, highest, q, k_desc, v_desc, batch, kv_head, low, high, position, num_k, scale,
    D: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for start in tl.range(low, high, BN):
        k = k_desc.load([batch, start, kv_head, 0]).reshape(BN, D)
        score = tl.dot(q, k.T) * scale
        if MASKED:
            key = start + tl.arange(0, BN)
            seen = key[None, :] < num_k
            if CAUSAL:
                seen = seen & (key[None, :] <= position[:, None])
            score = tl.where(seen, score, -1.0e30)
        higher = tl.maximum(highest, tl.max(score, 1))
        weight = tl.math.exp2(score - higher[:, None])
        rescale = tl.math.exp2(highest - higher)
        total = total * rescale + tl.sum(weight, 1)
        acc = acc * rescale[:, None]
        v = v_desc.load([batch, start, kv_head, 0]).reshape(BN, D)
        acc = tl.dot(weight.to(v.dtype), v, acc)
        highest = higher
    return acc, total, highest


@triton.jit
def attention_forward_dense(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, num_q, num_k, num_tokens, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % HEADS
    batch = tl.program_id(0) // HEADS
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    row = tile * BM + tl.arange(0, BM)
    position = row + (num_k - num_q)
    q = q_desc.load([batch, tile * BM, head, 0]).reshape(BM, D)
    acc = tl.zeros((BM, D), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    highest = tl.full((BM,), -1.0e30, tl.float32)
    high = tl.minimum(num_k, tile * BM + BM + num_k - num_q) if CAUSAL else num_k
    full = (tl.minimum(tile * BM + 1 + num_k - num_q, num_k) if CAUSAL else num_k) // BN * BN
    acc, total, highest = _dense_keys(
        acc, total, highest, q, k_desc, v_desc, batch, head // GROUP, 0, full, position, num_k, scale * LOG2E,
        D, BN, CAUSAL, False,
    )  # fmt: skip
    acc, total, highest = _dense_keys(
        acc, total, highest, q, k_desc, v_desc, batch, head // GROUP, full, high, position, num_k, scale * LOG2E,
        D, BN, CAUSAL, True,
    )  # fmt: skip
    out = acc / total[:, None]
    out_desc.store([batch, tile * BM, head, 0], out.to(out_desc.dtype).reshape(1, BM, 1, D))
    lse = (highest + tl.math.log2(total)) * LN2
    place = head.to(tl.int64) * num_tokens + batch.to(tl.int64) * num_q + row
    tl.store(lse_ptr + place, lse, mask=row < num_q)


def takes(q: Tensor, k: Tensor, v: Tensor, num_q: int, num_k: int, causal: bool) -> bool:
    """Whether these tensors ([tokens, heads, D]) can go through descriptors: 16-bit, aligned, no blind queries."""
    aligned = all(
        x.data_ptr() % 16 == 0 and x.stride(2) == 1 and all(s * x.element_size() % 16 == 0 for s in x.stride()[:2])
        for x in (q, k, v)
    )
    sized = q.dtype in (torch.float16, torch.bfloat16) and q.shape[2] in HEAD_DIMS
    return aligned and sized and num_q > 0 and num_k > 0 and (not causal or num_q <= num_k)


def forward(q: Tensor, k: Tensor, v: Tensor, rows: int, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """out [tokens, H, D] and lse [H, tokens] of ``rows`` sequences of equal length."""
    tokens, heads, dim = q.shape
    num_q, num_k = tokens // rows, k.shape[0] // rows
    config = configs.config("attention_forward_dense", str(dim), q.device)
    out = q.new_empty(q.shape)
    lse = q.new_empty((heads, tokens), dtype=torch.float32)

    def describe(x: Tensor, length: int, block: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(x.unflatten(0, (rows, length)), [1, block, 1, dim])

    launch(
        attention_forward_dense, (rows * heads, triton.cdiv(num_q, config["BM"])),
        describe(q, num_q, config["BM"]), describe(k, num_k, config["BN"]), describe(v, num_k, config["BN"]),
        describe(out, num_q, config["BM"]), lse, num_q, num_k, tokens, scale,
        HEADS=heads, GROUP=heads // k.shape[1], D=dim, CAUSAL=causal, **config,
    )  # fmt: skip
    return out, lse
