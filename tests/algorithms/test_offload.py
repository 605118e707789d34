"""Offloading idle roles is invisible to PPO: not one bit of a metric changes."""

from __future__ import annotations

import dataclasses

from megatron_zj.config.optim import EngineConfig
from megatron_zj.config.parallel import ParallelConfig
from tests.algorithms import ppo_world
from tests.helpers.ranks import run_ranks


def test_offloading_idle_roles_changes_no_bit() -> None:
    engine = EngineConfig(
        micro_batch_tokens=64, distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
    )
    idle = dataclasses.replace(engine, offload_idle=True)
    plain, offloaded = (run_ranks(2, ppo_world.run_ppo, ParallelConfig(), one)[0] for one in (engine, idle))
    assert offloaded == plain
