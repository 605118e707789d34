"""Reward models and DPO equal plain torch on every layout, whatever their loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_zj.config.optim import EngineConfig
from megatron_zj.config.parallel import ParallelConfig
from tests.algorithms import preference_world as world
from tests.algorithms.ppo_world import differences
from tests.helpers.ranks import run_ranks

ENGINE = EngineConfig(micro_batch_tokens=48)
TOLERANCE = 2e-5
LAYOUTS = {
    "one rank": (1, ParallelConfig(), ENGINE),
    "tp2 sp": (2, ParallelConfig(tp=2, sequence_parallel=True), ENGINE),
    "tp2": (2, ParallelConfig(tp=2), ENGINE),
    "pp2": (2, ParallelConfig(pp=2), ENGINE),
    "dp2": (2, ParallelConfig(), dataclasses.replace(ENGINE, distributed_optimizer=True)),
    "cp2": (2, ParallelConfig(cp=2), ENGINE),
}


@pytest.fixture(scope="module")
def rewards() -> dict[str, list[dict[str, float]]]:
    return {name: world.plain_reward(options) for name, options in world.REWARD_LOSSES.items()}


@pytest.fixture(scope="module")
def preferences() -> dict[str, list[dict[str, float]]]:
    return {name: world.plain_dpo(config) for name, config in world.DPO_CONFIGS.items()}


def _check(name: str, found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    off = differences(found, expected)
    worst = max(off, key=lambda key: off[key])
    assert off[worst] <= TOLERANCE, (name, worst, off[worst])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reward_models_equal_plain_torch(layout: str, rewards: dict[str, Any]) -> None:
    size, parallel, engine = LAYOUTS[layout]
    names = [name for name in rewards if parallel.cp == 1 or name != "per_token"]
    for histories in run_ranks(size, world.run_reward, parallel, engine, [world.REWARD_LOSSES[n] for n in names]):
        for name, found in zip(names, histories, strict=True):
            _check(name, found, rewards[name])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dpo_equals_plain_torch(layout: str, preferences: dict[str, Any]) -> None:
    size, parallel, engine = LAYOUTS[layout]
    # a group of four does not fit a micro-batch of 12 tokens, and need not
    engine = dataclasses.replace(engine, micro_batch_tokens=12)
    for histories in run_ranks(size, world.run_dpo, parallel, engine, list(world.DPO_CONFIGS.values())):
        for (name, expected), found in zip(preferences.items(), histories, strict=True):
            _check(name, found, expected)
