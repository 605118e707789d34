"""Attention forward for dense batches: every sequence has one length, so a tile of keys is one bulk copy (sm_90).

Two forms beside the portable kernel, which ``dispatch.use_dense`` turns on; that one stays the default until all have
been timed on a device.

``tma``: descriptors made on the host; rows past a sequence's end arrive as zeros, and addresses leave the registers.
``specialized``: some warps only copy, the others only compute.  Triton's compiler takes one shape of it: descriptors
of two dimensions made in the kernel, one loop, and a mask on every tile (docs/kernels.md has the others).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import configs
from kernels.dispatch import Registry, launch

HEAD_DIMS = (64, 128)
SPECIALIZES = ("3.6.", "3.7.", "3.9.")  # Triton versions whose compiler was seen to make it, without spills
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

Form = Callable[[Tensor, Tensor, Tensor, int, float, bool], tuple[Tensor, Tensor]]


@triton.jit
def _masked(score, start, position, num_k, CAUSAL: tl.constexpr, BN: tl.constexpr):
    key = start + tl.arange(0, BN)
    seen = key[None, :] < num_k
    if CAUSAL:
        seen = seen & (key[None, :] <= position[:, None])
    return tl.where(seen, score, -1.0e30)


@triton.jit
def _weights(score, total, highest):
    """One step of the online softmax: weights, the factor for what was summed before, sum and maximum."""
    higher = tl.maximum(highest, tl.max(score, 1))
    weight = tl.math.exp2(score - higher[:, None])
    rescale = tl.math.exp2(highest - higher)
    return weight, rescale, total * rescale + tl.sum(weight, 1), higher


@triton.jit
def _dense_keys(
    acc, total, highest, q, k_desc, v_desc, batch, kv_head, low, high, position, num_k, scale,
    D: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for start in tl.range(low, high, BN):
        k = k_desc.load([batch, start, kv_head, 0]).reshape(BN, D)
        score = tl.dot(q, k.T) * scale
        if MASKED:
            score = _masked(score, start, position, num_k, CAUSAL, BN)
        weight, rescale, total, highest = _weights(score, total, highest)
        acc = acc * rescale[:, None]
        v = v_desc.load([batch, start, kv_head, 0]).reshape(BN, D)
        acc = tl.dot(weight.to(v.dtype), v, acc)
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


@triton.jit
def attention_forward_specialized(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, stride_q, stride_k, stride_v, num_q, num_k, num_tokens, num_keys, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    q_desc = tl.make_tensor_descriptor(q_ptr, [num_tokens, HEADS * D], [stride_q, 1], [BM, D])
    k_desc = tl.make_tensor_descriptor(k_ptr, [num_keys, HEADS // GROUP * D], [stride_k, 1], [BN, D])
    v_desc = tl.make_tensor_descriptor(v_ptr, [num_keys, HEADS // GROUP * D], [stride_v, 1], [BN, D])
    head = tl.program_id(0) % HEADS
    batch = tl.program_id(0) // HEADS
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    row = tile * BM + tl.arange(0, BM)
    position = row + (num_k - num_q)
    q = q_desc.load([batch * num_q + tile * BM, head * D])
    acc = tl.zeros((BM, D), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    highest = tl.full((BM,), -1.0e30, tl.float32)
    high = tl.minimum(num_k, tile * BM + BM + num_k - num_q) if CAUSAL else num_k
    for start in tl.range(0, high, BN, warp_specialize=True):
        k = k_desc.load([batch * num_k + start, (head // GROUP) * D])
        score = _masked(tl.dot(q, k.T) * (scale * LOG2E), start, position, num_k, CAUSAL, BN)
        weight, rescale, total, highest = _weights(score, total, highest)
        acc = acc * rescale[:, None]
        v = v_desc.load([batch * num_k + start, (head // GROUP) * D])
        acc = tl.dot(weight.to(v.dtype), v, acc)
    token = batch.to(tl.int64) * num_q + row
    place = (token[:, None] * HEADS + head) * D + tl.arange(0, D)[None, :]
    out = acc / total[:, None]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=row[:, None] < num_q)
    lse = (highest + tl.math.log2(total)) * LN2
    tl.store(lse_ptr + head.to(tl.int64) * num_tokens + token, lse, mask=row < num_q)


def form_of(q: Tensor, k: Tensor, v: Tensor, rows: int, causal: bool) -> Form | None:
    """The asked form if it takes these tensors ([tokens, heads, D], ``rows`` sequences) on this device; else None."""
    capability = (9, 0) if not q.is_cuda else torch.cuda.get_device_capability(q.device)  # the interpreter imitates it
    if capability < (9, 0) or not _takes(q, k, v, q.shape[0] // rows, k.shape[0] // rows, causal):
        return None
    if Registry.dense == "tma":
        return forward
    known = capability[0] == 9 and triton.__version__.startswith(SPECIALIZES)
    together = all(x.stride(1) == x.shape[2] for x in (q, k, v))
    # A last tile of keys would reach into the next sequence: its weights are 0, but 0 times an infinity is NaN.
    whole = rows == 1 or (k.shape[0] // rows) % _blocks("attention_forward_specialized", q)["BN"] == 0
    return forward_specialized if known and together and whole else None


def _takes(q: Tensor, k: Tensor, v: Tensor, num_q: int, num_k: int, causal: bool) -> bool:
    """What any descriptor needs: 16 bits, alignment to 16 bytes; and every query sees a key."""
    aligned = all(
        x.data_ptr() % 16 == 0 and x.stride(2) == 1 and all(s * x.element_size() % 16 == 0 for s in x.stride()[:2])
        for x in (q, k, v)
    )
    sized = q.dtype in (torch.float16, torch.bfloat16) and q.shape[2] in HEAD_DIMS
    return aligned and sized and num_q > 0 and num_k > 0 and (not causal or num_q <= num_k)


def _blocks(kernel: str, q: Tensor) -> configs.Config:
    return configs.config(kernel, str(q.shape[2]), q.device)


def forward(q: Tensor, k: Tensor, v: Tensor, rows: int, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """out [tokens, H, D] and lse [H, tokens] of ``rows`` sequences of equal length."""
    tokens, heads, dim = q.shape
    num_q, num_k = tokens // rows, k.shape[0] // rows
    config = _blocks("attention_forward_dense", q)
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


def forward_specialized(
    q: Tensor, k: Tensor, v: Tensor, rows: int, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """The same; the warps of a program are specialised."""
    tokens, heads, dim = q.shape
    config = _blocks("attention_forward_specialized", q)
    out = q.new_empty(q.shape)
    lse = q.new_empty((heads, tokens), dtype=torch.float32)
    triton.set_allocator(_scratch)  # the descriptors made in the kernel live in device memory
    launch(
        attention_forward_specialized, (rows * heads, triton.cdiv(tokens // rows, config["BM"])),
        q, k, v, out, lse, q.stride(0), k.stride(0), v.stride(0), tokens // rows, k.shape[0] // rows, tokens,
        k.shape[0], scale, HEADS=heads, GROUP=heads // k.shape[1], D=dim, CAUSAL=causal, **config,
    )  # fmt: skip
    return out, lse


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")
