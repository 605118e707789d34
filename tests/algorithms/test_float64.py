"""The algorithm layer in float64: the same to 1e-9 as plain torch, however its rows are dealt to ranks and packs.

Every option that the algorithms act on is here.  Not here is what acts below them, in engine and rollout, which have no
float64 form: placements, offloading, and how an answer is decoded (KV cache, refilled slots, stop strings across token
boundaries); the fp32 tests hold those.  Answers are drawn a token at a time by the plain form's own sampler, so the
options of sampling act on what is learned from, and are not themselves under test.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_zj.config.algorithm import PPOConfig
from tests.algorithms import ppo_world, preference_world, sampling_world
from tests.algorithms.layouts import FLOAT64
from tests.algorithms.plain_ppo import PlainPPO
from tests.algorithms.ppo_world import History, differences
from tests.algorithms.test_ppo import OPTIONS, SAMPLING_OPTIONS
from tests.helpers.ranks import run_ranks

TOLERANCE = 1e-9
EXACT = torch.float64
LAYOUTS = [name if "three" in name else pytest.param(name, marks=pytest.mark.slow) for name in FLOAT64]
CONFIGS: list[PPOConfig] = [
    ppo_world.PPO_CONFIG,
    *(dataclasses.replace(ppo_world.PPO_CONFIG, **changes) for changes in (*OPTIONS.values(), SAMPLING_OPTIONS)),
]


def _check(found: History, expected: History) -> None:
    off = differences(found, expected)
    worst = max(off, key=lambda key: off[key])
    assert off[worst] <= TOLERANCE, (worst, off[worst])


@pytest.fixture(scope="module")
def plain_ppo() -> list[History]:
    return [PlainPPO(config, EXACT).run() for config in CONFIGS]


@pytest.fixture(scope="module")
def plain_others() -> dict[str, History]:
    found = sampling_world.plain_sampling(EXACT)
    found |= {name: preference_world.plain_reward(o, EXACT) for name, o in preference_world.REWARD_LOSSES.items()}
    return found | {name: preference_world.plain_dpo(c, EXACT) for name, c in preference_world.DPO_CONFIGS.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ppo_and_all_its_options(layout: str, plain_ppo: list[History]) -> None:
    place = FLOAT64[layout]
    for histories in run_ranks(place.world, ppo_world.run_ppo, place, CONFIGS):
        for found, expected in zip(histories, plain_ppo, strict=True):
            _check(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_other_algorithms(layout: str, plain_others: dict[str, History]) -> None:
    place, losses, dpo = FLOAT64[layout], preference_world.REWARD_LOSSES, preference_world.DPO_CONFIGS
    sampled = run_ranks(place.world, sampling_world.run_sampling, place)[0]
    rewards = run_ranks(place.world, preference_world.run_reward, place, list(losses.values()))[0]
    preferred = run_ranks(place.world, preference_world.run_dpo, place, list(dpo.values()))[0]
    found = sampled | dict(zip(losses, rewards, strict=True)) | dict(zip(dpo, preferred, strict=True))
    assert set(found) == set(plain_others)
    for name, expected in plain_others.items():
        _check(found[name], expected)
