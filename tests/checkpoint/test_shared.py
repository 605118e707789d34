"""Several nodes: what a network file system may show one rank and not another."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_zj.checkpoint import retention, shared
from megatron_zj.checkpoint.errors import CheckpointError
from megatron_zj.checkpoint.load import agreed_newest
from megatron_zj.checkpoint.shared import require_shared
from megatron_zj.config.parallel import ParallelConfig
from tests.checkpoint.toy import checkpointer, toy
from tests.helpers.ranks import run_ranks


def _blind(root: Path) -> str | None:
    checkpointer(root).save(1, {"model": toy(ParallelConfig(), 1)}, {})
    if dist.get_rank() == 1:
        retention.complete_steps = lambda folder: {}  # this process is a fork of the test's
    found = agreed_newest(root)
    return found and found.name


def test_every_rank_takes_the_newest_checkpoint_that_rank_0_sees(tmp_path: Path) -> None:
    assert run_ranks(2, _blind, tmp_path) == ["step_00000001"] * 2


def _own_folder(root: Path, blind: tuple[int, ...]) -> str:
    shared._VISIBLE_SECONDS = 0.2
    folder = root / ("own" if dist.get_rank() in blind else "everyone's")
    folder.mkdir(exist_ok=True)
    try:
        require_shared(folder)
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_run_folder_that_some_rank_does_not_share_is_an_error_that_names_rank_and_host(tmp_path: Path) -> None:
    host = socket.gethostname()
    for message in run_ranks(3, _own_folder, tmp_path, (1, 2)):
        assert message.startswith(f"rank 1: on host {host} there is no {tmp_path}/own/.shared_")
        assert message.endswith(
            f"rank 0 has written on host {host}: run.dir must lie on a file system that all nodes share "
            "(ranks [1, 2] failed)"
        )
    assert list((tmp_path / "everyone's").iterdir()) == []


def _late(folder: Path) -> None:
    """The file reaches rank 1 late, as on a network file system."""
    if dist.get_rank() == 1:
        start, original = time.monotonic(), Path.exists
        Path.exists = lambda path: time.monotonic() - start > 0.3 and original(path)  # type: ignore[method-assign]
    require_shared(folder)


def test_a_shared_run_folder_passes_and_keeps_no_trace(tmp_path: Path) -> None:
    run_ranks(3, _own_folder, tmp_path, ())
    run_ranks(2, _late, tmp_path / "everyone's")
    assert list((tmp_path / "everyone's").iterdir()) == []


def test_one_rank_alone_needs_no_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "everywhere", None)
    require_shared(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
