"""SwiGLU in plain torch, on torch's fused silu and its backward."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the two halves of the last dimension."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def backward(dy: Tensor, gate_up: Tensor, activated: Tensor | None = None) -> Tensor:
    """Gradient of gate_up.  ``activated``: silu(gate), where the forward pass kept it."""
    gate, up = gate_up.chunk(2, dim=-1)
    if activated is None:
        activated = torch.nn.functional.silu(gate)
    dx = gate_up.new_empty(gate_up.shape)
    dgate, dup = dx.chunk(2, dim=-1)
    torch.ops.aten.silu_backward.grad_input(torch.mul(dy, up, out=dgate), gate, grad_input=dgate)
    torch.mul(dy, activated, out=dup)
    return dx
