"""SwiGLU in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the two halves of the last dimension."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
