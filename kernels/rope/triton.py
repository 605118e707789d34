"""Rotary embedding in Triton: a row is one head of one token; both halves are read before either is written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import configs
from kernels.dispatch import launch


@triton.jit
def rope_rotate(
    x_ptr, cos_ptr, sin_ptr, position_ptr, y_ptr, stride_xt, stride_xh, stride_yt, stride_yh, num_rows, sign,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = row // HEADS
    head = row % HEADS
    col = tl.arange(0, BLOCK)
    here = row < num_rows
    inside = here[:, None] & (col[None, :] < HALF)
    position = tl.load(position_ptr + token, mask=here, other=0).to(tl.int64)
    angle = position[:, None] * HALF + col[None, :]
    cos = tl.load(cos_ptr + angle, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(tl.float32) * sign
    source = token[:, None] * stride_xt + head[:, None] * stride_xh + col[None, :]
    first = tl.load(x_ptr + source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + source + HALF, mask=inside, other=0.0).to(tl.float32)
    target = token[:, None] * stride_yt + head[:, None] * stride_yh + col[None, :]
    tl.store(y_ptr + target, (first * cos - second * sin).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + target + HALF, (second * cos + first * sin).to(y_ptr.dtype.element_ty), mask=inside)


def rotate(x_THD: Tensor, cos_PF: Tensor, sin_PF: Tensor, positions_T: Tensor, sign: float) -> Tensor:
    """The rotation by ``sign`` times the angles, in a new contiguous tensor."""
    y = x_THD.new_empty(x_THD.shape)
    rotate_into(x_THD, cos_PF, sin_PF, positions_T, sign, y)
    return y


def rotate_into(x_THD: Tensor, cos_PF: Tensor, sin_PF: Tensor, positions_T: Tensor, sign: float, y_THD: Tensor) -> None:
    """The same into ``y_THD``, which may be x_THD itself."""
    if x_THD.dtype == torch.float64:
        raise NotImplementedError("the Triton rope takes fp16, bf16 and fp32, not fp64")
    x = x_THD if x_THD.stride(2) == 1 else x_THD.contiguous()
    num_tokens, heads, dim = x.shape
    config = configs.config("rope_rotate", "", x.device)
    launch(
        rope_rotate, (triton.cdiv(num_tokens * heads, config["ROWS"]),),
        x, cos_PF.contiguous(), sin_PF.contiguous(), positions_T.contiguous(), y_THD, x.stride(0), x.stride(1),
        y_THD.stride(0), y_THD.stride(1), num_tokens * heads, sign,
        HEADS=heads, HALF=dim // 2, BLOCK=triton.next_power_of_2(dim // 2), **config,
    )  # fmt: skip
