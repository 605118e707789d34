"""SwiGLU in Triton: one read of gate and up, one write, forward and backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import configs
from kernels.dispatch import launch


@triton.jit
def swiglu_forward(x_ptr, y_ptr, stride_x, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < width
    gate = tl.load(x_ptr + row * stride_x + col, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * stride_x + width + col, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * width + col, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(dy_ptr, x_ptr, dx_ptr, stride_x, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < width
    dy = tl.load(dy_ptr + row * width + col, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + row * stride_x + col, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * stride_x + width + col, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dup = dy * gate * sigmoid
    tl.store(dx_ptr + row * (2 * width) + col, dgate.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dx_ptr + row * (2 * width) + width + col, dup.to(dx_ptr.dtype.element_ty), mask=inside)


def _rows(gate_up: Tensor) -> Tensor:
    if gate_up.dtype == torch.float64:
        raise NotImplementedError("the Triton swiglu takes fp16, bf16 and fp32, not fp64")
    flat = gate_up.reshape(-1, gate_up.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def forward(gate_up: Tensor) -> Tensor:
    """silu(gate) * up."""
    flat = _rows(gate_up)
    num_rows, width = flat.shape[0], flat.shape[1] // 2
    y = gate_up.new_empty((*gate_up.shape[:-1], width))
    config = configs.config("swiglu_forward", "", gate_up.device)
    launch(swiglu_forward, (num_rows, triton.cdiv(width, config["BLOCK"])), flat, y, flat.stride(0), width, **config)
    return y


def backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of gate_up."""
    flat = _rows(gate_up)
    num_rows, width = flat.shape[0], flat.shape[1] // 2
    dx = gate_up.new_empty(gate_up.shape)
    config = configs.config("swiglu_backward", "", gate_up.device)
    grid = (num_rows, triton.cdiv(width, config["BLOCK"]))
    launch(swiglu_backward, grid, dy.contiguous(), flat, dx, flat.stride(0), width, **config)
    return dx
