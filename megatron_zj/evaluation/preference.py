"""The reward model on held-out rankings: pair accuracy, calibration, and whether it merely likes length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from megatron_zj.algorithms.functional import wins
from megatron_zj.evaluation.metrics import Interval, bootstrap, pearson
from megatron_zj.evaluation.model import checked


@dataclass(frozen=True)
class RankedScores:
    """One prompt: a score, a rank (smaller is better, ties equal) and a length (tokens) a response."""

    scores: tuple[float, ...]
    ranks: tuple[float, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Bin:
    """Pairs whose confidence, the larger of sigmoid(difference) and its complement, lies in one bin."""

    low: float
    high: float
    confidence: float  # mean
    accuracy: float
    num_pairs: int


@dataclass(frozen=True)
class PreferenceResult:
    """Over all pairs of unequal rank; equal scores count as half right."""

    pair_accuracy: float
    interval: Interval  # over prompts
    by_rank_gap: dict[str, float]
    num_pairs: int
    num_tied_pairs: int  # of equal rank: not counted
    longer_wins: float  # accuracy of preferring the longer answer
    length_correlation: float  # Pearson, score and length, all responses
    length_correlation_in_group: float  # the same after each prompt's means are taken off
    calibration_error: float  # ECE: mean |confidence - accuracy| weighted by pairs
    reliability: list[Bin]
    score_mean: float
    score_deviation: float


def grouped(scores: Sequence[float], ranks: Sequence[Sequence[float]], lengths: Sequence[int]) -> list[RankedScores]:
    """Flat scores and lengths, in the order of the groups' responses, back into groups."""
    total = sum(len(group) for group in ranks)
    flat, start, groups = checked(scores, total, "score_rows"), 0, []
    if len(lengths) != total:
        raise ValueError(f"{len(lengths)} lengths for {total} responses")
    for group in ranks:
        end = start + len(group)
        groups.append(RankedScores(tuple(flat[start:end]), tuple(group), tuple(lengths[start:end])))
        start = end
    return groups


def rate(groups: Sequence[RankedScores], num_bins: int = 10) -> PreferenceResult:
    """Compare the scores with the ranks.  Raises ValueError when no pair differs in rank."""
    right: list[float] = []
    longer: list[float] = []
    confidences: list[float] = []
    gaps: dict[float, list[float]] = {}
    per_prompt: list[float] = []
    tied = 0
    for group in groups:
        first = len(right)
        for one, two in combinations(range(len(group.ranks)), 2):
            if group.ranks[one] == group.ranks[two]:
                tied += 1
                continue
            better, worse = (one, two) if group.ranks[one] < group.ranks[two] else (two, one)
            difference = group.scores[better] - group.scores[worse]
            right.append(_wins(difference))
            longer.append(_wins(group.lengths[better] - group.lengths[worse]))
            confidences.append(1 / (1 + math.exp(-min(abs(difference), 700.0))))
            gaps.setdefault(group.ranks[worse] - group.ranks[better], []).append(right[-1])
        if len(right) > first:
            per_prompt.append(_mean(right[first:]))
    if not right:
        raise ValueError("no pair of responses has unequal ranks: there is nothing to rate")
    scores = [score for group in groups for score in group.scores]
    mean = _mean(scores)
    bins = _reliability(confidences, right, num_bins)
    return PreferenceResult(
        pair_accuracy=_mean(right),
        interval=bootstrap(per_prompt),
        by_rank_gap={f"{gap:g}": _mean(values) for gap, values in sorted(gaps.items())},
        num_pairs=len(right),
        num_tied_pairs=tied,
        longer_wins=_mean(longer),
        length_correlation=pearson(scores, [float(n) for group in groups for n in group.lengths]),
        length_correlation_in_group=_within(groups),
        calibration_error=sum(one.num_pairs * abs(one.confidence - one.accuracy) for one in bins) / len(right),
        reliability=bins,
        score_mean=mean,
        score_deviation=math.sqrt(_mean([(score - mean) ** 2 for score in scores])),
    )


def _reliability(confidences: Sequence[float], right: Sequence[float], num_bins: int) -> list[Bin]:
    """Equal bins of [0.5, 1]; empty ones are left out."""
    members: dict[int, list[int]] = {}
    for index, confidence in enumerate(confidences):
        members.setdefault(min(num_bins - 1, int((confidence - 0.5) * 2 * num_bins)), []).append(index)
    width = 0.5 / num_bins
    return [
        Bin(
            low=0.5 + place * width,
            high=0.5 + (place + 1) * width,
            confidence=_mean([confidences[index] for index in found]),
            accuracy=_mean([right[index] for index in found]),
            num_pairs=len(found),
        )
        for place, found in sorted(members.items())
    ]


def _within(groups: Sequence[RankedScores]) -> float:
    scores = [score - _mean(group.scores) for group in groups for score in group.scores]
    lengths = [length - _mean(group.lengths) for group in groups for length in group.lengths]
    return pearson(scores, lengths)


def _wins(difference: float) -> float:
    return float(wins(torch.tensor(difference)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
