"""Text and count measures against values worked by hand and a published fixture."""

from __future__ import annotations

import math

import pytest

from megatron_zj.evaluation.metrics import (
    bootstrap,
    character_f1,
    corpus_bleu,
    macro,
    micro,
    pearson,
    rouge_l,
    rouge_n,
)

REFERENCE, HYPOTHESIS = "冠心病有什么症状", "冠心病的一百种症状"


def spaced(text: str) -> list[str]:
    """Characters with a space on either side of each, which ChiMed-GPT's evaluation counts as units too."""
    return list("".join(f" {character} " for character in text))


def test_bleu_gives_the_values_of_chimed_gpts_notebook_on_its_inflated_unit() -> None:
    def bleu(weights: tuple[float, ...]) -> float:
        return corpus_bleu([HYPOTHESIS], [[REFERENCE]], weights, units=spaced)

    assert bleu((0.5, 0.5)) == pytest.approx(0.71312, abs=1e-5)
    assert bleu((0.333, 0.333, 0.334)) == pytest.approx(0.64173, abs=1e-5)


def test_bleu_on_characters_by_hand() -> None:
    # 9 characters, 5 in common (冠心病症状); 8 bigrams, 冠心 心病 症状 in common; longer than the reference: no penalty
    assert corpus_bleu([HYPOTHESIS], [[REFERENCE]], (1.0,)) == pytest.approx(5 / 9)
    assert corpus_bleu([HYPOTHESIS], [[REFERENCE]], (0.5, 0.5)) == pytest.approx(math.sqrt(5 / 9 * 3 / 8))
    # all four characters right, half the length: exp(1 - 8 / 4)
    assert corpus_bleu(["冠心病有"], [[REFERENCE]], (1.0,)) == pytest.approx(math.exp(-1))
    assert corpus_bleu(["甲乙"], [["丙丁"]]) == 0.0
    assert corpus_bleu([""], [["丙丁"]]) == 0.0


def test_bleu_counts_a_repeated_word_no_more_often_than_the_reference_does() -> None:
    assert corpus_bleu(["病病病病"], [["病了一场"]], (1.0,)) == pytest.approx(0.25)


def test_bleu_takes_the_nearest_of_several_references() -> None:
    assert corpus_bleu(["甲乙丙"], [["甲乙丙丁戊己", "甲乙丙"]], (1.0,)) == pytest.approx(1.0)


def test_rouge_gives_the_values_of_chimed_gpts_notebook() -> None:
    other = "冠心病的表现"
    found = (rouge_n(other, REFERENCE, 1), rouge_n(other, REFERENCE, 2), rouge_l(other, REFERENCE))
    assert [round(value, 4) for value in found] == [0.4286, 0.3333, 0.4286]


def test_rouge_l_needs_the_order_and_the_character_bag_does_not() -> None:
    assert character_f1("乙甲", "甲乙") == 1.0
    assert rouge_l("乙甲", "甲乙") == 0.5
    assert rouge_l("", "甲乙") == 0.0


def test_micro_and_macro_by_hand() -> None:
    correct = {"a": [True, True, True, False], "b": [False], "empty": []}
    assert micro(correct) == pytest.approx(3 / 5)
    assert macro(correct) == pytest.approx((0.75 + 0.0) / 2)


def test_the_bootstrap_interval_is_about_the_normal_one_and_repeats() -> None:
    values = [1.0] * 60 + [0.0] * 40
    found = bootstrap(values)
    half = 1.96 * math.sqrt(0.6 * 0.4 / 100)
    assert found.mean == pytest.approx(0.6)
    assert found.low == pytest.approx(0.6 - half, abs=0.03)
    assert found.high == pytest.approx(0.6 + half, abs=0.03)
    assert bootstrap(values) == found
    with pytest.raises(ValueError, match="0 items"):
        bootstrap([])


def test_pearson_by_hand() -> None:
    assert pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)
    assert pearson([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert pearson([1, 2, 3], [5, 5, 5]) == 0.0
