"""A run ends with the name of the lost rank and of its phase, however the rank was lost."""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_zj.checkpoint.errors import CheckpointError
from megatron_zj.runtime import activity, distributed
from megatron_zj.runtime.distributed import Process, RankLostError, StartError, session

Body = Callable[[Process], None]
_FORK = multiprocessing.get_context("fork")
_LONG = 60  # seconds: no collective of a test may end by its timeout, but where it says so


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _rank_main(rank: int, port: int, world_size: int, timeout: int, folder: Path, body: Body) -> None:
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in place.items()})
    sys.stderr = (folder / f"stderr-{rank}").open("w")
    try:
        with session("cpu", timeout) as process:
            body(process)
    except RankLostError as error:
        (folder / f"lost-{rank}").write_text(str(error))
        os._exit(3)
    except ValueError:
        os._exit(4)
    os._exit(0)


def _run(
    world_size: int, folder: Path, body: Body, timeout: int = _LONG, but: tuple[int, ...] = ()
) -> dict[int, int | None]:
    """Exit codes by rank, when all ranks ``but`` these have ended; None for one that still runs (it is then killed)."""
    port = _free_port()
    ranks = [
        _FORK.Process(target=_rank_main, args=(rank, port, world_size, timeout, folder, body))
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + 30
    for rank in (ranks[number] for number in range(world_size) if number not in but):
        rank.join(max(0.0, deadline - time.monotonic()))
    codes = {number: rank.exitcode for number, rank in enumerate(ranks)}
    for rank in ranks:
        rank.kill()
        rank.join()
    return codes


@pytest.fixture(autouse=True)
def _quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activity, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(activity, "SILENCE_SECONDS", 1.5)
    monkeypatch.setattr(activity, "EXIT_GRACE_SECONDS", 6.0)


def _one_lost(bad: int, how: str) -> Body:
    def body(process: Process) -> None:
        dist.barrier()
        with process.activity.doing("step 3"), process.activity.doing("critic.update"):
            if process.rank == bad:
                time.sleep(0.3)
                if how == "raise":
                    raise ValueError("planted\nsecond line")
                os.kill(os.getpid(), signal.SIGSTOP if how == "hang" else signal.SIGKILL)
        with process.activity.doing("gather"):
            dist.barrier()

    return body


@pytest.mark.parametrize(
    ("bad", "how", "own_code", "words"),
    [
        (1, "kill", -signal.SIGKILL, "last heard in phase 'step 3 > critic.update'"),
        (1, "raise", 4, "failed with ValueError: planted in phase 'step 3 > critic.update'"),
        (1, "hang", None, "last heard in phase 'step 3 > critic.update'"),
        (0, "kill", -signal.SIGKILL, "last heard in phase 'step 3 > critic.update'"),  # the rank with the store
    ],
)
def test_the_others_end_and_name_the_lost_rank_and_its_phase(
    tmp_path: Path, bad: int, how: str, own_code: int | None, words: str
) -> None:
    hangs = how == "hang"  # then it is the collective's timeout that ends the others
    codes = _run(3, tmp_path, _one_lost(bad, how), timeout=5 if hangs else _LONG, but=(bad,) if hangs else ())
    assert codes[bad] == own_code
    others = [rank for rank in range(3) if rank != bad]
    assert [codes[rank] for rank in others] == [3, 3]
    said = (tmp_path / f"lost-{others[0]}").read_text()
    assert f"rank {bad} (" in said
    assert words in said
    assert f"this rank ({others[0]}) was in phase 'gather'" in said
    if bad != 0:
        assert f"ranks 0, {3 - bad}: 'gather'; rank {bad}: 'step 3 > critic.update'" in said
    if bad != 0:  # with the store gone no one can tell who else lives: then each rank speaks
        assert (tmp_path / f"lost-{others[1]}").read_text() == f"rank {others[1]} leaves: another rank was lost"


def _peer_dies_and_launcher_stops_me(process: Process) -> None:
    """What torchrun does: one rank dies, and the other is told to stop while it finds out who it was."""
    dist.barrier()
    if process.rank == 1:
        with process.activity.doing("step 3"):
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
    launcher = threading.Timer(0.8, os.kill, (os.getpid(), signal.SIGTERM))
    launcher.start()
    dist.barrier()


def test_being_told_to_stop_does_not_cut_the_report_short(tmp_path: Path) -> None:
    assert _run(2, tmp_path, _peer_dies_and_launcher_stops_me) == {0: 3, 1: -signal.SIGKILL}
    assert "last heard in phase 'step 3'" in (tmp_path / "lost-0").read_text()


def _stuck(process: Process) -> None:
    """Rank 0 waits in a collective rank 1 never joins, and is told to stop."""
    dist.barrier()
    if process.rank == 1:
        with process.activity.doing("slow work"):
            time.sleep(_LONG)
    with process.activity.doing("barrier"):
        child = os.fork()
        if child == 0:  # stands for the launcher
            time.sleep(0.5)
            os.kill(os.getppid(), signal.SIGTERM)
            os._exit(0)
        dist.barrier()


def test_a_rank_told_to_stop_inside_a_collective_stops_at_once_and_says_where_all_are(tmp_path: Path) -> None:
    codes = _run(2, tmp_path, _stuck, but=(1,))
    assert codes[0] == 128 + signal.SIGTERM
    said = (tmp_path / "stderr-0").read_text()
    assert "rank 0: told to stop (SIGTERM) while in 'barrier'" in said
    assert "rank 0: 'barrier'" in said
    assert "rank 1: 'slow work'" in said


def test_where_all_ranks_stand_is_grouped_by_phase_and_bounded() -> None:
    busy = dict.fromkeys(range(1000), "step 12 > actor.update") | {4: "step 12 > save", 700: "step 11 > Report"}
    assert activity.standing(busy) == (
        "ranks 0-3, 5-699, 701-999: 'step 12 > actor.update'; rank 4: 'step 12 > save'; rank 700: 'step 11 > Report'"
    )
    scattered = activity.standing({rank: f"step {rank % 20 + 1}" for rank in range(1000)})
    assert scattered.endswith("; 600 ranks in 12 other phases")
    assert "19, 39, 59, 79, 99, 119, 139, 159, ... (50 in all): 'step 20'" in scattered
    assert len(scattered) < 1000


def _fork_a_child_and_stop_it(process: Process) -> None:
    child = os.fork()
    if child == 0:
        time.sleep(30)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    time.sleep(0.5)
    dist.barrier()


def test_stopping_a_forked_child_does_not_stop_its_rank(tmp_path: Path) -> None:
    assert _run(2, tmp_path, _fork_a_child_and_stop_it) == {0: 0, 1: 0}


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3"), True),
        (dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:77"), True),
        (CheckpointError("/data/nccl-tests/step_00000001/manifest.json is damaged"), False),
        (RuntimeError("the size does not match"), False),
    ],
)
def test_an_error_of_our_own_is_no_lost_rank_whatever_its_file_is_called(error: Exception, lost: bool) -> None:
    assert distributed._is_collective_failure(error) is lost
    ours = CheckpointError("/data/gloo is damaged")
    ours.__cause__ = RuntimeError("PytorchStreamReader failed reading /data/gloo")
    assert not distributed._is_collective_failure(ours)
    wrapped = ValueError("while saving")
    wrapped.__cause__ = error
    assert distributed._is_collective_failure(wrapped) is lost


