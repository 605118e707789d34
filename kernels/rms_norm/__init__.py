"""Root-mean-square layer normalisation, alone and with the residual addition before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import arguments, dispatch
from kernels.guards import once_differentiable
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
    backend = dispatch.backend_of(x)
    if dispatch.eager(x, backend):
        return _Eager.apply(x, weight, float(eps))
    return _rms_norm(x, weight, float(eps), backend)[0]


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
    arguments.require_shape(residual, x.shape, "residual")
    if residual.dtype != x.dtype:
        raise ValueError(f"residual must be {x.dtype} like x, got {residual.dtype}")
    arguments.require_same_device(x=x, residual=residual)
    backend = dispatch.backend_of(x)
    if dispatch.eager(x, backend):
        return _EagerSum.apply(x, residual, weight, float(eps))
    y, total, _ = _add_rms_norm(x, residual, weight, float(eps), backend)
    return y, total


class _Eager(torch.autograd.Function):
    """The torch form of ``rms_norm``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, _, rstd = reference.forward(x, None, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        return *reference.backward(dy, None, *ctx.saved_tensors), None


class _EagerSum(torch.autograd.Function):
    """The torch form of ``add_rms_norm``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, total, rstd = reference.forward(x, residual, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dsum: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        dx, dweight = reference.backward(dy, dsum, *ctx.saved_tensors)
        return dx, dx, dweight, None


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    arguments.require_float(x=x, weight=weight)
    arguments.require_same_device(x=x, weight=weight)
    arguments.require(x.dim() >= 1, "x must have a last dimension to normalise")
    arguments.require_shape(weight, (x.shape[-1],), "weight")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")


@torch.library.custom_op("zj::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    form = dispatch.triton_form("rms_norm") if backend == "triton" else reference
    y, _, rstd = form.forward(x, None, weight, eps)
    return y, rstd


@torch.library.custom_op("zj::add_rms_norm", mutates_args=())
def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    form = dispatch.triton_form("rms_norm") if backend == "triton" else reference
    return form.forward(x, residual, weight, eps)


@torch.library.custom_op("zj::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    form = dispatch.triton_form("rms_norm") if backend == "triton" else reference
    return form.backward(dy, dsum, x, weight, rstd)


def _empty_rstd(x: Tensor) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((x.shape[:-1].numel(),), dtype=dtype)


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _empty_rstd(x)


@_add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), _empty_rstd(x)


@_rms_norm_backward.register_fake
def _(dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _gradients(ctx: Any, dy: Tensor, _drstd: Tensor) -> tuple[Any, ...]:
    dx, dweight = _rms_norm_backward(dy, None, *ctx.saved_tensors, ctx.backend)
    return dx, dweight, None, None


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, _, ctx.backend = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(output[1], weight, output[2])


def _gradients_sum(ctx: Any, dy: Tensor, dsum: Tensor, _drstd: Tensor) -> tuple[Any, ...]:
    dx, dweight = _rms_norm_backward(dy, dsum, *ctx.saved_tensors, ctx.backend)
    return dx, dx, dweight, None, None


_rms_norm.register_autograd(_gradients, setup_context=_save)
_add_rms_norm.register_autograd(_gradients_sum, setup_context=_save_sum)
