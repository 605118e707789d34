"""Learning rates, worked by hand."""

from __future__ import annotations

import math

import pytest

from megatron_zj.config.optim import OptimConfig
from megatron_zj.engine.schedule import LearningRate


def _rates(num_steps: int, count: int, **fields: object) -> list[float]:
    rate = LearningRate.from_config(OptimConfig(lr=1.0, **fields), num_steps)  # type: ignore[arg-type]
    return [rate.at(step) for step in range(count)]


def test_warm_up_then_linear_to_the_minimum_and_no_further() -> None:
    rates = _rates(6, 8, schedule="linear", warmup_steps=2, min_lr=0.2)
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2])


def test_cosine_is_half_way_at_half_time() -> None:
    rates = _rates(100, 5, schedule="cosine", decay_steps=4, min_lr=0.1)
    assert rates[0] == 1.0
    assert rates[1] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rates[2] == pytest.approx(0.55)
    assert rates[4] == pytest.approx(0.1)


def test_constant_stays_whatever_the_number_of_steps() -> None:
    assert _rates(3, 6, schedule="constant", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_warm_up_as_long_as_the_run_says_what_to_change() -> None:
    with pytest.raises(ValueError, match=r"warmup_steps=5 leaves no step.*set optim\.decay_steps"):
        _rates(5, 1, schedule="cosine", warmup_steps=5)
