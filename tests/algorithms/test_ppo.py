"""PPO equals an independent plain-torch PPO, and the same numbers come out of every layout and placement."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_zj.config.optim import EngineConfig
from megatron_zj.config.parallel import ParallelConfig, PlacementConfig
from tests.algorithms import ppo_world
from tests.helpers.ranks import run_ranks

ENGINE = EngineConfig(micro_batch_tokens=64)
TOLERANCE = 2e-5
LAYOUTS = {
    "one rank": (1, ParallelConfig(), ENGINE, {}, {}),
    "small packs": (1, ParallelConfig(), EngineConfig(micro_batch_tokens=20), {}, {}),
    "tp2 sp": (2, ParallelConfig(tp=2, sequence_parallel=True), ENGINE, {}, {}),
    "pp2": (2, ParallelConfig(pp=2), ENGINE, {}, {}),
    "dp2": (2, ParallelConfig(), dataclasses.replace(ENGINE, distributed_optimizer=True), {}, {}),
    "cp2": (2, ParallelConfig(cp=2), ENGINE, {}, {}),
    "tp2 pp2": (4, ParallelConfig(tp=2, pp=2), ENGINE, {}, {}),
    "split 2 + 2": (
        4,
        ParallelConfig(),
        ENGINE,
        {
            "policy": PlacementConfig(first_rank=0, num_ranks=2, parallel=ParallelConfig(tp=2)),
            "judges": PlacementConfig(first_rank=2, num_ranks=2, parallel=ParallelConfig(pp=2)),
        },
        {"actor": "policy", "reference": "policy", "critic": "judges", "reward": "judges"},
    ),
}


@pytest.fixture(scope="module")
def plain() -> list[dict[str, float]]:
    history = ppo_world.plain_ppo()
    assert 0 < history[0]["truncated"] < 1  # both kinds of ending are in it
    assert any(history[1][f"{name}/clip_fraction"] > 0 for name in ("actor", "critic"))  # the clips bind
    assert abs(history[1]["kl"]) > 1e-3
    return history


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_iterations_equal_plain_torch(layout: str, plain: list[dict[str, float]]) -> None:
    world, parallel, engine, placements, where = LAYOUTS[layout]
    for found in run_ranks(world, ppo_world.run_ppo, parallel, engine, placements, where):
        differences = ppo_world.differences(found, plain)
        worst = max(differences, key=lambda name: differences[name])
        assert differences[worst] <= TOLERANCE, (worst, differences[worst])
