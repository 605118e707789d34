"""The formulas, against tables worked by hand and against finite differences of their definitions."""

import math

import pytest
import torch

from megatron_zj.algorithms import functional as f
from megatron_zj.data.batch import Rows


def test_policy_loss_takes_the_pessimistic_side() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    loss, clipped = f.clipped_policy_loss(ratio.log(), advantages, 0.2)
    assert loss.tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8, -2.2])
    assert clipped.tolist() == [1, 0, 0, 1, 0]


def test_rewards_hold_the_kl_everywhere_and_the_score_once() -> None:
    logprobs = Rows.of([[0.0, 0.0, -1.0, -2.0], [0.0, -3.0]], torch.float32)
    ref = Rows.of([[0.0, 0.0, -1.5, -1.0], [0.0, -3.0]], torch.float32)
    mask = Rows.of([[0, 0, 1, 1], [0, 0]])
    rewards = f.shape_rewards(torch.tensor([5.0, 7.0]), logprobs, ref, mask, 0.1)
    assert rewards.values.tolist() == pytest.approx([0, 0, -0.05, 5.0 + 0.1, 0, 0])


def test_advantages_of_a_worked_episode() -> None:
    """gamma 0.9, lambda 0.5; rewards 1, 0, 2; values 0.5, 1, 0.25 (worked by hand from the recursion)."""
    rewards = Rows.of([[0.0, 1.0, 0.0, 2.0], [0.0]], torch.float64)
    values = Rows.of([[9.0, 0.5, 1.0, 0.25], [9.0]], torch.float64)
    mask = Rows.of([[0, 1, 1, 1], [0]])
    advantages, returns = f.response_advantages(rewards, values, mask, 0.9, 0.5)
    delta = [1 + 0.9 * 1 - 0.5, 0 + 0.9 * 0.25 - 1, 2 - 0.25]
    third = delta[2]
    second = delta[1] + 0.45 * third
    first = delta[0] + 0.45 * second
    assert advantages.values.tolist() == pytest.approx([0, first, second, third, 0])
    assert returns.values.tolist() == pytest.approx([0, first + 0.5, second + 1.0, third + 0.25, 0])


def test_whitening_uses_only_the_masked_values() -> None:
    values, mask = torch.tensor([1.0, 100.0, 3.0, 5.0]), torch.tensor([1, 0, 1, 1])
    mean, deviation = f.mean_and_deviation(f.masked_sums(values, mask))
    assert (mean, deviation) == pytest.approx((3.0, math.sqrt(8 / 3)))
    white = f.whiten(values, mask, mean, deviation)
    assert white.tolist() == pytest.approx([-2 / math.sqrt(8 / 3), 0, 0, 2 / math.sqrt(8 / 3)])


def test_k3_is_never_negative_and_zero_at_equality() -> None:
    log_ratio = torch.linspace(-2, 2, 41, dtype=torch.float64)
    kl = f.approx_kl(log_ratio)
    assert (kl >= 0).all()
    assert kl[20] == 0
