"""Reward models and DPO equal plain torch on every layout, whatever their loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.algorithms import preference_world as world
from tests.algorithms.layouts import LAYOUTS, MORE_LAYOUTS
from tests.algorithms.ppo_world import History, differences
from tests.helpers.ranks import run_ranks

TOLERANCE = 2e-5
EVERY = {**LAYOUTS, **MORE_LAYOUTS}
NAMES = [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_LAYOUTS)]
ALONE = [
    name for name in NAMES if not EVERY[name if isinstance(name, str) else str(name.values[0])].placements
]  # a reward model has no other to be split from


@pytest.fixture(scope="module")
def rewards() -> dict[str, History]:
    return {name: world.plain_reward(options) for name, options in world.REWARD_LOSSES.items()}


@pytest.fixture(scope="module")
def preferences() -> dict[str, History]:
    return {name: world.plain_dpo(config) for name, config in world.DPO_CONFIGS.items()}


def _check(name: str, found: History, expected: History) -> None:
    off = differences(found, expected)
    worst = max(off, key=lambda key: off[key])
    assert off[worst] <= TOLERANCE, (name, worst, off[worst])


@pytest.mark.parametrize("layout", ALONE)
def test_reward_models_equal_plain_torch(layout: str, rewards: dict[str, Any]) -> None:
    place = EVERY[layout]
    for histories in run_ranks(place.world, world.run_reward, place, list(world.REWARD_LOSSES.values())):
        for (name, expected), found in zip(rewards.items(), histories, strict=True):
            _check(name, found, expected)
            held = "centering" not in world.REWARD_LOSSES[name]  # to the bit: its gradient is nothing but rounding
            assert (float(found[-1]["reward/score_head.bias"]) == 0.0) == held


@pytest.mark.parametrize("layout", NAMES)
def test_dpo_equals_plain_torch(layout: str, preferences: dict[str, Any]) -> None:
    # a group of four does not fit a micro-batch of 12 tokens, and need not
    place = replace(EVERY[layout], engine=replace(EVERY[layout].engine, micro_batch_tokens=12))
    if place.placements:
        place = replace(place, where={"actor": "policy", "reference": "judges"})
    for histories in run_ranks(place.world, world.run_dpo, place, list(world.DPO_CONFIGS.values())):
        for (name, expected), found in zip(preferences.items(), histories, strict=True):
            _check(name, found, expected)
