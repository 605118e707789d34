"""A value for each token, and the clipped loss that fits it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import checks
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
    return reference.values(hidden_TD, weight_D.reshape(-1), bias_1)


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
    _check_targets(values_T.shape[0], old_values_T, returns_T, clip, mask_T)
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
    _check_targets(hidden_TD.shape[0], old_values_T, returns_T, clip, mask_T)
    values_T = reference.values(hidden_TD, weight_D.reshape(-1), bias_1)
    loss_T, clipped_T = reference.loss(values_T, old_values_T.detach(), returns_T.detach(), clip, mask_T)
    return ValueTerms(values_T.detach(), loss_T, clipped_T)


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    checks.require_float(hidden_TD=hidden, weight_D=weight, bias_1=bias)
    checks.require_same_device(hidden=hidden, weight=weight, bias=bias)
    checks.require_shape(hidden, (None, None), "hidden_TD")
    checks.require(weight.numel() == hidden.shape[1], f"weight_D must hold {hidden.shape[1]} numbers")
    if bias is not None:
        checks.require_shape(bias, (1,), "bias_1")


def _check_targets(tokens: int, old: Tensor, returns: Tensor, clip: float | None, mask: Tensor | None) -> None:
    checks.require_float(old_values_T=old, returns_T=returns)
    checks.require_shape(old, (tokens,), "old_values_T")
    checks.require_shape(returns, (tokens,), "returns_T")
    checks.require(clip is None or clip >= 0, f"clip must be >= 0 or None, got {clip}")
    if mask is not None:
        checks.require_shape(mask, (tokens,), "mask_T")
        checks.require(mask.dtype == torch.bool, f"mask_T must be bool, got {mask.dtype}")
