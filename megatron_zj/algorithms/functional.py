"""The mathematics of the algorithms as pure functions of tensors: no models, no ranks, no state.

T: tokens of all rows, end to end; R: rows.  Ratios and differences are of log-probabilities (nats).
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from kernels.gae import gae
from megatron_zj.config.algorithm import Aggregation, KLEstimator
from megatron_zj.data.batch import Rows

# Losses -----------------------------------------------------------------------------------------------------------


def clipped_policy_loss(
    log_ratio_T: Tensor,
    advantages_T: Tensor,
    clip_ratio: float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate, to be minimised, and where a clip binds (Schulman et al. 2017, eq. 7).

    ``log_ratio``: log pi_new - log pi_old of each token.  The ratio counts from 1 - ``clip_ratio`` to 1 +
    ``clip_high`` (None: the same; Yu et al. 2025 take more above).  ``dual_clip`` c: a token of negative advantage A
    costs at most c |A| (Ye et al. 2020, eq. 3).  Returns loss [T] and a 0/1 indicator [T].
    """
    ratio = log_ratio_T.exp()
    free = ratio * advantages_T
    clipped = ratio.clamp(1.0 - clip_ratio, 1.0 + (clip_ratio if clip_high is None else clip_high)) * advantages_T
    gain, bound = torch.minimum(free, clipped), clipped < free
    if dual_clip is not None:
        floor = dual_clip * advantages_T
        too_low = (advantages_T < 0) & (gain < floor)
        gain, bound = torch.where(too_low, floor, gain), bound | too_low
    return -gain, bound.to(ratio.dtype)


def approx_kl(log_ratio_T: Tensor) -> Tensor:
    """The k3 estimate of KL(old || new) of each token: r - 1 - log r, never negative (Schulman 2020)."""
    return log_ratio_T.exp() - 1.0 - log_ratio_T


def estimate_kl(logprobs_T: Tensor, ref_logprobs_T: Tensor, estimator: KLEstimator) -> Tensor:
    """An estimate of KL(pi || pi_ref) from each token drawn from pi (Schulman 2020, "Approximating KL divergence").

    With d = log pi - log pi_ref: k1 = d (unbiased, of either sign), k2 = d^2 / 2 (biased; its gradient is that of the
    KL), k3 = exp(-d) - 1 + d (unbiased, never negative), abs = |d|.
    """
    difference_T = logprobs_T - ref_logprobs_T
    if estimator == "k1":
        return difference_T
    if estimator == "k2":
        return 0.5 * difference_T.square()
    return approx_kl(-difference_T) if estimator == "k3" else difference_T.abs()


def importance_weights(logprobs_T: Tensor, sampling_logprobs_T: Tensor, cap: float) -> Tensor:
    """min(pi_train / pi_rollout, cap) of each token: truncated importance sampling (Ionides 2008; Yao et al. 2025)."""
    return (logprobs_T - sampling_logprobs_T).exp().clamp(max=cap)


def preference_loss(margin_P: Tensor, label_smoothing: float) -> Tensor:
    """[P]: -log sigmoid(margin) of each pair's better reward minus its worse (Rafailov et al. 2023, eq. 7).

    ``label_smoothing`` e takes (1 - e) of it and e of the reversed pair's (Mitchell 2023).
    """
    held, reversed_ = (-torch.nn.functional.logsigmoid(sign * margin_P) for sign in (1, -1))
    return (1 - label_smoothing) * held + label_smoothing * reversed_


def ranked_pairs(group: Sequence[int], ranks: Sequence[int], extremes: bool) -> list[tuple[int, int]]:
    """(better, worse) rows of a group; ``extremes``: the first best and the first worst only.  Ties give none."""
    if extremes:
        best, worst = min(group, key=lambda row: ranks[row]), max(group, key=lambda row: ranks[row])
        return [(best, worst)] if ranks[best] < ranks[worst] else []
    return [(one, other) for one in group for other in group if ranks[one] < ranks[other]]


def aggregation_fields(mask: Rows, aggregation: Aggregation, dtype: torch.dtype = torch.float32) -> dict[str, Rows]:
    """What makes a sum over tokens the mean that is asked for, whatever the minibatch, micro-batch and layout.

    ``loss_weight`` (``dtype``): the factor of each token; ``loss_count`` (int64): its share of the denominator.
    token: both are the mask.  sequence: 1 / (tokens of the row), and 1 at each row's last response token.
    """
    mask_T = mask.values.to(dtype)
    if aggregation == "token":
        return {"loss_weight": mask.replace(mask_T), "loss_count": mask.replace(mask.values.to(torch.int64))}
    weights, counts = torch.zeros_like(mask_T), torch.zeros_like(mask.values, dtype=torch.int64)
    for weight, count, row in zip(
        mask.replace(weights).split(), mask.replace(counts).split(), mask.split(), strict=True
    ):
        places = row.nonzero()[:, 0]
        if len(places):
            weight[places] = 1.0 / len(places)
            count[places[-1]] = 1
    return {"loss_weight": mask.replace(weights), "loss_count": mask.replace(counts)}


