"""SwiGLU in plain torch, on torch's fused silu and its backward."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the two halves of the last dimension."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of gate_up."""
    gate, up = gate_up.chunk(2, dim=-1)
    dx = gate_up.new_empty(gate_up.shape)
    dgate, dup = dx.chunk(2, dim=-1)
    dgate.copy_(torch.ops.aten.silu_backward(dy * up, gate))
    torch.mul(dy, torch.nn.functional.silu(gate), out=dup)
    return dx
