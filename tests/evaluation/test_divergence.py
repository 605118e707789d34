"""The KL estimate from answers: its definition by hand, and that it is an estimate of the KL."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_zj.algorithms.experience import describe_policy
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.evaluation.divergence import divergence
from tests.helpers.ranks import run_ranks


def test_kl_is_the_mean_over_answers_of_sums_over_tokens() -> None:
    """Answers of d = (1, -0.5) and (0.25): k1 0.5 and 0.25."""
    found = divergence([[-1.0, -2.0], [-0.5]], [[-2.0, -1.5], [-0.75]])
    k3 = [math.exp(-1.0) + math.exp(0.5) - 2 + 0.5, math.exp(-0.25) - 1 + 0.25]
    assert found.kl == pytest.approx(0.375, abs=1e-15)
    assert found.kl_standard_error == pytest.approx(0.125, abs=1e-15)  # |0.5 - 0.25| / 2, of two values
    assert found.k3 == pytest.approx(sum(k3) / 2, rel=1e-12)
    assert found.k3_standard_error == pytest.approx(abs(k3[0] - k3[1]) / 2, rel=1e-12)
    assert found.tokens_an_answer == 1.5


def test_one_answer_has_no_standard_error_and_wrong_numbers_are_refused() -> None:
    assert divergence([[-1.0]], [[-2.0]]).kl_standard_error is None
    for ours, theirs in (([], []), ([[-1.0]], []), ([[-1.0]], [[-1.0, -2.0]]), ([[math.nan]], [[-1.0]])):
        with pytest.raises(ValueError, match=r"answers|values|NaN"):
            divergence(ours, theirs)


def test_both_estimates_find_the_kl_of_known_distributions() -> None:
    """Answers of 5 independent tokens from a table: KL of an answer = 5 x KL of a token, within 4 standard errors."""
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn((2, 9), generator=generator, dtype=torch.float64)
    ours, theirs = torch.log_softmax(logits, -1)
    truth = 5 * float((ours.exp() * (ours - theirs)).sum())
    drawn = torch.multinomial(ours.exp(), 20_000, replacement=True, generator=generator).view(-1, 5)
    found = divergence(ours[drawn].tolist(), theirs[drawn].tolist())
    assert found.kl_standard_error is not None
    assert found.k3_standard_error is not None
    assert found.kl_standard_error < truth / 20
    assert abs(found.kl - truth) < 4 * found.kl_standard_error
    assert abs(found.k3 - truth) < 4 * found.k3_standard_error


def _logged(lengths: list[int], prompts: list[int]) -> tuple[dict[str, float], Rows, Rows]:
    """What training logs about random log-probabilities of a policy and its reference."""
    generator = torch.Generator().manual_seed(3)
    ours, theirs = (Rows.of([-torch.rand(length, generator=generator) for length in lengths]) for _ in range(2))
    places = [torch.arange(length) for length in lengths]
    mask = Rows.of([(at >= prompt).long() for at, prompt in zip(places, prompts, strict=True)])
    return dict(describe_policy(Batch(mask, {"response_mask": mask}), ours, theirs)), ours, theirs


def test_it_is_the_number_that_training_logs_as_kl() -> None:
    """On the same samples.  Training's kl_k3 is a mean over tokens, k3 one over answers."""
    lengths, prompts = [7, 5, 6], [2, 4, 3]
    logged, ours, theirs = run_ranks(1, _logged, lengths, prompts)[0]
    tails = [[row[at:].tolist() for row, at in zip(one.split(), prompts, strict=True)] for one in (ours, theirs)]
    found = divergence(tails[0], tails[1])
    assert found.tokens_an_answer == 3.0
    assert found.kl == pytest.approx(logged["kl"], rel=1e-5)
    assert found.kl / 3 == pytest.approx(logged["kl_per_token"], rel=1e-5)
    assert found.k3 / 3 == pytest.approx(logged["kl_k3"], rel=1e-5)
