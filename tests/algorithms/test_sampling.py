"""GRPO and both forms of rejection sampling equal plain torch on every layout."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_zj.config.optim import EngineConfig
from megatron_zj.config.parallel import ParallelConfig
from tests.algorithms import sampling_world
from tests.algorithms.ppo_world import differences
from tests.helpers.ranks import run_ranks

ENGINE = EngineConfig(micro_batch_tokens=48)
TOLERANCE = 2e-5
LAYOUTS = {
    "one rank": (1, ParallelConfig(), ENGINE),
    "tp2 sp": (2, ParallelConfig(tp=2, sequence_parallel=True), ENGINE),
    "pp2": (2, ParallelConfig(pp=2), ENGINE),
    "dp2": (2, ParallelConfig(), dataclasses.replace(ENGINE, distributed_optimizer=True)),
    "cp2": (2, ParallelConfig(cp=2), ENGINE),
}
Histories = dict[str, list[dict[str, float]]]


@pytest.fixture(scope="module")
def plain() -> Histories:
    return sampling_world.plain_sampling()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sampling_algorithms_equal_plain_torch(layout: str, plain: Histories) -> None:
    for histories in run_ranks(LAYOUTS[layout][0], sampling_world.run_sampling, *LAYOUTS[layout][1:]):
        for name, expected in plain.items():
            off = differences(histories[name], expected)
            worst = max(off, key=lambda key: off[key])
            assert off[worst] <= TOLERANCE, (name, worst, off[worst])


def test_the_world_tells_the_forms_apart(plain: Histories) -> None:
    assert plain["best of n"][0]["score_best"] > plain["best of n"][0]["score_scaled"] + 0.1
    assert 0 < plain["scaled"][0]["truncated"] < 1
    assert plain["scaled"][1]["actor/kl_loss"] > 0
