"""Ranks with one configuration, one run in a folder, and a folder whose checkpoints are not what they seem."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_zj.checkpoint import lock
from megatron_zj.checkpoint.errors import CheckpointError
from megatron_zj.checkpoint.lock import LOCK, alone
from megatron_zj.checkpoint.manifest import SAVING
from megatron_zj.cli.compose import compose_run
from megatron_zj.cli.train import train
from megatron_zj.config.loader import ConfigError
from megatron_zj.runtime.distributed import Process
from tests.cli.commands import zj
from tests.cli.conftest import train_argv
from tests.helpers.ranks import run_ranks
from tests.train import stages

_FORK = multiprocessing.get_context("fork")


def _refusal(commands: list[list[str]]) -> str:
    """What ``train`` says on this rank, which has a command of its own."""
    with pytest.raises(ConfigError) as caught:
        stages.run_stage(commands[dist.get_rank()])
    return str(caught.value)


@pytest.mark.parametrize(
    ("odd", "expected"),
    [
        (["optim.lr=0.1"], ["optim.lr: 0.1 on rank 1, 0.001 on rank 0"]),
        (["data.files=[a]"], ['data.files: ["a"] on rank 1, ["a", "b"] on rank 0']),
        (["run.seed=7", "run.num_steps=9"], ["run.seed: 7 on rank 1, 0 on rank 0", "run.num_steps: 9 on rank 1, "]),
        (["placements.x.num_ranks=1"], ["placements.x.num_ranks: 1 on rank 1, absent on rank 0"]),
    ],
)
def test_ranks_with_other_settings_are_refused_with_every_key(odd: list[str], expected: list[str]) -> None:
    """Before anything is built: else replicas differ in silence, or one rank waits for ever."""
    common = ["experiment=debug/sft", "data.files=[a,b]"]
    messages = run_ranks(2, _refusal, [common, common + odd], timeout=60)
    assert messages[0] == messages[1]  # one of them tells it
    assert messages[0].startswith("the ranks have different settings; start all with the same command line:\n")
    for line in expected:
        assert line in messages[0]


def _hold(folder: Path, held: Any, until: Any) -> None:
    with alone(folder):
        held.set()
        until.wait(60)


def test_a_second_run_in_a_folder_is_refused_until_the_first_one_is_dead(tmp_path: Path) -> None:
    config = compose_run(["experiment=debug/sft", f"run.dir={tmp_path}", "data.files=[a]"])
    process = Process(0, 0, 1, torch.device("cpu"))
    held, until = _FORK.Event(), _FORK.Event()
    first = _FORK.Process(target=_hold, args=(tmp_path, held, until))
    first.start()
    assert held.wait(60)
    with pytest.raises(CheckpointError) as caught:
        train(config, process)
    assert f"process {first.pid} on host {socket.gethostname()} trains in {tmp_path} already" in str(caught.value)
    assert "choose another run.dir" in str(caught.value)
    assert os.listdir(tmp_path) == [LOCK]  # nothing of the first one's was touched
    first.kill()
    first.join()
    for _ in range(2):  # one process trains in one folder again and again
        with alone(tmp_path):
            assert (tmp_path / LOCK).read_text() == f"{socket.gethostname()} {os.getpid()}\n"


def test_the_lock_of_a_node_that_died_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, until = _FORK.Event(), _FORK.Event()
    first = _FORK.Process(target=_hold, args=(tmp_path, held, until))
    first.start()
    assert held.wait(60)
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    with pytest.raises(CheckpointError, match=f"process {first.pid} on host"), alone(tmp_path, patience=0.3):
        pass
    monkeypatch.setattr(lock.time, "sleep", lambda _: until.set())
    with alone(tmp_path):
        pass
    first.join()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with alone(tmp_path):
        (tmp_path / "log.txt").touch()


def test_a_folder_whose_only_checkpoint_lost_its_manifest_is_not_started_anew(world: Path) -> None:
    shutil.copytree(world / "sft", world / "lost")
    step = world / "lost/checkpoints/step_00000001"
    (step / "manifest.json").unlink()
    kept = {path: path.read_bytes() for path in (world / "lost").rglob("*") if path.is_file() and path.suffix != ".txt"}
    outcome = zj(train_argv("sft", world, "lost", run__num_steps=1))
    assert outcome.code == 1
    assert f"{step} is a checkpoint that has lost its manifest.json, and there is no other" in outcome.error
    assert "choose another run.dir or remove that folder" in outcome.error
    assert {path: path.read_bytes() for path in kept} == kept
    (step / SAVING).touch()  # what a killed save leaves
    outcome = zj(train_argv("sft", world, "lost", run__num_steps=1))
    assert outcome.code == 0, outcome.output
    assert "step 1/1" in outcome.output
    assert not (step / SAVING).exists()


def test_a_copy_of_a_checkpoint_under_another_steps_name_is_not_resumed_from(world: Path) -> None:
    shutil.copytree(world / "sft", world / "renamed")
    steps = world / "renamed/checkpoints"
    shutil.copytree(steps / "step_00000001", steps / "step_00000099")
    outcome = zj(train_argv("sft", world, "renamed", run__num_steps=2))
    assert outcome.code == 1
    assert f"{steps}/step_00000099 holds step 1, so it was copied or renamed; move it out of {steps}" in outcome.error
