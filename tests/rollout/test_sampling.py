"""Sampling draws from the distribution it says, and a sample's noise is its own."""

import math

import pytest
import torch

from megatron_zj.config.sampling import SamplingConfig
from megatron_zj.rollout.sampling import draw, keep_top_k, keep_top_p, penalize_repetition, sample_noise


def test_frequencies_follow_the_tempered_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    expected = torch.softmax(logits.double() / 0.7, -1)
    noise = torch.rand(40000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = draw(logits.expand(40000, 4), noise, SamplingConfig(temperature=0.7))
    found = torch.bincount(tokens, minlength=4) / 40000
    assert (found - expected).abs().max() < 0.01
    assert torch.allclose(logprobs, expected.log().float()[tokens], atol=1e-6)


def test_temperature_zero_is_greedy_with_plain_logprobs() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    tokens, logprobs = draw(logits, torch.tensor([0.99], dtype=torch.float64), SamplingConfig(temperature=0.0))
    assert tokens.tolist() == [1]
    assert logprobs.item() == pytest.approx(3 - math.log(1 + math.e**3 + math.e), abs=1e-6)


def test_top_k_keeps_k_and_top_p_the_fewest_that_reach_p() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25]]))
    assert torch.isfinite(keep_top_k(logits, 2)).tolist() == [[False, True, False, True]]
    assert torch.isfinite(keep_top_p(logits, 0.5)).tolist() == [[False, True, False, False]]
    assert torch.isfinite(keep_top_p(logits, 0.51)).tolist() == [[False, True, False, True]]
    assert torch.isfinite(keep_top_p(logits, 0.76)).tolist() == [[False, True, True, True]]
    assert keep_top_k(logits, 0) is logits
    assert keep_top_p(logits, 1.0) is logits


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]])
    for value in (0.0, 0.5, 1.0 - 1e-16, 1.0 - 2**-53):
        tokens, _ = draw(logits, torch.tensor([value], dtype=torch.float64), SamplingConfig())
        assert tokens.item() in (1, 3)


def test_noise_is_keyed_by_seed_step_and_sample() -> None:
    first = sample_noise(1, 2, 3, 8)
    assert torch.equal(first, sample_noise(1, 2, 3, 8))
    for other in ((0, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not torch.equal(first, sample_noise(*other, 8))


def test_repetition_penalty_lowers_what_was_seen() -> None:
    logits = torch.tensor([[2.0, -2.0, 2.0]])
    seen = torch.tensor([[True, True, False]])
    assert penalize_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0]]
