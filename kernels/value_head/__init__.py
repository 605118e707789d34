"""A value for each token, and the clipped loss that fits it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import arguments, dispatch
from kernels.value_head import reference


class ValueTerms(NamedTuple):
    """[T] each."""

    values: Tensor  # fp32
    loss: Tensor  # fp32: half the squared error, the larger of plain and clipped; 0 where masked
    clipped: Tensor  # bool: the clipped form was the larger one


def value_head(hidden_TD: Tensor, weight_D: Tensor, bias_1: Tensor | None = None) -> Tensor:
    """hidden . weight + bias for each token.

    Args:
        hidden_TD: [T, D], fp16, bf16, fp32 (CPU also fp64).
        weight_D: [D] or [1, D].
        bias_1: [1]; None: no bias.

    Returns:
        [T] fp32.  Gradients flow to hidden_TD, weight_D and bias_1.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    _check_head(hidden_TD, weight_D, bias_1)
    backend = dispatch.backend_of(hidden_TD)
    return _value_head(hidden_TD, weight_D.reshape(-1), bias_1, None, None, None, None, backend)[0]


def value_loss(
    values_T: Tensor,
    old_values_T: Tensor,
    returns_T: Tensor,
    *,
    clip: float | None,
    mask_T: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """0.5 max((v - R)^2, (clip(v, old - c, old + c) - R)^2) of each token (PPO's value clipping).

    Args:
        values_T, old_values_T, returns_T: [T] float; the gradient flows to values_T only.
        clip: c, in units of value; None: no clipping.
        mask_T: [T] bool; False: loss 0.

    Returns:
        loss [T] and clipped [T] (bool).

    Raises:
        ValueError: shapes or dtypes that do not fit, or a negative clip.
    """
    arguments.require_float(values_T=values_T)
    arguments.require_shape(values_T, (None,), "values_T")
    _check_targets(values_T, old_values_T, returns_T, clip, mask_T)
    return reference.loss(values_T, old_values_T.detach(), returns_T.detach(), clip, mask_T)


def value_head_loss(
    hidden_TD: Tensor,
    weight_D: Tensor,
    bias_1: Tensor | None,
    old_values_T: Tensor,
    returns_T: Tensor,
    *,
    clip: float | None,
    mask_T: Tensor | None = None,
) -> ValueTerms:
    """``value_head`` and ``value_loss`` in one pass over the hidden states.

    Arguments and errors as in those two.  The gradient flows through ``loss``; ``values`` carries none.
    """
    _check_head(hidden_TD, weight_D, bias_1)
    _check_targets(hidden_TD, old_values_T, returns_T, clip, mask_T)
    terms = _value_head(
        hidden_TD,
        weight_D.reshape(-1),
        bias_1,
        old_values_T.detach(),
        returns_T.detach(),
        mask_T,
        None if clip is None else float(clip),
        dispatch.backend_of(hidden_TD),
    )
    return ValueTerms(terms[0].detach(), *terms[1:])


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    arguments.require_float(hidden_TD=hidden, weight_D=weight, **arguments.given(bias_1=bias))
    arguments.require_same_device(hidden=hidden, weight=weight, bias=bias)
    arguments.require_shape(hidden, (None, None), "hidden_TD")
    arguments.require(weight.numel() == hidden.shape[1], f"weight_D must hold {hidden.shape[1]} numbers")
    if bias is not None:
        arguments.require_shape(bias, (1,), "bias_1")


def _check_targets(given: Tensor, old: Tensor, returns: Tensor, clip: float | None, mask: Tensor | None) -> None:
    """``given``: hidden states or values, [T, ...]."""
    tokens = given.shape[0]
    arguments.require_float(old_values_T=old, returns_T=returns)
    arguments.require_same_device(given=given, old_values_T=old, returns_T=returns, mask_T=mask)
    arguments.require_shape(old, (tokens,), "old_values_T")
    arguments.require_shape(returns, (tokens,), "returns_T")
    arguments.require(clip is None or clip >= 0, f"clip must be >= 0 or None, got {clip}")
    if mask is not None:
        arguments.require_shape(mask, (tokens,), "mask_T")
        arguments.require(mask.dtype == torch.bool, f"mask_T must be bool, got {mask.dtype}")


@torch.library.custom_op("zj::value_head", mutates_args=())
def _value_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    old: Tensor | None,
    returns: Tensor | None,
    mask: Tensor | None,
    clip: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    form = dispatch.triton_form("value_head") if backend == "triton" else reference
    return form.forward(hidden, weight, bias, old, returns, mask, clip)


@torch.library.custom_op("zj::value_head_backward", mutates_args=())
def _value_head_backward(
    dout: Tensor,
    hidden: Tensor,
    weight: Tensor,
    values: Tensor | None,
    returns: Tensor | None,
    mask: Tensor | None,
    clipped: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    form = dispatch.triton_form("value_head") if backend == "triton" else reference
    return form.backward(dout, hidden, weight, values, returns, mask, clipped)


@_value_head.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Any, old: Any, returns: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    size = 0 if returns is None else hidden.shape[0]
    values, loss = (hidden.new_empty(count, dtype=dtype) for count in (hidden.shape[0], size))
    return values, loss, hidden.new_empty(size, dtype=torch.bool)


@_value_head_backward.register_fake
def _(dout: Tensor, hidden: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), dout.new_empty(1)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, bias, _, returns, mask, _, ctx.backend = inputs
    values, _, clipped = output
    ctx.mark_non_differentiable(clipped)
    saved = (None, None, None, None) if returns is None else (values, returns, mask, clipped)
    ctx.save_for_backward(hidden, weight, *saved)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, dvalues: Tensor, dloss: Tensor, _dclipped: Tensor) -> tuple[Any, ...]:
    hidden, weight, values, returns, mask, clipped = ctx.saved_tensors
    dout = dvalues if returns is None else dloss
    dhidden, dweight, dbias = _value_head_backward(
        dout.contiguous(), hidden, weight, values, returns, mask, clipped, ctx.backend
    )
    given_bias = None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype)
    return dhidden, dweight, given_bias, None, None, None, None, None


_value_head.register_autograd(_gradients, setup_context=_save)
