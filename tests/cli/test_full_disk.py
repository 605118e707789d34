"""A full disk ends a whole command with the file, the disk and what to change; nothing is trained that cannot be kept.

``/dev/full`` behind a file's name answers every write with ENOSPC; RLIMIT_FSIZE stands in where files are new.
"""

from __future__ import annotations

import contextlib
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_zj.checkpoint.load import newest
from megatron_zj.cli.compose import compose_run
from megatron_zj.cli.train import _checkpoint_bytes
from tests.cli.commands import zj
from tests.cli.conftest import train_argv

FULL = Path("/dev/full")
SAVED = "the checkpoints saved before are complete"
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


def _full(path: Path) -> Path:
    """``path`` as a file that cannot grow."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(FULL)
    return path


@contextlib.contextmanager
def _small_files(size: int) -> Iterator[None]:
    """No file of this process and its children may be larger, in bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    disk = tmp_path / "tiny"
    disk.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a tmpfs is not permitted here; /dev/full stands in")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_log_that_cannot_be_written_is_said_once_and_the_run_goes_on(world: Path) -> None:
    path = _full(world / "full_log/log.txt")
    outcome = zj(train_argv("sft", world, "full_log", run__num_steps=2))
    assert outcome.code == 0
    assert outcome.output.count(f"{path}: No space left on device: the log goes on here only") == 1
    assert "step 2/2" in outcome.output
    assert "Traceback" not in outcome.output
    assert "Logging error" not in outcome.output


def test_a_file_that_cannot_be_written_is_named_with_its_disk(world: Path) -> None:
    _full(world / "full_config/.config.yaml.partial")
    error = zj(train_argv("sft", world, "full_config")).error
    assert error.startswith(f"error: {world}/full_config/config.yaml: No space left on device\n  the disk at /")
    assert "MiB free: free some space, or name a folder on another disk (run.dir" in error
    assert SAVED not in error  # there is none


def test_what_was_saved_before_is_said_only_where_it_is(world: Path) -> None:
    shutil.copytree(world / "sft", world / "full_later")
    _full(world / "full_later/.metrics.jsonl.partial")
    error = zj(train_argv("sft", world, "full_later", run__num_steps=2)).error
    assert f"{world}/full_later/metrics.jsonl: No space left on device" in error
    assert SAVED in error
    assert newest(world / "full_later") is not None


def test_answers_that_cannot_be_written_are_named(world: Path) -> None:
    _full(world / "full_answers/.answers.jsonl.partial")
    words = [f"checkpoint.load={world / 'sft'}", f"data.files=[{world / 'data/prompts.jsonl'}]", "limit=1"]
    outcome = zj(["generate", *words, f"run.dir={world / 'full_answers'}", "sampling.max_new_tokens=2"])
    assert f"{world}/full_answers/answers.jsonl: No space left on device" in outcome.error
    assert SAVED not in outcome.error


def test_a_conversion_that_does_not_fit_gets_advice_that_it_can_follow(world: Path) -> None:
    target = world / "full_hf"
    with _small_files(50_000):
        outcome = zj(["convert", "--from", world / "sft", "--to", target])
    assert f"no space left while writing {target} ({world}/.full_hf.partial/model.safetensors: File" in outcome.error
    assert "Free some space, or give --to a folder on another disk" in outcome.error
    assert not target.exists()


def test_a_checkpoint_that_fails_half_way_names_its_file(world: Path) -> None:
    with _small_files(50_000):
        outcome = zj(train_argv("sft", world, "full_save", run__num_steps=1))
    assert f"{world}/full_save/checkpoints/step_00000001/roles/model/" in outcome.error
    assert "Free some space, or set run.dir to a larger disk" in outcome.error
    assert SAVED not in outcome.error.lower()
    assert newest(world / "full_save") is None


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_the_size_of_a_checkpoint_is_known_before_there_is_one(world: Path, stage: str) -> None:
    saved = newest(world / stage)
    assert saved is not None
    size = sum(path.stat().st_size for path in saved.glob("roles/*/*.distcp"))
    known = _checkpoint_bytes(compose_run(train_argv(stage, world, stage)[1:]))
    assert known <= size < 1.2 * known  # a small model's headers weigh something


def test_a_disk_too_small_for_a_checkpoint_is_refused_before_the_first_step(world: Path, tiny: Path) -> None:
    outcome = zj([*train_argv("sft", world, "unused", checkpoint__every=0), f"run.dir={tiny / 'run'}"])
    assert f"no space left for a checkpoint in {tiny}/run/checkpoints: it needs 1." in outcome.error
    assert f"the disk at {tiny} has " in outcome.error
    assert "step 1/" not in outcome.output


@pytest.mark.parametrize("command", ["train", "generate"])
def test_on_a_disk_without_a_byte_left_the_error_is_one_message(world: Path, tiny: Path, command: str) -> None:
    with contextlib.suppress(OSError), (tiny / "filler").open("wb", buffering=0) as file:
        file.write(b"0" * (2 << 20))
        file.write(b"0")
    words = [f"checkpoint.load={world / 'sft'}", f"data.files=[{world / 'data/prompts.jsonl'}]", "limit=1"]
    argv = train_argv("sft", world, "unused") if command == "train" else [command, *words]
    outcome = zj([*argv, f"run.dir={tiny / 'run'}"])
    assert outcome.code == 1
    assert str(tiny) in outcome.error
    assert "ree some space" in outcome.error
    assert "Logging error" not in outcome.output
