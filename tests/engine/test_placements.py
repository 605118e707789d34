"""Two placements in one world: each builds, trains and saves by itself, at its own pace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from megatron_zj.config.optim import EngineConfig
from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.parallel.grid import RankGrid
from megatron_zj.parallel.groups import create_groups
from tests.engine.training import STEPS, Case, Squares, global_batch, make_engine, reference, shard_of
from tests.engine.whole_state import load_whole, save_whole
from tests.helpers.ranks import run_ranks

ENGINE = EngineConfig(micro_batch_tokens=40, distributed_optimizer=True)
CASES = {
    "a": Case(ParallelConfig(tp=2, sequence_parallel=True), ENGINE, "lm"),
    "b": Case(ParallelConfig(pp=2), replace(ENGINE, distributed_optimizer=False), "value"),
}


def _train() -> tuple[str, list[float], list[float]]:
    grids = {
        "a": RankGrid.from_config(CASES["a"].parallel, 0, 2),
        "b": RankGrid.from_config(CASES["b"].parallel, 2, 2),
    }
    placements = create_groups(grids, {name: case.parallel for name, case in CASES.items()}, 30)
    name, groups = next((name, groups) for name, groups in placements.items() if groups is not None)
    case = CASES[name]
    # Placement a builds two engines and takes five steps, b builds one and takes two: any wait for the other hangs.
    engine = make_engine(case, groups)
    count = STEPS if name == "a" else 2
    losses = [engine.update(Squares(case.head), shard_of(global_batch(step), groups))["loss"] for step in range(count)]
    resumed: list[float] = []
    if name == "a":
        other = make_engine(case, groups)
        load_whole(other, save_whole(engine))
        batch = shard_of(global_batch(9), groups)
        resumed = [one.update(Squares(case.head), batch)["loss"] for one in (engine, other)]
    dist.barrier()
    return name, losses, resumed


def test_two_placements_train_exactly_and_do_not_wait_for_each_other() -> None:
    results: list[Any] = run_ranks(4, _train, timeout=60.0)
    assert [name for name, *_ in results] == ["a", "a", "b", "b"]
    for name, losses, resumed in results:
        assert losses == pytest.approx(reference(CASES[name].head).losses[: len(losses)], abs=1e-6)
        assert len(set(resumed)) <= 1
