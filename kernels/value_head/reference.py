"""The value head and the clipped value loss in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.guards import without_autocast


@without_autocast
def values(hidden_TD: Tensor, weight_D: Tensor, bias_1: Tensor | None) -> Tensor:
    """[T] fp32 (fp64 for fp64): hidden . weight + bias."""
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    found_T = hidden_TD.to(wide) @ weight_D.to(wide)
    return found_T if bias_1 is None else found_T + bias_1.to(wide)


def loss(
    values_T: Tensor, old_values_T: Tensor, returns_T: Tensor, clip: float | None, mask_T: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Loss of each token, and whether the clipped form was the larger one."""
    plain_T = (values_T - returns_T).square()
    if clip is None:
        larger_T, clipped_T = plain_T, torch.zeros_like(plain_T, dtype=torch.bool)
    else:
        near_T = values_T.clamp(old_values_T - clip, old_values_T + clip)  # in range: the value itself, unrounded
        other_T = (near_T - returns_T).square()
        clipped_T = other_T > plain_T
        larger_T = torch.where(clipped_T, other_T, plain_T)
    half_T = 0.5 * larger_T
    if mask_T is None:
        return half_T, clipped_T
    return torch.where(mask_T, half_T, torch.zeros_like(half_T)), clipped_T & mask_T


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    old: Tensor | None,
    returns: Tensor | None,
    mask: Tensor | None,
    clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, loss and clipped, [T]; the last two are empty without ``returns``."""
    found = values(hidden, weight, bias)
    if old is None or returns is None:
        return found, found.new_empty(0), torch.empty(0, dtype=torch.bool, device=hidden.device)
    return found, *loss(found, old, returns, clip, mask)


@without_autocast
def backward(
    dout: Tensor,
    hidden: Tensor,
    weight: Tensor,
    values: Tensor | None,
    returns: Tensor | None,
    mask: Tensor | None,
    clipped: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight [D] and bias [1]; ``dout`` is of the values, or of the loss with ``returns``."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    dvalues = dout.to(wide)
    if values is not None and returns is not None and clipped is not None:
        kept = ~clipped if mask is None else mask & ~clipped
        dvalues = torch.where(kept, dvalues * (values - returns), 0.0)
    dhidden = (dvalues[:, None] * weight.to(wide)).to(hidden.dtype)
    return dhidden, (dvalues @ hidden.to(wide)).to(weight.dtype), dvalues.sum(0, keepdim=True)
