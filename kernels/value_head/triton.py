"""The value head in Triton: hidden states are read once forward (with the clipped loss) and once backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import configs
from kernels.dispatch import launch

PARTS = 64  # token ranges of the backward pass: each leaves one partial of the weight gradient


@triton.jit
def value_head_forward(
    hidden_ptr, weight_ptr, bias_ptr, old_ptr, return_ptr, mask_ptr, value_ptr, loss_ptr, clipped_ptr,
    stride_h, num_tokens, width, clip,
    HAS_BIAS: tl.constexpr, HAS_LOSS: tl.constexpr, HAS_CLIP: tl.constexpr, HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = token < num_tokens
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        inside = here[:, None] & (col[None, :] < width)
        hidden = tl.load(hidden_ptr + token[:, None] * stride_h + col[None, :], mask=inside, other=0.0)
        weight = tl.load(weight_ptr + col, mask=col < width, other=0.0)
        total += hidden.to(tl.float32) * weight.to(tl.float32)[None, :]
    value = tl.sum(total, 1)
    if HAS_BIAS:
        value += tl.load(bias_ptr).to(tl.float32)
    tl.store(value_ptr + token, value, mask=here)
    if HAS_LOSS:
        target = tl.load(return_ptr + token, mask=here, other=0.0).to(tl.float32)
        loss = (value - target) * (value - target)
        clipped = token < 0
        if HAS_CLIP:
            old = tl.load(old_ptr + token, mask=here, other=0.0).to(tl.float32)
            near = tl.minimum(tl.maximum(value, old - clip), old + clip)
            other = (near - target) * (near - target)
            clipped = other > loss
            loss = tl.maximum(loss, other)
        if HAS_MASK:
            kept = tl.load(mask_ptr + token, mask=here, other=0) != 0
            clipped = clipped & kept
            loss = tl.where(kept, loss, 0.0)
        tl.store(loss_ptr + token, 0.5 * loss, mask=here)
        tl.store(clipped_ptr + token, clipped.to(tl.int8), mask=here)


@triton.jit
def value_head_backward(
    dout_ptr, hidden_ptr, weight_ptr, value_ptr, return_ptr, mask_ptr, clipped_ptr,
    dhidden_ptr, dweight_ptr, dbias_ptr, stride_h, num_tokens, width, tokens_each,
    HAS_LOSS: tl.constexpr, HAS_MASK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((ROWS,), tl.float32)
    first = part * tokens_each
    for start in tl.range(first, tl.minimum(first + tokens_each, num_tokens), ROWS):
        token = start + tl.arange(0, ROWS).to(tl.int64)
        here = token < num_tokens
        dvalue = tl.load(dout_ptr + token, mask=here, other=0.0).to(tl.float32)
        if HAS_LOSS:
            error = tl.load(value_ptr + token, mask=here, other=0.0) - tl.load(
                return_ptr + token, mask=here, other=0.0
            ).to(tl.float32)
            clipped = tl.load(clipped_ptr + token, mask=here, other=0) != 0
            dvalue = tl.where(clipped, 0.0, dvalue * error)
            if HAS_MASK:
                dvalue = tl.where(tl.load(mask_ptr + token, mask=here, other=0) != 0, dvalue, 0.0)
        inside = here[:, None] & (col[None, :] < width)
        hidden = tl.load(hidden_ptr + token[:, None] * stride_h + col[None, :], mask=inside, other=0.0)
        dweight += tl.sum(hidden.to(tl.float32) * dvalue[:, None], 0)
        dbias += dvalue
        dhidden = dvalue[:, None] * weight[None, :]
        place = token[:, None] * width + col[None, :]
        tl.store(dhidden_ptr + place, dhidden.to(dhidden_ptr.dtype.element_ty), mask=inside)
    tl.store(dweight_ptr + part.to(tl.int64) * width + col, dweight, mask=col < width)
    if tl.program_id(1) == 0:
        tl.store(dbias_ptr + part, tl.sum(dbias, 0))


def _rows(hidden: Tensor) -> Tensor:
    if hidden.dtype == torch.float64:
        raise NotImplementedError("the Triton value head takes fp16, bf16 and fp32, not fp64")
    return hidden if hidden.stride(1) == 1 else hidden.contiguous()


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    old: Tensor | None,
    returns: Tensor | None,
    mask: Tensor | None,
    clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """values, loss and clipped, [T]; the last two are empty without ``returns``."""
    hidden = _rows(hidden)
    num_tokens, width = hidden.shape
    size = num_tokens if returns is not None else 0
    values = hidden.new_empty(num_tokens, dtype=torch.float32)
    loss = hidden.new_empty(size, dtype=torch.float32)
    clipped = hidden.new_empty(size, dtype=torch.bool)
    config = configs.config("value_head_forward", "", hidden.device)
    unused = values
    launch(
        value_head_forward, (triton.cdiv(num_tokens, config["ROWS"]),),
        hidden, weight.contiguous(), unused if bias is None else bias,
        unused if old is None else old.contiguous(), unused if returns is None else returns.contiguous(),
        unused if mask is None else mask.contiguous().view(torch.int8), values, loss, clipped.view(torch.int8),
        hidden.stride(0), num_tokens, width, 0.0 if clip is None else clip,
        HAS_BIAS=bias is not None, HAS_LOSS=returns is not None, HAS_CLIP=clip is not None,
        HAS_MASK=mask is not None, **config,
    )  # fmt: skip
    return values, loss, clipped


def backward(
    dout: Tensor,
    hidden: Tensor,
    weight: Tensor,
    values: Tensor | None,
    returns: Tensor | None,
    mask: Tensor | None,
    clipped: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight [D] and bias [1]; ``dout`` is of the values, or of the loss with ``returns``."""
    hidden = _rows(hidden)
    num_tokens, width = hidden.shape
    config = configs.config("value_head_backward", "", hidden.device)
    tokens_each = max(triton.cdiv(triton.cdiv(num_tokens, PARTS), config["ROWS"]), 1) * config["ROWS"]
    parts = triton.cdiv(num_tokens, tokens_each)
    dhidden = hidden.new_empty(hidden.shape)
    dweight = hidden.new_empty((parts, width), dtype=torch.float32)
    dbias = hidden.new_empty(parts, dtype=torch.float32)
    unused = dout
    launch(
        value_head_backward, (parts, triton.cdiv(width, config["BLOCK"])),
        dout.contiguous(), hidden, weight.contiguous(), unused if values is None else values,
        unused if returns is None else returns.contiguous(),
        unused if mask is None else mask.contiguous().view(torch.int8),
        unused if clipped is None else clipped.view(torch.int8), dhidden, dweight, dbias, hidden.stride(0),
        num_tokens, width, tokens_each, HAS_LOSS=returns is not None, HAS_MASK=mask is not None, **config,
    )  # fmt: skip
    return dhidden, dweight.sum(0).to(weight.dtype), dbias.sum(0, keepdim=True)
