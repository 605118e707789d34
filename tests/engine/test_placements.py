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
    # Half of the messages between two interleaved stages go through WORLD, by global rank.
    "interleaved": Case(ParallelConfig(pp=2, vpp=2), ENGINE, "lm"),
}


def _train(second: str) -> tuple[str, list[float], list[float]]:
    grids = {name: RankGrid.from_config(CASES[name].parallel, first, 2) for name, first in (("a", 0), (second, 2))}
    placements = create_groups(grids, {name: CASES[name].parallel for name in grids}, 30)
    name, groups = next((name, groups) for name, groups in placements.items() if groups is not None)
    case = CASES[name]
    # Placement a builds two engines and takes five steps, the other one and two: any wait for the other hangs.
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


@pytest.mark.parametrize("second", ["b", "interleaved"])
def test_two_placements_train_exactly_and_do_not_wait_for_each_other(second: str) -> None:
    results: list[Any] = run_ranks(4, _train, second, timeout=60.0)
    assert [name for name, *_ in results] == ["a", "a", second, second]
    for name, losses, resumed in results:
        assert losses == pytest.approx(reference(CASES[name].head).losses[: len(losses)], abs=1e-6)
        assert len(set(resumed)) <= 1


def _frees_outputs(parallel: ParallelConfig) -> bool:
    grid = RankGrid.from_config(parallel, 0, parallel.pp)
    groups = create_groups({"all": grid}, {"all": parallel}, 30)["all"]
    assert groups is not None
    chunks = make_engine(Case(parallel, ENGINE), groups).chunks
    (freed,) = {chunk.config.deallocate_pipeline_outputs for chunk in chunks}
    return bool(freed)


def test_interleaved_stages_keep_an_output_that_gloo_may_still_be_sending() -> None:
    assert run_ranks(2, _frees_outputs, ParallelConfig(pp=2, vpp=2)) == [False, False]
    assert run_ranks(2, _frees_outputs, ParallelConfig(pp=2)) == [True, True]
