"""GRPO and both forms of rejection sampling equal plain torch on every layout."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_zj.config.algorithm import GRPOConfig
from megatron_zj.config.sampling import SamplingConfig
from tests.algorithms import sampling_world
from tests.algorithms.layouts import LAYOUTS, MORE_LAYOUTS
from tests.algorithms.ppo_world import History, differences
from tests.helpers.ranks import run_ranks

TOLERANCE = 2e-5
Histories = dict[str, History]


@pytest.fixture(scope="module")
def plain() -> Histories:
    return sampling_world.plain_sampling()


@pytest.mark.parametrize("layout", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_LAYOUTS)])
def test_sampling_algorithms_equal_plain_torch(layout: str, plain: Histories) -> None:
    """Metrics, the sampled tokens, and every tensor of the actor."""
    place = {**LAYOUTS, **MORE_LAYOUTS}[layout]
    for histories in run_ranks(place.world, sampling_world.run_sampling, place):
        for name, expected in plain.items():
            off = differences(histories[name], expected)
            worst = max(off, key=lambda key: off[key])
            assert off[worst] <= TOLERANCE, (name, worst, off[worst])


def test_the_world_tells_the_forms_apart(plain: Histories) -> None:
    assert plain["best of n"][0]["score_best"] > plain["best of n"][0]["score_scaled"] + 0.1
    assert 0 < plain["scaled"][0]["truncated"] < 1
    assert plain["scaled"][1]["actor/kl_loss"] > 0


def test_the_signal_moves_the_policy_and_its_sign_the_other_way() -> None:
    config = GRPOConfig(
        sampling=SamplingConfig(max_new_tokens=9),
        prompts_per_step=8,
        samples_per_prompt=4,
        epochs=1,
        minibatch_size=16,
        kl_coef=0.0,
        rules={"ends": 20.0},  # drowns the model's own score
    )
    up, down = (
        run_ranks(1, sampling_world.learn_to_end, one, 15)[0]
        for one in (config, dataclasses.replace(config, rules={"ends": -20.0}))
    )
    assert up[0] == down[0]  # the same samples before anything is learned
    assert sum(up[-3:]) / 3 > up[0] + 0.2
    assert sum(down[-3:]) / 3 < 0.5 * down[0]
