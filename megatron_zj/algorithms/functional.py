"""The mathematics of the algorithms as pure functions of tensors: no models, no ranks, no state.

T: tokens of all rows, end to end; R: rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.gae import gae
from megatron_zj.data.batch import Rows


def clipped_policy_loss(log_ratio_T: Tensor, advantages_T: Tensor, clip_ratio: float) -> tuple[Tensor, Tensor]:
    """The clipped surrogate, to be minimised, and where the clip binds (Schulman et al. 2017, eq. 7).

    ``log_ratio``: log pi_new - log pi_old of each token.  Returns loss [T] and a 0/1 indicator [T].
    """
    ratio = log_ratio_T.exp()
    free = ratio * advantages_T
    clipped = ratio.clamp(1.0 - clip_ratio, 1.0 + clip_ratio) * advantages_T
    return -torch.minimum(free, clipped), (clipped < free).to(ratio.dtype)


def clipped_value_loss(
    values_T: Tensor, old_values_T: Tensor, returns_T: Tensor, clip_value: float
) -> tuple[Tensor, Tensor]:
    """Half the squared error, at least that of the value clipped around the old one (PPO's reference code).

    Returns loss [T] and a 0/1 indicator [T] of where the clip binds.
    """
    clipped = old_values_T + (values_T - old_values_T).clamp(-clip_value, clip_value)
    free_error, clipped_error = (values_T - returns_T).square(), (clipped - returns_T).square()
    return 0.5 * torch.maximum(free_error, clipped_error), (clipped_error > free_error).to(values_T.dtype)


def approx_kl(log_ratio_T: Tensor) -> Tensor:
    """The k3 estimate of KL(old || new) of each token: r - 1 - log r, never negative (Schulman 2020)."""
    return log_ratio_T.exp() - 1.0 - log_ratio_T


def shape_rewards(scores_R: Tensor, logprobs: Rows, ref_logprobs: Rows, response_mask: Rows, kl_coef: float) -> Rows:
    """Per-token rewards: -kl_coef x (log pi - log pi_ref), and the score on the last response token.

    (Ouyang et al. 2022, eq. 2; Ziegler et al. 2019.)  Rows without a response get nothing.
    """
    mask = response_mask.values.to(logprobs.values.dtype)
    rewards_T = -kl_coef * (logprobs.values - ref_logprobs.values) * mask
    rows = logprobs.replace(rewards_T).split()
    for score, row, row_mask in zip(scores_R, rows, response_mask.split(), strict=True):
        last = row_mask.nonzero()
        if last.numel():
            row[int(last[-1])] += score
    return logprobs.replace(rewards_T)


def response_advantages(
    rewards: Rows, values: Rows, response_mask: Rows, gamma: float, lam: float
) -> tuple[Rows, Rows]:
    """Advantages and returns of response tokens by generalized advantage estimation; 0 elsewhere.

    (Schulman et al. 2016.)  A row's response tokens are contiguous; the state after the last one has value 0.
    """
    keep_T = response_mask.values.bool()
    counts = torch.tensor([int(mask.sum()) for mask in response_mask.split()], dtype=torch.int64)
    cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    advantages, returns = gae(rewards.values[keep_T], values.values[keep_T], cu_seqlens, gamma=gamma, lam=lam)
    spread = [torch.zeros_like(values.values).masked_scatter(keep_T, found) for found in (advantages, returns)]
    return values.replace(spread[0]), values.replace(spread[1])


def masked_sums(values_T: Tensor, mask_T: Tensor) -> Tensor:
    """[3] float64: count, sum and sum of squares of the masked values; additive over ranks."""
    kept = values_T[mask_T.bool()].double()
    return torch.stack([kept.new_tensor(float(kept.numel())), kept.sum(), kept.square().sum()])


def mean_and_deviation(sums: Tensor) -> tuple[float, float]:
    """Mean and (population) standard deviation from ``masked_sums`` summed over all ranks."""
    count, total, squares = (float(value) for value in sums)
    mean = total / max(count, 1.0)
    return mean, max(squares / max(count, 1.0) - mean * mean, 0.0) ** 0.5


def whiten(values_T: Tensor, mask_T: Tensor, mean: float, deviation: float) -> Tensor:
    """Masked values shifted to mean 0 and scaled to deviation 1; 0 elsewhere."""
    return torch.where(mask_T.bool(), (values_T - mean) / (deviation + 1e-8), torch.zeros_like(values_T))
