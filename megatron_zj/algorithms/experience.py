"""What the algorithms that learn from their own samples share: prompts, minibatches, reports, the parity gate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_zj.algorithms.functional import approx_kl, repetition, response_lengths
from megatron_zj.config.algorithm import OnPolicyConfig, ParityConfig
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.data.stream import Stream
from megatron_zj.engine.objective import Metrics
from megatron_zj.roles.world import World, WorldBatch, world_max, world_sum
from megatron_zj.runtime.seed import keyed_generator


class ParityError(RuntimeError):
    """Training and rollout disagree about the log-probabilities of the same tokens.  Raised on every rank."""


def next_prompts(prompts: Stream, config: OnPolicyConfig, world: World) -> WorldBatch:
    """The next prompts, each ``samples_per_prompt`` times in a row, with a sample id that no layout changes."""
    copies = config.samples_per_prompt
    local = prompts.next(config.prompts_per_step, world.rank, world.size)
    repeated = local.select([row for row in range(local.num_rows) for _ in range(copies)])
    copy = torch.arange(repeated.num_rows) % copies
    return WorldBatch.gather(repeated.with_fields(per_row={"sample_id": repeated.per_row["sample_id"] * copies + copy}))


def minibatches(batch: WorldBatch, config: OnPolicyConfig, seed: int, step: int) -> Iterator[list[int]]:
    """Global row ids of each update: every epoch in a fresh order keyed by (seed, step, epoch).

    ``balance_minibatches``: rows are dealt longest first, forth and back, so that the minibatches of an epoch have
    as many rows as ever and nearly the same tokens.
    """
    lengths, size = batch.row_lengths, config.minibatch_size
    for epoch in range(config.epochs):
        generator = keyed_generator(seed, "minibatches", step, epoch)
        order = torch.randperm(batch.num_rows, generator=generator).tolist()
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        if config.balance_minibatches:
            order.sort(key=lambda row: -lengths[row])  # stable: equal lengths stay in the random order
            count = len(parts)
            rounds = [order[start : start + count] for start in range(0, len(order), count)]
            dealt = [one if index % 2 == 0 else one[::-1] for index, one in enumerate(rounds)]
            parts = [[one[place] for one in dealt if place < len(one)] for place in range(count)]
        yield from parts


def averages(updates: Sequence[Metrics]) -> Metrics:
    """The mean of each metric over the updates that have it."""
    found = {name: [update[name] for update in updates if name in update] for update in updates for name in update}
    return {name: sum(values) / len(values) for name, values in found.items()}


def prefixed(prefix: str, metrics: Metrics) -> Metrics:
    """``metrics`` under ``prefix``."""
    return {prefix + name: value for name, value in metrics.items()}


def as_rows(answer: Rows | Tensor) -> Rows:
    """A role's answer that has a value a token."""
    if not isinstance(answer, Rows):
        raise TypeError("expected a value a token")
    return answer


def as_tensor(answer: Rows | Tensor) -> Tensor:
    """A role's answer that has a value a row."""
    if isinstance(answer, Rows):
        raise TypeError("expected a value a row")
    return answer


def describe_samples(samples: Batch, raw_scores_R: Tensor, scores_R: Tensor) -> Metrics:
    """What a person watches of any samples, over the whole world: scores, lengths, endings, repetition."""
    lengths_R, scores = response_lengths(samples.per_token["response_mask"]).double(), raw_scores_R.double()
    masks = samples.per_token["response_mask"].split()
    repeated = [repetition(tokens[mask.bool()]) for tokens, mask in zip(samples.tokens.split(), masks, strict=True)]
    entries = [
        torch.tensor(float(samples.num_rows), dtype=torch.float64),
        lengths_R.sum(),
        scores.sum(),
        scores_R.double().sum(),
        samples.per_row["truncated"].double().sum(),
        torch.tensor(sum(repeated), dtype=torch.float64),
        lengths_R.square().sum(),
        scores.square().sum(),
        (lengths_R * scores).sum(),
    ]
    sums = [float(value) for value in world_sum(torch.stack(entries))]
    rows, tokens, raw, scaled, truncated, repeats = sums[:6]
    return {
        "score": raw / rows,
        "score_scaled": scaled / rows,
        "response_length": tokens / rows,
        "truncated": truncated / rows,
        "repetition": repeats / rows,
        "length_correlation": _correlation(rows, tokens, raw, *sums[6:]),
        "tokens": tokens,
    }


def _correlation(count: float, x: float, y: float, xx: float, yy: float, xy: float) -> float:
    """Pearson's, from sums; 0 where a side does not vary."""
    spread_x, spread_y = xx / count - (x / count) ** 2, yy / count - (y / count) ** 2
    if spread_x <= 1e-12 * max(xx / count, 1e-12) or spread_y <= 1e-12 * max(yy / count, 1e-12):
        return 0.0
    return float((xy / count - x / count * y / count) / (spread_x * spread_y) ** 0.5)


def describe_policy(samples: Batch, logprobs: Rows, ref_logprobs: Rows) -> Metrics:
    """KL to the reference (k1 a sequence and a token, k3 a token), and the entropy that sampling saw.

    The entropy is minus the mean log-probability of the drawn tokens: unbiased where nothing cuts the distribution.
    """
    mask_T = samples.per_token["response_mask"].values.bool()
    difference_T = (logprobs.values - ref_logprobs.values) * mask_T
    entries = [
        torch.tensor(float(samples.num_rows), dtype=torch.float64),
        mask_T.double().sum(),
        difference_T.double().sum(),
        approx_kl(-difference_T).double().sum(),
        -(logprobs.values * mask_T).double().sum(),
    ]
    rows, tokens, kl, k3, surprise = (float(value) for value in world_sum(torch.stack(entries)))
    tokens = max(tokens, 1.0)
    return {"kl": kl / rows, "kl_per_token": kl / tokens, "kl_k3": k3 / tokens, "entropy": surprise / tokens}


def measure_parity(samples: Batch, logprobs: Rows) -> Metrics:
    """Training-side against sampling log-probabilities of the same tokens: mean and largest difference, and k3."""
    mask_T = samples.per_token["response_mask"].values.bool()
    drift_T = (logprobs.values - samples.per_token["sampling_logprobs"].values) * mask_T
    sums = world_sum(
        torch.stack([mask_T.double().sum(), drift_T.abs().double().sum(), approx_kl(drift_T.double()).sum()])
    )
    tokens = max(float(sums[0]), 1.0)
    largest = world_max(float(drift_T.abs().max()) if len(drift_T) else 0.0)
    return {"parity/mean": float(sums[1]) / tokens, "parity/max": largest, "parity/k3": float(sums[2]) / tokens}


def require_parity(metrics: Metrics, limits: ParityConfig) -> None:
    """Raise ParityError where a limit is passed, or a difference is not a number."""
    beyond = [
        f"parity/{name} = {metrics[f'parity/{name}']:.3g} > algorithm.parity.{name} = {limit:g}"
        for name, limit in vars(limits).items()
        if limit is not None and not metrics[f"parity/{name}"] <= limit
    ]
    if beyond:
        raise ParityError(
            "the rollout's log-probabilities are not those of the training pass on the same tokens: "
            + "; ".join(beyond)
            + ". The samples are not from the policy that learns from them. A repetition penalty or min_new_tokens "
            "changes what is sampled from; low precision or another kernel in one of the two passes does too. Raise "
            "the limit, correct with algorithm.importance_cap, or set the limit to null"
        )
