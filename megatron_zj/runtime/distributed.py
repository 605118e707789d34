"""The process: its rank, device, threads and default group.  The only reader of environment variables.

Started by torchrun (or anything that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT), or alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from megatron_zj.runtime.activity import Activity, Heartbeat
from megatron_zj.runtime.memory import keep_freed_memory

_COLLECTIVE_FAILURE = re.compile(
    r"gloo|nccl|connection (closed|reset)|timed out waiting|process group|watchdog|broken pipe", re.IGNORECASE
)

_ALLOCATOR = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_")  # beginnings of the names of variables

# Said by libraries about their own code, by every rank at every start; nothing that a user can mend.
_LIBRARY_WARNINGS = (
    "full scope is deprecated",  # megatron-core, about the default of its own field
    r"The \.grad attribute of a Tensor that is not a leaf",  # megatron-core looks for .grad where there may be none
    r"`torch\.distributed\.\w+_tensor` is deprecated",  # torch 2.13, about what megatron-core calls
)


class StartError(RuntimeError):
    """The process cannot take its place in the run; the message says what to change."""


class RankLostError(RuntimeError):
    """Another rank died, hung or failed; the message names it and what it was doing."""


class LeftError(RankLostError):
    """This rank ends because of something that another rank tells."""


@dataclass(frozen=True)
class Process:
    """This process's place in the run."""

    rank: int
    local_rank: int  # on this node
    world_size: int
    device: torch.device
    activity: Activity = field(default_factory=Activity)  # what this rank is doing; Timers and callers keep it


@contextlib.contextmanager
def session(device: Literal["auto", "cpu", "cuda"], timeout_seconds: int) -> Iterator[Process]:
    """A whole run: default group (gloo on CPU, NCCL for CUDA tensors), device, threads, exact arithmetic, heartbeat.

    ``timeout_seconds``: how long a collective of the default group waits.  Raises StartError when it cannot be joined.

    An error of this rank leaves unchanged, after the other ranks have been told; where several ranks meet the same
    one, one of them tells it.  An error that is another rank's (a collective failed because a member was lost) leaves
    as RankLostError, which names that rank and its phase.
    """
    for message in _LIBRARY_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    store, place = _rendezvous(timeout_seconds)
    process = _join(store, place, device, timeout_seconds)
    told = any(name.startswith(_ALLOCATOR) for name in os.environ)  # then the user's word stands
    if process.device.type == "cpu" and not told:
        keep_freed_memory()
    if place.rank == 0 and _would_not_rejoin(place):
        warnings.warn(
            "several nodes under torchrun: a node that dies and comes back hangs the others with torch 2.13, unless "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is set on every node before torchrun starts (launch/env.sh does)",
            stacklevel=3,
        )
    own_connection: Store = store.clone()  # type: ignore[attr-defined]
    heartbeat = Heartbeat(
        PrefixStore("activity", own_connection), process.rank, process.world_size, process.activity, timeout_seconds
    )
    if process.world_size > 1:
        heartbeat.start()
    try:
        yield process
    except BaseException as error:
        if process.world_size == 1:
            _leave()
            raise
        if not _is_collective_failure(error):
            heartbeat.close("failed", _one_line(error))
            if not heartbeat.claim_error(str(error)):
                raise LeftError(f"rank {process.rank} leaves: another rank tells the same error") from error
            raise
        if not heartbeat.claim_report():
            raise
        text, aloud = heartbeat.explain()
        heartbeat.close("left")
        here = f"this rank ({process.rank}) was in phase {str(process.activity)!r}: {_one_line(error)}"
        reason = f"a collective failed: {text}; {here}"
        if not aloud:
            raise LeftError(f"rank {process.rank} leaves: another rank was lost") from error
        raise RankLostError(reason) from error
    if process.world_size > 1:
        heartbeat.close("finished")
        dist.barrier()  # the rank that hosts the store leaves last
    _leave()


def _leave() -> None:
    """Leave the default group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size_of_environment() -> int:
    """How many ranks the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def speaks_for_all() -> bool:
    """Whether an error that every rank meets is this one's to tell: rank 0's, until a ``session`` picks who tells."""
    return dist.is_initialized() or rank_of_environment() == 0


def rank_of_environment() -> int:
    """This process's rank by its launcher's word; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def tell_launcher(message: str) -> None:
    """Hand an error message to torchrun, which closes with a long report: there it stands under "Root Cause".

    Without a launcher, nothing happens.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with contextlib.suppress(OSError):  # the message has been printed already
            Path(path).write_text(json.dumps(content), encoding="utf-8")


