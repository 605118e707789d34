"""500 sampled tokens are the same on every layout: no rounding has tipped a draw."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_zj.config.sampling import SamplingConfig
from megatron_zj.engine.build import build_engine
from megatron_zj.roles.exchange import Exchange
from megatron_zj.roles.placement import build_placements
from megatron_zj.roles.role import Role
from megatron_zj.roles.world import World, WorldBatch, gather_in_order
from megatron_zj.rollout.generate import Rollout
from tests.algorithms.layouts import LAYOUTS, Layout
from tests.algorithms.ppo_world import MODEL, RUN_SEED, STOP, Prompts
from tests.helpers.ranks import run_ranks

LONG = dataclasses.replace(MODEL, max_position_embeddings=512)
SAMPLING = SamplingConfig(max_new_tokens=500, min_new_tokens=485, temperature=1.0)
QUICK = ("tp2 sp",)


def _sample(layout: Layout) -> list[list[int]]:
    world, name = World.current(), layout.where.get("actor", "all")
    placement = build_placements(layout.parallel, layout.placements, {name}, world.size, 60)[name]
    engine = None
    if placement.groups is not None:
        engine = build_engine(LONG, "lm", placement.groups, layout.engine, None, 1, torch.device("cpu"), 5)
    prompts = WorldBatch.gather(Prompts().next(6, world.rank, world.size))
    rollout = Rollout(SAMPLING, frozenset({STOP}), RUN_SEED)
    actor = Role("actor", placement, engine, Exchange())  # keeps what it sends alive until it has left
    samples = actor.generate(rollout.at_step(0), prompts)
    return gather_in_order([row.tolist() for row in samples.local.tokens.split()])


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    [rows] = run_ranks(1, _sample, Layout())
    assert {row[-1] == STOP for row in rows} == {True, False}  # some end by themselves, some by the limit
    assert max(len(row) for row in rows) > 500
    return rows


@pytest.mark.parametrize(
    "layout", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_long_samples_are_those_of_one_rank(layout: str, alone: list[list[int]]) -> None:
    for rows in run_ranks(LAYOUTS[layout].world, _sample, LAYOUTS[layout]):
        assert rows == alone
