"""How far a model has moved from a reference: the KL divergence, estimated from answers drawn from the model.

An answer to a prompt is drawn from the model, token by token, from p = softmax(logits / temperature) over the whole
vocabulary.  d_t = log p_model(t) - log p_reference(t) of its token t, eos included, both at that temperature.  The sum
of d_t over an answer (k1) is an unbiased estimate of KL(model || reference) between whole answers to that prompt; so is
the sum of k3 = exp(-d_t) - 1 + d_t, which is never negative and varies less where the two are near (Schulman 2020,
"Approximating KL divergence"); far apart exp(-d_t) has a heavy tail, and its standard error shows it.  Both hold on
draws from the model alone: greedy answers, or those of a cut distribution, give no KL.

The unit is nats an answer: the mean over answers of the sum over tokens, as PPO's and GRPO's metric ``kl``, which
``kl_target`` bounds, has it (``algorithms/experience.py``; its ``kl_k3`` is a mean over tokens, ``k3`` here is not).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch

from megatron_zj.algorithms.functional import estimate_kl
from megatron_zj.evaluation.model import checked


@dataclass(frozen=True)
class Divergence:
    """KL(model || reference) in nats an answer; standard errors are None for a single answer."""

    kl: float  # k1: of either sign, exactly 0 for a model against itself
    kl_standard_error: float | None
    k3: float  # never negative
    k3_standard_error: float | None
    tokens_an_answer: float  # mean; kl divided by it is nats a token


def divergence(logprobs: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]) -> Divergence:
    """From the log-probabilities (nats) of every answer's tokens under the model that drew them and the reference.

    ValueError: no answers, other numbers of answers or tokens, or a NaN.
    """
    if not logprobs or len(logprobs) != len(reference):
        raise ValueError(f"{len(logprobs)} answers of the model and {len(reference)} of the reference")
    k1, k3 = [], []
    for ours, theirs in zip(logprobs, reference, strict=True):
        pair = [torch.tensor(checked(side, len(ours), "a model"), dtype=torch.float64) for side in (ours, theirs)]
        k1.append(float(estimate_kl(pair[0], pair[1], "k1").sum()))
        k3.append(float(estimate_kl(pair[0], pair[1], "k3").sum()))
    return Divergence(fmean(k1), _error(k1), fmean(k3), _error(k3), fmean(len(one) for one in logprobs))


def _error(values: Sequence[float]) -> float | None:
    """Standard error of the mean."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
