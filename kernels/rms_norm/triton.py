"""RMSNorm in Triton: a program owns whole rows, so each pass reads and writes its tensors once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import configs
from kernels.dispatch import launch

MAX_WIDTH = 16384
PROGRAMS = 256  # of the backward pass: each leaves one partial of the weight gradient


@triton.jit
def rms_norm_forward(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, rstd_ptr, stride_x, stride_r, num_rows, width, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    inside = (row[:, None] < num_rows) & (col[None, :] < width)
    x = tl.load(x_ptr + row[:, None] * stride_x + col[None, :], mask=inside, other=0.0).to(tl.float32)
    out = row[:, None] * width + col[None, :]
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row[:, None] * stride_r + col[None, :], mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + out, rounded, mask=inside)
        x = rounded.to(tl.float32)
    rstd = tl.math.rsqrt(tl.sum(x * x, 1) / width + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < num_rows)
    weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    y = x * rstd[:, None] * weight[None, :]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_backward(
    dy_ptr, dsum_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr, stride_x, num_rows, width, rows_each,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_DSUM: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), tl.float32)
    first = program * rows_each
    for start in tl.range(first, tl.minimum(first + rows_each, num_rows), ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        inside = (row[:, None] < num_rows) & (col[None, :] < width)
        place = row[:, None] * width + col[None, :]
        x = tl.load(x_ptr + row[:, None] * stride_x + col[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + place, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < num_rows, other=0.0)
        normed = x * rstd[:, None]
        dweight += tl.sum(dy * normed, 0)
        if BLOCK > 8192:  # held over the loop the weight would spill; it comes from the cache again
            weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)
        slope = dy * weight[None, :]
        mean = tl.sum(slope * normed, 1) / width
        dx = rstd[:, None] * (slope - normed * mean[:, None])
        if HAS_DSUM:
            dx += tl.load(dsum_ptr + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + program.to(tl.int64) * width + col, dweight, mask=col < width)


def rows_of(x: Tensor) -> Tensor:
    """[rows, N] with a unit stride on N: a view where x allows it."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def table_key(block: int, dtype: torch.dtype) -> str:
    """Of the blocks for rows of this width and dtype."""
    return f"{block}/fp32" if dtype == torch.float32 else str(block)


def _check(x: Tensor) -> int:
    if x.shape[-1] > MAX_WIDTH:
        raise NotImplementedError(f"the Triton rms_norm takes widths up to {MAX_WIDTH}, got {x.shape[-1]}")
    if x.dtype == torch.float64:
        raise NotImplementedError("the Triton rms_norm takes fp16, bf16 and fp32, not fp64")
    return max(64, triton.next_power_of_2(x.shape[-1]))


def forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, x + residual (y again without one), rstd [rows] fp32."""
    block = _check(x)
    flat = rows_of(x)
    other = flat if residual is None else rows_of(residual)
    y, rstd = x.new_empty(x.shape), x.new_empty(flat.shape[0], dtype=torch.float32)
    total = y if residual is None else x.new_empty(x.shape)
    config = configs.config("rms_norm_forward", table_key(block, x.dtype), x.device)
    launch(
        rms_norm_forward, (triton.cdiv(flat.shape[0], config["ROWS"]),),
        flat, other, weight.contiguous(), y, total, rstd, flat.stride(0), other.stride(0), *flat.shape, eps,
        BLOCK=block, HAS_RESIDUAL=residual is not None, **config,
    )  # fmt: skip
    return y, total, rstd


def backward(dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x (and of the residual: the same) and of the weight."""
    block = _check(x)
    flat = rows_of(x)
    num_rows, width = flat.shape
    config = configs.config("rms_norm_backward", table_key(block, x.dtype), x.device)
    rows_each = triton.cdiv(triton.cdiv(num_rows, PROGRAMS), config["ROWS"]) * config["ROWS"]
    programs = triton.cdiv(num_rows, rows_each) if num_rows else 0
    dx, partial = x.new_empty(x.shape), x.new_empty((programs, width), dtype=torch.float32)
    dy = dy.contiguous()
    launch(
        rms_norm_backward, (programs,),
        dy, dy if dsum is None else dsum.contiguous(), flat, weight.contiguous(), rstd, dx, partial, flat.stride(0),
        num_rows, width, rows_each, BLOCK=block, HAS_DSUM=dsum is not None, **config,
    )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype)
