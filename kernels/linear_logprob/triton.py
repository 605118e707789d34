"""The log-prob head in Triton.

Forward: a program multiplies a tile of tokens with a range of vocabulary rows and keeps three running numbers a
token (maximum m, sum of exp(z - m), sum of exp(z - m) (z - m)); the ranges are combined afterwards.
Backward: for ``CHUNK_ROWS`` vocabulary rows at a time one kernel computes the logits again and writes their
gradients [T, CHUNK_ROWS] in the input's dtype; two library GEMMs turn them into gradients of weight and hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import configs
from kernels.dispatch import launch
from kernels.guards import without_autocast

CHUNK_ROWS = 8192  # vocabulary rows whose logit gradients exist at once
PROGRAMS = 1056  # forward programs aimed at: 8 waves of 132 multiprocessors


@triton.jit
def _logits(
    hidden_ptr, weight_ptr, token, vocab, num_tokens, num_rows, width, stride_h, stride_w,
    BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """hidden @ weight.T of one tile, fp32."""
    acc = tl.zeros((BT, BV), tl.float32)
    dim = tl.arange(0, BD)
    hidden_row = hidden_ptr + token.to(tl.int64)[:, None] * stride_h + dim[None, :]
    weight_row = weight_ptr + vocab.to(tl.int64)[None, :] * stride_w + dim[:, None]
    for start in tl.range(0, width, BD):
        left = width - start
        hidden = tl.load(hidden_row + start, mask=(token[:, None] < num_tokens) & (dim[None, :] < left), other=0.0)
        weight = tl.load(weight_row + start, mask=(vocab[None, :] < num_rows) & (dim[:, None] < left), other=0.0)
        acc = tl.dot(hidden, weight.to(hidden.dtype), acc, input_precision=PRECISION)
    return acc


@triton.jit
def logprob_forward(
    hidden_ptr, weight_ptr, target_ptr, highest_ptr, total_ptr, picked_ptr, spread_ptr, num_tokens, num_rows, width,
    rows_each, vocab_start, stride_h, stride_w, inverse_temperature,
    ENTROPY: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    split = tl.program_id(1)
    target = tl.load(target_ptr + token, mask=token < num_tokens, other=0) - vocab_start
    highest = tl.full((BT,), -float("inf"), tl.float32)
    total = tl.zeros((BT,), tl.float32)
    moment = tl.zeros((BT,), tl.float32)
    picked = tl.zeros((BT,), tl.float32)
    first = split * rows_each
    last = tl.minimum(first + rows_each, num_rows)
    for start in tl.range(first, last, BV):
        vocab = start + tl.arange(0, BV)
        acc = _logits(
            hidden_ptr, weight_ptr, token, vocab, num_tokens, num_rows, width, stride_h, stride_w, BT, BV, BD, PRECISION
        )
        real = vocab[None, :] < last
        logit = tl.where(real, acc * inverse_temperature, -float("inf"))
        higher = tl.maximum(highest, tl.max(logit, 1))
        share = tl.exp(logit - higher[:, None])
        rescale = tl.exp(highest - higher)
        if ENTROPY:
            rise = tl.where(highest == -float("inf"), 0.0, higher - highest)
            gained = tl.sum(tl.where(real, share * (logit - higher[:, None]), 0.0), 1)
            moment = (moment - rise * total) * rescale + gained
        total = total * rescale + tl.sum(share, 1)
        hit = real & (vocab[None, :] == target[:, None])
        picked += tl.sum(tl.where(hit, logit, 0.0), 1)
        highest = higher
    place = split.to(tl.int64) * num_tokens + token
    tl.store(highest_ptr + place, highest, mask=token < num_tokens)
    tl.store(total_ptr + place, total, mask=token < num_tokens)
    tl.store(picked_ptr + place, picked, mask=token < num_tokens)
    if ENTROPY:
        tl.store(spread_ptr + place, tl.log(total) - moment / total, mask=token < num_tokens)


@triton.jit
def logprob_dlogits(
    hidden_ptr, weight_ptr, target_ptr, mask_ptr, lse_ptr, spread_ptr, dlse_ptr, dpicked_ptr, dspread_ptr, dlogit_ptr,
    num_tokens, num_rows, width, first_row, stride_h, stride_w, stride_d, vocab_start, inverse_temperature,
    ENTROPY: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    column = tl.program_id(1) * BV + tl.arange(0, BV)
    vocab = first_row + column
    here = token < num_tokens
    acc = _logits(
        hidden_ptr, weight_ptr, token, vocab, num_tokens, num_rows, width, stride_h, stride_w, BT, BV, BD, PRECISION
    )
    logit = acc * inverse_temperature
    lse = tl.load(lse_ptr + token, mask=here, other=0.0)
    slope = tl.load(dlse_ptr + token, mask=here, other=0.0)[:, None]
    if ENTROPY:
        spread = tl.load(spread_ptr + token, mask=here, other=0.0)
        dspread = tl.load(dspread_ptr + token, mask=here, other=0.0)
        slope = slope - dspread[:, None] * (logit - lse[:, None] + spread[:, None])
    dlogit = tl.exp(logit - lse[:, None]) * slope
    target = tl.load(target_ptr + token, mask=here, other=0) - vocab_start
    dpicked = tl.load(dpicked_ptr + token, mask=here, other=0.0)
    dlogit += tl.where(vocab[None, :] == target[:, None], dpicked[:, None], 0.0)
    if HAS_MASK:
        kept = tl.load(mask_ptr + token, mask=here, other=0) != 0
        dlogit = tl.where(kept[:, None], dlogit, 0.0)
    dlogit *= inverse_temperature
    place = token.to(tl.int64)[:, None] * stride_d + column[None, :]
    inside = here[:, None] & (column[None, :] < stride_d)
    tl.store(dlogit_ptr + place, dlogit.to(dlogit_ptr.dtype.element_ty), mask=inside)


def _rows(x: Tensor, name: str) -> Tensor:
    if x.dtype == torch.float64:
        raise NotImplementedError(f"the Triton log-prob head takes fp16, bf16 and fp32, {name} is fp64")
    return x if x.stride(1) == 1 else x.contiguous()


def _precision(hidden: Tensor) -> str:
    return "ieee" if hidden.dtype == torch.float32 else "tf32"


def _table(kernel: str, hidden: Tensor) -> configs.Config:
    return configs.config(kernel, "fp32" if hidden.dtype == torch.float32 else "", hidden.device)


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    vocab_start: int,
    valid_rows: int,
    temperature: float,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """lse, target logit and entropy of each token, [T] fp32; the arguments of ``zj::linear_logprob``."""
    hidden, weight = _rows(hidden, "hidden"), _rows(weight, "weight")
    num_tokens, width = hidden.shape
    config = _table("logprob_forward", hidden)
    blocks = triton.cdiv(num_tokens, config["BT"])
    splits = max(min(triton.cdiv(valid_rows, config["BV"]), triton.cdiv(PROGRAMS, max(blocks, 1))), 1)
    rows_each = triton.cdiv(triton.cdiv(valid_rows, splits), config["BV"]) * config["BV"]
    splits = triton.cdiv(valid_rows, rows_each) if valid_rows else 0
    highest, total, picked = (hidden.new_empty((splits, num_tokens), dtype=torch.float32) for _ in range(3))
    spread = torch.empty_like(total) if entropy else total
    launch(
        logprob_forward, (blocks, splits),
        hidden, weight, targets.contiguous(), highest, total, picked, spread, num_tokens, valid_rows, width, rows_each,
        vocab_start, hidden.stride(0), weight.stride(0), 1.0 / temperature, ENTROPY=entropy,
        PRECISION=_precision(hidden), **config,
    )  # fmt: skip
    lse, average = _whole(highest, total, spread if entropy else None)
    target = picked.sum(0)
    if mask is not None:
        lse, target, average = (x.masked_fill(~mask, 0.0) for x in (lse, target, average))
    return lse, target, average


def _whole(highest: Tensor, total: Tensor, spread: Tensor | None) -> tuple[Tensor, Tensor]:
    """lse and entropy, [T], of all ranges from each one's maximum, sum and entropy, [ranges, T].

    Shares come from differences of maxima, not of two lse: a large lse has lost the digits that entropy needs.
    """
    if not highest.shape[0]:
        nothing = torch.zeros_like(highest.sum(0))
        return nothing - torch.inf, nothing
    top = highest.amax(0)
    scaled = total * torch.exp(highest - top)
    whole = scaled.sum(0)
    lse = top + torch.log(whole)
    if spread is None:
        return lse, torch.zeros_like(lse)
    log_share = (highest - top) + torch.log(total) - torch.log(whole)
    return lse, (scaled / whole * (spread - log_share)).sum(0)


@without_autocast
def backward(
    dlse: Tensor,
    dtarget: Tensor,
    dspread: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    spread: Tensor,
    vocab_start: int,
    valid_rows: int,
    temperature: float,
    entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight."""
    hidden, weight = _rows(hidden, "hidden"), _rows(weight, "weight")
    num_tokens, width = hidden.shape
    config = _table("logprob_dlogits", hidden)
    dhidden = torch.zeros((num_tokens, width), dtype=torch.float32, device=hidden.device)
    dweight = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
    buffer = hidden.new_empty((num_tokens, min(CHUNK_ROWS, valid_rows)))
    for first in range(0, valid_rows, CHUNK_ROWS):
        size = min(CHUNK_ROWS, valid_rows - first)
        dlogits = buffer[:, :size] if size == buffer.shape[1] else buffer.flatten()[: num_tokens * size].view(-1, size)
        launch(
            logprob_dlogits, (triton.cdiv(num_tokens, config["BT"]), triton.cdiv(size, config["BV"])),
            hidden, weight, targets.contiguous(), targets if mask is None else mask.contiguous().view(torch.int8), lse,
            spread, dlse, dtarget, dspread, dlogits, num_tokens, valid_rows, width, first, hidden.stride(0),
            weight.stride(0), size, vocab_start, 1.0 / temperature,
            ENTROPY=entropy, HAS_MASK=mask is not None, PRECISION=_precision(hidden), **config,
        )  # fmt: skip
        rows = weight[first : first + size]
        dhidden += torch.mm(dlogits, rows.to(hidden.dtype))
        dweight[first : first + size] = torch.mm(dlogits.t(), hidden)
    return dhidden.to(hidden.dtype), dweight
