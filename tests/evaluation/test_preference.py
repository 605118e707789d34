"""Ratings of a reward model, against a loop over pairs and values worked by hand."""

from __future__ import annotations

import math
from random import Random

import pytest

from megatron_zj.evaluation.preference import RankedScores, grouped, rate


def test_pair_accuracy_overall_and_by_gap_by_hand() -> None:
    # ranks 0 1 1 2: five pairs count, one is tied; the scores get 1 (rank 1) against 3 (rank 2) wrong
    result = rate([RankedScores((4.0, 1.0, 3.0, 2.0), (0, 1, 1, 2), (9, 5, 6, 7))])
    assert result.num_pairs == 5
    assert result.num_tied_pairs == 1
    assert result.pair_accuracy == pytest.approx(4 / 5)
    assert result.by_rank_gap == {"1": pytest.approx(3 / 4), "2": 1.0}
    assert result.longer_wins == pytest.approx(3 / 5)
    assert result.score_mean == 2.5
    assert result.score_deviation == pytest.approx(math.sqrt(1.25))


def test_equal_scores_are_half_right_and_equal_lengths_half_longer() -> None:
    result = rate([RankedScores((1.0, 1.0), (0, 1), (5, 5))])
    assert result.pair_accuracy == result.longer_wins == 0.5


def test_scores_drawn_from_their_own_sigmoid_are_calibrated_and_inflated_ones_are_not() -> None:
    random = Random(0)
    honest, loud = [], []
    for _ in range(4000):
        difference = random.uniform(-3, 3)
        first_is_better = random.random() < 1 / (1 + math.exp(-difference))
        ranks = (0.0, 1.0) if first_is_better else (1.0, 0.0)
        honest.append(RankedScores((difference, 0.0), ranks, (1, 2)))
        loud.append(RankedScores((5 * difference, 0.0), ranks, (1, 2)))
    assert rate(honest).calibration_error < 0.02
    assert rate(loud).calibration_error > 0.1
    assert all(abs(one.confidence - one.accuracy) < 0.06 for one in rate(honest).reliability)


def test_a_model_that_only_likes_length_is_shown_by_its_correlation() -> None:
    groups = [RankedScores((2.0, 5.0, 9.0), (2, 1, 0), (2, 5, 9)), RankedScores((1.0, 30.0), (1, 0), (1, 30))]
    result = rate(groups)
    assert result.length_correlation == pytest.approx(1.0)
    assert result.length_correlation_in_group == pytest.approx(1.0)
    assert result.longer_wins == result.pair_accuracy == 1.0


def test_correlation_in_group_ignores_that_some_prompts_are_longer() -> None:
    groups = [RankedScores((1.0, 0.0), (0, 1), (1, 2)), RankedScores((11.0, 10.0), (0, 1), (11, 12))]
    result = rate(groups)
    assert result.length_correlation > 0.9
    assert result.length_correlation_in_group == pytest.approx(-1.0)


def test_flat_scores_go_back_to_their_groups() -> None:
    assert grouped([1, 2, 3], [(0, 1), (0,)], [4, 5, 6]) == [
        RankedScores((1.0, 2.0), (0, 1), (4, 5)),
        RankedScores((3.0,), (0,), (6,)),
    ]
    with pytest.raises(ValueError, match="2 values for 3"):
        grouped([1, 2], [(0, 1), (0,)], [4, 5, 6])


def test_only_ties_is_an_error_and_huge_differences_do_not_overflow() -> None:
    with pytest.raises(ValueError, match="unequal ranks"):
        rate([RankedScores((1.0, 2.0), (0, 0), (1, 1))])
    assert rate([RankedScores((1e6, -1e6), (0, 1), (1, 1))]).calibration_error == pytest.approx(0.0)
