"""A checkpoint that is complete stays, whatever goes wrong around it; one that is being written gets its chance."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_zj.checkpoint import retention
from megatron_zj.checkpoint import save as saving
from megatron_zj.checkpoint.errors import CheckpointError
from megatron_zj.checkpoint.load import load, newest
from megatron_zj.config.parallel import ParallelConfig
from tests.checkpoint.toy import checkpointer, tokenizer, toy
from tests.helpers.ranks import run_ranks


def _save_lower(root: Path) -> list[str]:
    model = toy(ParallelConfig(), 1)
    writer = checkpointer(root, keep_last=2)
    for step in (80, 100, 50):  # 50: of another run in the same folder
        writer.save(step, {"model": model}, {})
    return sorted(path.name for path in root.iterdir())


def test_the_step_just_saved_is_kept_though_higher_ones_exist(tmp_path: Path) -> None:
    assert run_ranks(1, _save_lower, tmp_path) == [["step_00000050", "step_00000080", "step_00000100"]]


def _save_beside_a_stuck_folder(root: Path) -> list[list[str]]:
    model, seen = toy(ParallelConfig(), 1), []
    for step in (1, 2):
        checkpointer(root).save(step, {"model": model}, {})
    original = retention.shutil.rmtree

    def stuck(folder: Path) -> None:
        if folder.name.endswith("1"):
            raise OSError(39, "Directory not empty", str(folder))
        original(folder)

    for step, remove in ((3, stuck), (4, original)):
        retention.shutil.rmtree = remove  # this process is a fork of the test's
        checkpointer(root, keep_last=1).save(step, {"model": model}, {})
        seen.append(sorted(path.name[-1] for path in root.iterdir()))
    return seen


def test_a_folder_that_cannot_be_deleted_harms_no_new_checkpoint_and_is_tried_again(tmp_path: Path) -> None:
    assert run_ranks(1, _save_beside_a_stuck_folder, tmp_path) == [[["1", "3"], ["4"]]]
    assert newest(tmp_path) == tmp_path / "step_00000004"


def _save_with_a_fault_at_the_end(root: Path, name: str) -> tuple[str, list[str]]:
    model = toy(ParallelConfig(), 1)
    writer = checkpointer(root, keep_last=1)
    writer.save(1, {"model": model}, {})

    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    setattr(retention, name, fail)
    message = ""
    try:
        writer.save(2, {"model": model}, {})
    except CheckpointError as error:
        message = str(error)
    return message, [path.name for path in retention.complete_steps(root).values()]


@pytest.mark.parametrize(("name", "words"), [("prune", ""), ("promote", "Input/output error")])
def test_an_error_after_the_manifest_leaves_the_new_checkpoint_in_force(tmp_path: Path, name: str, words: str) -> None:
    ((message, steps),) = run_ranks(1, _save_with_a_fault_at_the_end, tmp_path, name)
    assert words in message
    assert bool(words) == bool(message)
    assert steps == ["step_00000001", "step_00000002"]


def _unsynced(root: Path, with_tokenizer: Any) -> list[str]:
    synced, original = set(), os.fsync

    def fsync(descriptor: int) -> None:
        original(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    os.fsync = fsync
    checkpointer(root, with_tokenizer).save(1, {"model": toy(ParallelConfig(), 1)}, {"n": 1})
    return [str(path) for path in root.rglob("*") if path.stat().st_ino not in synced]


def test_every_file_and_folder_of_a_checkpoint_has_reached_the_disk(tmp_path: Path) -> None:
    assert run_ranks(1, _unsynced, tmp_path, tokenizer()) == [[]]


def _fail_while_saving(root: Path, seconds: tuple[float, float], patience: float) -> tuple[float, str | None]:
    """Each rank needs its own time to write; ``patience`` < 0: rank 1 dies instead of waiting."""
    model, original = toy(ParallelConfig(tp=2), 1), saving._write
    writer = checkpointer(root, async_save=True)
    writer.save(1, {"model": model}, {"n": 1})
    writer.wait()

    def slow(save: Any) -> None:
        time.sleep(seconds[dist.get_rank()])
        original(save)

    saving._write = slow
    writer.save(2, {"model": model}, {"n": 2})
    start = time.monotonic()
    if patience > 0 or dist.get_rank() == 0:
        writer.wait_alone(abs(patience))
    waited, found = time.monotonic() - start, newest(root)
    return waited, found and found.name  # the process ends here, and its background thread with it


def test_a_save_that_is_being_written_when_the_run_fails_is_completed_before_any_rank_leaves(tmp_path: Path) -> None:
    for waited, found in run_ranks(2, _fail_while_saving, tmp_path, (0.2, 0.8), 20.0):
        assert found == "step_00000002"
        assert waited < 10
    assert run_ranks(1, _load_step, tmp_path) == [2]


def _load_step(root: Path) -> int:
    return int(load(root, {"model": toy(ParallelConfig(), 9)})["n"])


def test_without_the_files_of_a_dead_rank_it_does_not_count_and_nobody_waits_long(tmp_path: Path) -> None:
    (waited, found), _ = run_ranks(2, _fail_while_saving, tmp_path, (0.0, 60.0), -1.0)
    assert 0.9 < waited < 10
    assert found == "step_00000001"
    assert run_ranks(1, _load_step, tmp_path) == [1]
