"""Measures of text and of counts.  Every one states its unit.

BLEU: Papineni et al. 2002, corpus level.  ROUGE: Lin 2004, F1.  Bootstrap: Efron 1979, percentile interval.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

Units = Sequence[Hashable]


@dataclass(frozen=True)
class Interval:
    """A mean with a percentile bootstrap interval over items."""

    mean: float
    low: float
    high: float
    confidence: float
    num_items: int


def characters(text: str) -> list[str]:
    """Units of Chinese text: its characters without white space."""
    return [character for character in text if not character.isspace()]


def micro(correct: Mapping[str, Sequence[bool]]) -> float:
    """Share of all items that are right, whatever their subject; 0 without items."""
    items = [value for values in correct.values() for value in values]
    return sum(items) / len(items) if items else 0.0


def macro(correct: Mapping[str, Sequence[bool]]) -> float:
    """Mean over subjects of the share that is right; a subject without items does not count."""
    shares = [sum(values) / len(values) for values in correct.values() if values]
    return sum(shares) / len(shares) if shares else 0.0


def bootstrap(values: Sequence[float], confidence: float = 0.95, samples: int = 1000, seed: int = 0) -> Interval:
    """Interval of the mean when the items are drawn again with replacement.  Raises ValueError without items."""
    if not values or not 0 < confidence < 1:
        raise ValueError(f"need items and 0 < confidence < 1, got {len(values)} items, confidence {confidence}")
    size, generator = len(values), torch.Generator().manual_seed(seed)
    items = torch.tensor(values, dtype=torch.float64)
    drawn = [items[torch.randint(size, (size,), generator=generator)].mean() for _ in range(samples)]
    means = sorted(float(mean) for mean in drawn)
    tail = (1 - confidence) / 2
    low, high = means[int(tail * (samples - 1))], means[math.ceil((1 - tail) * (samples - 1))]
    return Interval(sum(values) / size, low, high, confidence, size)


def ngrams(units: Units, order: int) -> Counter[tuple[Hashable, ...]]:
    """Counts of the n-grams of this order."""
    return Counter(tuple(units[start : start + order]) for start in range(len(units) - order + 1))


def corpus_bleu(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    weights: Sequence[float] = (0.25, 0.25, 0.25, 0.25),
    units: Callable[[str], Units] = characters,
) -> float:
    """BLEU in [0, 1] over all pairs: geometric mean of clipped n-gram precisions, brevity penalty.

    ``weights``: of the orders 1, 2 ...  A hypothesis has one or more references.  An order without any match makes it 0
    (no smoothing).
    """
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} reference lists")
    matched, total = [0] * len(weights), [0] * len(weights)
    length = reference_length = 0
    for text, golds in zip(hypotheses, references, strict=True):
        said, wanted = units(text), [units(gold) for gold in golds]
        length += len(said)
        reference_length += min((abs(len(gold) - len(said)), len(gold)) for gold in wanted)[1]
        for index in range(len(weights)):
            counts, best = ngrams(said, index + 1), Counter[tuple[Hashable, ...]]()
            for gold in wanted:
                best |= ngrams(gold, index + 1)
            matched[index] += sum((counts & best).values())
            total[index] += sum(counts.values())
    used = [index for index, weight in enumerate(weights) if weight > 0]
    if length == 0 or any(matched[index] == 0 for index in used):
        return 0.0
    precision = math.exp(sum(weights[index] * math.log(matched[index] / total[index]) for index in used))
    return precision * min(1.0, math.exp(1 - reference_length / length))


def f1(matched: float, said: float, wanted: float) -> float:
    """Harmonic mean of matched/said and matched/wanted; 0 where nothing matched."""
    return 2 * matched / (said + wanted) if matched else 0.0


def rouge_n(hypothesis: str, reference: str, order: int, units: Callable[[str], Units] = characters) -> float:
    """F1 of the n-grams that both hold, counted with repetition."""
    said, wanted = ngrams(units(hypothesis), order), ngrams(units(reference), order)
    return f1(sum((said & wanted).values()), sum(said.values()), sum(wanted.values()))


def rouge_l(hypothesis: str, reference: str, units: Callable[[str], Units] = characters) -> float:
    """F1 of the longest common subsequence."""
    said, wanted = units(hypothesis), units(reference)
    row = [0] * (len(wanted) + 1)
    for unit in said:
        diagonal = 0
        for index, other in enumerate(wanted, start=1):
            diagonal, row[index] = row[index], diagonal + 1 if unit == other else max(row[index], row[index - 1])
    return f1(row[-1], len(said), len(wanted))


def character_f1(hypothesis: str, reference: str) -> float:
    """F1 of the bags of characters (ROUGE-1 on characters)."""
    return rouge_n(hypothesis, reference, 1)


def pearson(one: Sequence[float], two: Sequence[float]) -> float:
    """Linear correlation; 0 where one side does not vary."""
    mean_one, mean_two = sum(one) / len(one), sum(two) / len(two)
    covariance = sum((a - mean_one) * (b - mean_two) for a, b in zip(one, two, strict=True))
    spread = math.sqrt(sum((a - mean_one) ** 2 for a in one) * sum((b - mean_two) ** 2 for b in two))
    return covariance / spread if spread > 0 else 0.0
