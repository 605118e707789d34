"""``kill -9`` at any moment of a save or of a deletion leaves a checkpoint that loads."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_zj.checkpoint import retention
from megatron_zj.checkpoint.load import load
from megatron_zj.config.parallel import ParallelConfig
from tests.checkpoint.toy import checkpointer, toy
from tests.helpers.chance import chance
from tests.helpers.ranks import run_ranks

_FORK = multiprocessing.get_context("fork")


def _train(rank: int, folder: str, root: Path, asynchronous: bool) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=30))
    model = toy(ParallelConfig(tp=2), 0)
    state = {"step": 0}
    if retention.newest(root):
        state = load(root, {"model": model})
    writer = checkpointer(root, keep_last=1, async_save=asynchronous)
    for step in range(state["step"] + 1, 10_000):
        for tensor in model.tensors.values():
            tensor.fill_(float(step))
        model.common["step"] = step
        writer.save(step, {"model": model}, {"step": step})


def _consistent(root: Path) -> int:
    model = toy(ParallelConfig(), 0)
    step = int(load(root, {"model": model})["step"])
    assert model.common["step"] == step
    for tensor in model.tensors.values():
        assert torch.equal(tensor, torch.full_like(tensor, float(step)))
    return step


def _campaign(tmp_path: Path, kills: int, asynchronous: bool) -> None:
    root, last, pick = tmp_path / "checkpoints", 0, chance()
    for attempt in range(kills):
        folder = tmp_path / f"attempt{attempt}"
        folder.mkdir()
        ranks = [
            _FORK.Process(target=_train, args=(rank, str(folder), root, asynchronous), daemon=True) for rank in range(2)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + 30
        while retention.newest(root) in (None, retention.step_folder(root, last)) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(pick.uniform(0.0, 0.15))  # a save takes about 0.05 s: any moment of it
        for process in ranks:
            os.kill(process.pid or 0, signal.SIGKILL)
        for process in ranks:
            process.join()
        assert [process.exitcode for process in ranks] == [-signal.SIGKILL] * 2  # both were at work
        (step,) = run_ranks(1, _consistent, root)
        assert step > last
        last = step


@pytest.mark.parametrize("asynchronous", [False, True])
def test_killed_in_mid_save_the_newest_complete_checkpoint_loads_and_training_goes_on(
    tmp_path: Path, asynchronous: bool
) -> None:
    _campaign(tmp_path, kills=4, asynchronous=asynchronous)


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_hundred_kills_lose_nothing(tmp_path: Path, asynchronous: bool) -> None:
    _campaign(tmp_path, kills=100, asynchronous=asynchronous)