# Rewards and advantages -------------------------------------------------------------------------------------------


def shape_rewards(
    scores_R: Tensor,
    logprobs: Rows,
    ref_logprobs: Rows,
    response_mask: Rows,
    kl_coef: float,
    estimator: KLEstimator = "k1",
) -> Rows:
    """Per-token rewards: -kl_coef x KL estimate, and the score on the last response token.

    (Ouyang et al. 2022, eq. 2; Ziegler et al. 2019.)  Rows without a response get nothing.
    """
    mask = response_mask.values.to(logprobs.values.dtype)
    rewards_T = -kl_coef * estimate_kl(logprobs.values, ref_logprobs.values, estimator) * mask
    rows = logprobs.replace(rewards_T).split()
    for score, row, row_mask in zip(scores_R, rows, response_mask.split(), strict=True):
        last = row_mask.nonzero()
        if last.numel():
            row[int(last[-1])] += score
    return logprobs.replace(rewards_T)


def row_digests(tokens: Rows) -> list[str]:
    """A digest of each row's ids; equal rows have equal ones."""
    return [hashlib.blake2b(row.numpy().tobytes(), digest_size=16).hexdigest() for row in tokens.split()]


def first_of_equals(keys: Sequence[Hashable]) -> list[int]:
    """For each key the place of the first that equals it.

    Equal rows get one score by it: a kernel rounds a row differently at another place of a pack, and what compares
    scores (a group's deviation, a ranking) would make a difference of it.
    """
    first: dict[Hashable, int] = {}
    return [first.setdefault(key, place) for place, key in enumerate(keys)]


def mask_responses(tokens: Rows, prompt_lengths_R: Tensor) -> Rows:
    """int64: 1 on what follows a row's prompt."""
    starts_T = (tokens.offsets[:-1] + prompt_lengths_R).repeat_interleave(tokens.lengths)
    return tokens.replace((torch.arange(len(starts_T)) >= starts_T).to(torch.int64))


def response_sums(values: Rows, response_mask: Rows) -> Tensor:
    """[R] float64: each row's sum over its response tokens."""
    rows_T = torch.arange(len(values)).repeat_interleave(values.lengths)
    masked_T = values.values.double() * response_mask.values
    return torch.zeros(len(values), dtype=torch.float64).index_add(0, rows_T, masked_T)


def spread_over_responses(values_R: Tensor, response_mask: Rows) -> Rows:
    """Each row's value on its response tokens, 0 elsewhere."""
    values_T = values_R.repeat_interleave(response_mask.lengths)
    return response_mask.replace(values_T * response_mask.values.to(values_R.dtype))


def response_lengths(response_mask: Rows) -> Tensor:
    """[R] int64: response tokens of each row."""
    return torch.tensor([int(mask.sum()) for mask in response_mask.split()], dtype=torch.int64)


def response_advantages(
    rewards: Rows, values: Rows, response_mask: Rows, gamma: float, lam: float
) -> tuple[Rows, Rows]:
    """Advantages and returns of response tokens by generalized advantage estimation; 0 elsewhere.

    (Schulman et al. 2016.)  A row's response tokens are contiguous; the state after the last one has value 0.
    """
    keep_T = response_mask.values.bool()
    cu_seqlens = torch.nn.functional.pad(response_lengths(response_mask).cumsum(0), (1, 0))
    advantages, returns = gae(rewards.values[keep_T], values.values[keep_T], cu_seqlens, gamma=gamma, lam=lam)
    spread = [torch.zeros_like(values.values).masked_scatter(keep_T, found) for found in (advantages, returns)]
    return values.replace(spread[0]), values.replace(spread[1])


def group_advantages(scores_R: Tensor, group_size: int, scale: bool) -> Tensor:
    """[R]: each score minus its group's mean, by the group's deviation where ``scale`` (Shao et al. 2024, eq. 3).

    Groups are ``group_size`` neighbours.  Deviation: unbiased, plus 1e-6; a group of equal scores gives zeros.
    """
    groups_GN = scores_R.double().view(-1, group_size)
    centred_GN = groups_GN - groups_GN.mean(1, keepdim=True)
    if scale:
        centred_GN = centred_GN / (groups_GN.std(1, keepdim=True) + 1e-6)
    return centred_GN.reshape(-1).to(scores_R.dtype)


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


def wins(difference_P: Tensor) -> Tensor:
    """How a pair counts in any accuracy, by better minus worse: 1, 0, or 1/2 where they are equal."""
    return (difference_P.sign() + 1) / 2


def repetition(tokens: Tensor, size: int = 4) -> float:
    """Share of a response's ``size``-grams that occurred in it before; 0 where it has none."""
    grams = [tuple(gram) for gram in tokens.unfold(0, size, 1).tolist()] if len(tokens) >= size else []
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
