"""Equal rows have one score, whatever place in a pack they had: nothing is learned from, or ranked by, rounding.

Which places of a pack round differently depends on the machine, so here every second row certainly does.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megatron_zj.algorithms.experience import as_tensor
from megatron_zj.algorithms.grpo import GRPO
from megatron_zj.algorithms.rejection import BestOfAll
from megatron_zj.algorithms.shaping import Shaping
from megatron_zj.config.model import Want
from megatron_zj.config.optim import EngineConfig
from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.config.sampling import SamplingConfig
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.roles.exchange import Pending
from megatron_zj.roles.role import Role
from megatron_zj.roles.world import World, WorldBatch
from megatron_zj.runtime.timers import Timers
from tests.algorithms import ppo_world
from tests.algorithms.layouts import LAYOUTS, Layout
from tests.algorithms.sampling_world import BEST_OF_ALL, GRPO_CONFIGS, Dialogues
from tests.helpers.ranks import run_ranks


def _round_by_place(role: Role) -> None:
    """Every second score of a rank's rows is the next number up."""
    infer = role.infer

    def rounding(want: Want, batch: WorldBatch, temperature: float = 1.0) -> Pending[Rows | torch.Tensor]:
        scores = as_tensor(infer(want, batch, temperature).wait())
        up = torch.nextafter(scores, torch.full_like(scores, 9.0))
        found = torch.where(torch.arange(len(scores)) % 2 == 0, scores, up)
        return Pending(lambda: found)

    role.infer = rounding  # type: ignore[method-assign]


def _greedy_grpo(layout: Layout) -> tuple[dict[str, float], float]:
    """What an iteration measured, and how far any weight moved: a greedy policy answers a prompt the same each time."""
    config = dataclasses.replace(
        GRPO_CONFIGS["scaled"], sampling=SamplingConfig(max_new_tokens=5, temperature=0.0), kl_coef=0.0
    )
    roles = ppo_world.build_roles(["actor", "reference", "reward"], layout)
    _round_by_place(roles["reward"])
    engine = roles["actor"].engine
    assert engine is not None
    assert engine.optimizer is not None
    engine.optimizer.optim = dataclasses.replace(engine.optimizer.optim, weight_decay=0.0)
    rollout = ppo_world.build_rollout(config.sampling, layout)
    shaping, timers = Shaping(config, ppo_world.SCALE, ppo_world.decode), Timers(torch.device("cpu"))
    grpo = GRPO(config, roles, ppo_world.Prompts(), rollout, World.current(), ppo_world.RUN_SEED, timers, shaping)
    before = ppo_world.whole_weights(roles, ["actor"])
    metrics = grpo.step()
    after = ppo_world.whole_weights(roles, ["actor"])
    return metrics, max(float((after[name] - tensor).abs().max()) for name, tensor in before.items())


def _budget(tokens: int, world: int = 1) -> Layout:
    return Layout(world, engine=EngineConfig(micro_batch_tokens=tokens))


@pytest.mark.parametrize(
    "layout",
    [*(_budget(tokens) for tokens in (30, 50, 100)), LAYOUTS["tp2"], _budget(50, world=2)],
    ids=["30", "50", "100", "tp2", "dp2"],
)
def test_answers_that_are_all_equal_teach_nothing_and_break_nothing(layout: Layout) -> None:
    for metrics, moved in run_ranks(layout.world, _greedy_grpo, layout):
        assert metrics["actor/grad_norm"] == metrics["actor/loss"] == 0.0  # every advantage is 0
        assert moved == 0.0
        assert all(abs(value) < float("inf") for value in metrics.values())


class Copies(Dialogues):
    """The same dialogue 16 times."""

    num_units = 16

    def next(self, num_units: int, rank: int, world_size: int) -> Batch:
        draws = torch.arange(self.position, self.position + num_units)
        self.position += num_units
        mine = torch.tensor_split(draws, world_size)[rank]
        rows = Rows.of([[10, 11, 12, 13, 14, 15, 17]] * len(mine), torch.int64)
        mask = Rows.of([[0, 0, 1, 1, 1, 1, 1]] * len(mine), torch.int64)
        # the data's order is the reverse of the stream's in each half
        index = torch.where(mine < 8, 7 - mine, 23 - mine)
        return Batch(rows, {"loss_mask": mask}, {"draw": mine, "index": index})


def _kept(layout: Layout) -> list[Any]:
    config = dataclasses.replace(BEST_OF_ALL, keep=5, prompts_per_step=16)
    roles = ppo_world.build_roles(["actor", "reward"], layout)
    _round_by_place(roles["reward"])
    timers = Timers(torch.device("cpu"))
    best = BestOfAll(config, roles, Copies(), World.current(), ppo_world.RUN_SEED, timers)
    best.step()
    return best.kept


@pytest.mark.parametrize(
    "layout",
    [*(_budget(tokens) for tokens in (12, 50, 64, 100, 170)), _budget(50, world=2), Layout(2, ParallelConfig(tp=2))],
    ids=["12", "50", "64", "100", "170", "dp2", "tp2"],
)
def test_of_equal_dialogues_the_first_in_the_data_are_kept(layout: Layout) -> None:
    for kept in run_ranks(layout.world, _kept, layout):
        assert [draw for draw, _ in kept] == [7, 6, 5, 4, 3]  # places 0 to 4 of the data
        assert len({score for _, score in kept}) == 1
