"""The gated activation of LLaMA's MLP."""

from __future__ import annotations

from torch import Tensor

from kernels import checks
from kernels.swiglu import reference


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, with gate and up the two halves of the last dimension (Shazeer 2020).

    Args:
        gate_up: [..., 2F], fp16, bf16, fp32 (CPU also fp64); the gate comes first.  With tensor parallelism a rank's
            2F are its own gate columns, then its own up columns.

    Returns:
        [..., F] in the same dtype.

    Raises:
        ValueError: not a float tensor, or an odd last dimension.
    """
    checks.require_float(gate_up=gate_up)
    even = gate_up.dim() >= 1 and gate_up.shape[-1] % 2 == 0
    checks.require(even, f"the last dimension must hold gate and up, got {list(gate_up.shape)}")
    return reference.forward(gate_up)