def _good(process: Process) -> None:
    total = torch.tensor(process.rank + 1)
    dist.all_reduce(total)
    if total.item() != 3 or process.device != torch.device("cpu"):
        raise ValueError(f"{total} on {process.device}")
    if torch.get_num_threads() != max(1, len(os.sched_getaffinity(0)) // 2):
        raise ValueError(f"{torch.get_num_threads()} threads")


def test_a_good_run_shares_the_cores_and_ends_with_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # what torchrun sets by itself
    assert _run(2, tmp_path, _good) == {0: 0, 1: 0}


def test_without_a_launcher_the_run_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    try:
        with session("cpu", 5) as process:
            assert (process.rank, process.world_size, dist.get_world_size()) == (0, 1, 1)
        assert not dist.is_initialized()
    finally:
        torch.set_num_threads(threads)


def _start(device: str, timeout_seconds: int) -> None:
    with session(device, timeout_seconds):  # type: ignore[arg-type]
        raise AssertionError("it started")


def test_half_a_launcher_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(StartError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT; start with torchrun"):
        _start("cpu", 5)


def test_a_store_that_is_not_there_is_named_within_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**place, "MASTER_PORT": str(_free_port())}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StartError, match=r"rank 1 found no store at 127.0.0.1:\d+ within 1 s"):
        _start("cpu", 1)


@pytest.mark.parametrize(
    ("device", "gpus", "local_rank", "message"),
    [
        ("cuda", 0, 0, "sees no usable GPU"),
        ("cpu", 1, 0, "CUDA_VISIBLE_DEVICES= torchrun"),
        ("auto", 2, 2, "local rank 2 needs GPU 2, this node shows 2"),
    ],
)
def test_a_device_that_cannot_be_had_is_explained(
    monkeypatch: pytest.MonkeyPatch, device: str, gpus: int, local_rank: int, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": str(local_rank)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(_free_port()))
    with pytest.raises(StartError, match=message):
        _start(device, 5)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("local", "launcher", "own_store", "warned"),
    [
        (2, True, None, True),
        (2, True, "0", True),
        (2, True, "1", False),
        (4, True, None, False),
        (2, False, "0", False),
    ],
)
def test_nodes_that_could_not_rejoin_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, local: int, launcher: bool, own_store: str | None, warned: bool
) -> None:
    values = {"TORCHELASTIC_RUN_ID": "1" if launcher else None, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": own_store}
    for name, value in values.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert distributed._would_not_rejoin(distributed._Place(0, 0, 4, local)) is warned