@dataclass(frozen=True)
class _Place:
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int  # ranks on this node


def _place() -> _Place:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return _Place(rank=0, local_rank=0, world_size=1, local_world_size=1)
    if missing:
        raise StartError(f"the launcher set RANK or WORLD_SIZE but not {', '.join(missing)}; start with torchrun")
    world_size = int(os.environ["WORLD_SIZE"])
    return _Place(
        rank=int(os.environ["RANK"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        world_size=world_size,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
    )


def _would_not_rejoin(place: _Place) -> bool:
    """Whether torchrun's agents share the store of their first rendezvous, in a run of several nodes."""
    several = place.local_world_size < place.world_size and "TORCHELASTIC_RUN_ID" in os.environ
    return several and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1"


def _rendezvous(timeout_seconds: int) -> tuple[Store, _Place]:
    place = _place()
    if "RANK" not in os.environ:
        return dist.HashStore(), place
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout_seconds)))
    except dist.DistError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise StartError(
            f"rank {place.rank} found no store at {address} within {timeout_seconds} s; check that rank 0's node runs, "
            f"that its name resolves here and that the port is open ({_one_line(error)})"
        ) from error
    return store, place


def _join(store: Store, place: _Place, device: str, timeout_seconds: int) -> Process:
    torch_device = _device(device, place)
    torch.set_num_threads(_num_threads(place.local_world_size))
    _reproducible(torch_device)
    timeout = timedelta(seconds=timeout_seconds)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch_device.type == "cuda" else "gloo",
            store=PrefixStore("default", store),
            rank=place.rank,
            world_size=place.world_size,
            timeout=timeout,
            device_id=torch_device if torch_device.type == "cuda" else None,
        )
    except RuntimeError as error:
        raise StartError(
            f"rank {place.rank} of {place.world_size} could not meet the other ranks within {timeout_seconds} s: one "
            f"of them did not start, or the network interface is wrong (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME): "
            f"{_one_line(error)}"
        ) from error
    return Process(place.rank, place.local_rank, place.world_size, torch_device)


def _device(device: str, place: _Place) -> torch.device:
    if device == "cpu":
        if torch.cuda.is_available():
            raise StartError(
                "run.device=cpu on a machine with a GPU: megatron-core takes any GPU it sees. Hide it before the "
                "start: CUDA_VISIBLE_DEVICES= torchrun ..."
            )
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if device == "cuda":
            raise StartError(
                "run.device=cuda, but torch sees no usable GPU. Check `nvidia-smi`, CUDA_VISIBLE_DEVICES and that "
                f"torch is a CUDA build (this one is {torch.__version__}), or set run.device=cpu"
            )
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count()
    if place.local_rank >= num_gpus:
        raise StartError(
            f"local rank {place.local_rank} needs GPU {place.local_rank}, this node shows {num_gpus}: start at most "
            f"{num_gpus} ranks a node (torchrun --nproc-per-node {num_gpus}) or widen CUDA_VISIBLE_DEVICES"
        )
    torch.cuda.set_device(place.local_rank)
    return torch.device("cuda", place.local_rank)


def _num_threads(local_world_size: int) -> int:
    """The node's cores shared out.  torchrun sets OMP_NUM_THREADS=1 unasked, so that value alone means nothing."""
    asked = os.environ.get("OMP_NUM_THREADS", "1")
    if asked.isdigit() and int(asked) > 1:
        return int(asked)
    return max(1, len(os.sched_getaffinity(0)) // local_world_size)


def _reproducible(device: torch.device) -> None:
    """The same run twice gives the same bits: no TF32, no autotuned choice, deterministic kernels where they exist."""
    torch.set_float32_matmul_precision("highest")
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it to be deterministic
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs a pass over every torch.empty


def _is_collective_failure(error: BaseException) -> bool:
    """Whether the error, or one it came from, is a collective that lost a member.

    Our own errors, and what they came from, are no such thing whatever words they hold (a file may be called nccl).
    """
    seen: BaseException | None = error
    ours = False
    while seen is not None:
        ours = ours or type(seen).__module__.split(".")[0] == "megatron_zj"
        if isinstance(seen, dist.DistError):
            return True
        if not ours and isinstance(seen, RuntimeError) and _COLLECTIVE_FAILURE.search(str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:300]}"
