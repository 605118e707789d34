"""Root-mean-square layer normalisation, alone and with the residual addition before it."""

from __future__ import annotations

from torch import Tensor

from kernels import checks
from kernels.rms_norm import reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019).

    Args:
        x: [..., N], fp16, bf16, fp32 (CPU also fp64).
        weight: [N], any of those dtypes.
        eps: added to the mean square.

    Returns:
        [..., N] in x's dtype.  Gradients flow to x and weight; the weight's is deterministic.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    _check(x, weight, eps)
    return reference.forward(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """rms_norm(x + residual), and x + residual, in one pass.

    Args:
        x, residual: [..., N], one dtype.
        weight: [N].
        eps: added to the mean square.

    Returns:
        The normalised sum and the sum, both [..., N] in x's dtype.  The norm reads the sum as it is returned (rounded
        to x's dtype), so the two outputs agree.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    _check(x, weight, eps)
    checks.require_shape(residual, x.shape, "residual")
    checks.require(residual.dtype == x.dtype, f"residual must be {x.dtype} like x, got {residual.dtype}")
    checks.require_same_device(x=x, residual=residual)
    total = x + residual
    return reference.forward(total, weight, eps), total


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    checks.require_float(x=x, weight=weight)
    checks.require_same_device(x=x, weight=weight)
    checks.require(x.dim() >= 1, "x must have a last dimension to normalise")
    checks.require_shape(weight, (x.shape[-1],), "weight")
    checks.require(eps >= 0, f"eps must not be negative, got {eps}")
