"""Generalized advantage estimation over ragged responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import arguments, dispatch
from kernels.gae import reference


def gae(
    rewards_T: Tensor,
    values_T: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap_R: Tensor | None = None,
    cu_seqlens_list: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of every response token (Schulman et al. 2016); no gradient.

    delta_t = r_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lam A_{t+1},  return_t = A_t + V_t, within each row.

    Args:
        rewards_T, values_T: [T] float: the response tokens of all rows, end to end.
        cu_seqlens: [R + 1] int32 or int64: where each row starts in T, and T.
        gamma: discount a token, 0 .. 1.
        lam: GAE's lambda, 0 .. 1.
        bootstrap_R: [R]: the value after each row's last token; None: 0, the episode ends there.
        cu_seqlens_list: the same as cu_seqlens on the host; without it, its device is waited for.

    Returns:
        advantages [T] and returns [T], fp32 (fp64 for fp64).

    Raises:
        ValueError: shapes, dtypes or sequence ends that do not fit, gamma or lam outside 0 .. 1.
    """
    arguments.require_float(rewards_T=rewards_T, values_T=values_T, **arguments.given(bootstrap_R=bootstrap_R))
    arguments.require_integer(cu_seqlens=cu_seqlens)
    arguments.require_same_device(rewards=rewards_T, values=values_T, bootstrap=bootstrap_R)
    arguments.require_shape(rewards_T, (None,), "rewards_T")
    arguments.require_shape(values_T, rewards_T.shape, "values_T")
    arguments.require(0 <= gamma <= 1 and 0 <= lam <= 1, f"gamma and lam must be 0 .. 1, got {gamma}, {lam}")
    ends = arguments.host_ends(cu_seqlens, cu_seqlens_list, rewards_T.shape[0], "cu_seqlens")
    if bootstrap_R is not None:
        arguments.require_shape(bootstrap_R, (cu_seqlens.shape[0] - 1,), "bootstrap_R")
    backend = dispatch.backend_of(rewards_T)
    with torch.no_grad():
        return _gae(rewards_T, values_T, cu_seqlens, bootstrap_R, ends, float(gamma), float(lam), backend)


@torch.library.custom_op("zj::gae", mutates_args=())
def _gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    bootstrap: Tensor | None,
    ends: Sequence[int] | None,
    gamma: float,
    lam: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        return dispatch.triton_form("gae").forward(rewards, values, cu_seqlens, bootstrap, gamma, lam)
    return reference.forward(rewards, values, ends or cu_seqlens.tolist(), bootstrap, gamma, lam)


@_gae.register_fake
def _(rewards: Tensor, values: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    return rewards.new_empty(rewards.shape, dtype=dtype), rewards.new_empty(rewards.shape, dtype=dtype)
