"""Run a function on several ranks: fork + gloo + a file store, and an error that names the rank.

Fork starts four ranks in a tenth of a second (spawn takes seconds) and a file store has no port to collide on.
A process that has looked for a GPU cannot fork ranks that use it: those are spawned.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

Start = Literal["fork", "spawn"]
_NO_SOCKET = "Gloo connectFullMesh failed"


class RankFailure(AssertionError):
    """A rank raised, died or did not end in time."""


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 120.0,
    device: str = "cpu",
    start: Start = "fork",
) -> list[Any]:
    """``function(*args)`` on every rank of a gloo world; the picklable results in rank order.

    ``device`` cuda: rank r has GPU r, and tensors there go by NCCL; that wants ``start`` spawn.

    The first failure ends the other ranks at once.  ``timeout`` is in seconds, for the whole run.  A world whose
    sockets could not be connected (seen once in hundreds of worlds on a busy machine, before any code of ours has
    run in them) is tried once more.
    """
    try:
        return _run_world(world_size, function, args, timeout, device, start)
    except RankFailure as failure:
        if _NO_SOCKET not in str(failure):
            raise
        return _run_world(world_size, function, args, timeout, device, start)


def _run_world(
    world_size: int, function: Callable[..., Any], args: Any, timeout: float, device: str, start: Start
) -> list[Any]:
    context: Any = multiprocessing.get_context(start)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main,
                args=(rank, world_size, folder, timeout, device, sender, function, args),
                daemon=False,
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _collect(pipes, processes, timeout, Path(folder))
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _collect(pipes: list[Any], processes: list[Any], timeout: float, folder: Path) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailure(_hang_report(sorted(waiting.values()), processes, timeout, folder))
        for pipe in ready:
            rank = waiting[pipe]
            try:
                ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join()
                raise RankFailure(f"rank {rank} died with exit code {processes[rank].exitcode}") from None
            if not ok:
                raise RankFailure(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _hang_report(ranks: list[int], processes: list[Any], timeout: float, folder: Path) -> str:
    stacks = []
    for rank in ranks:
        os.kill(processes[rank].pid, 10)  # SIGUSR1: faulthandler writes the stack
    time.sleep(0.3)
    for rank in ranks:
        path = folder / f"stack-{rank}"
        stacks.append(f"--- rank {rank} was at:\n{path.read_text() if path.exists() else '(no stack)'}")
    return f"ranks {ranks} did not end within {timeout} s\n" + "\n".join(stacks)


def _rank_main(
    rank: int,
    world_size: int,
    folder: str,
    timeout: float,
    device: str,
    sender: Any,
    function: Callable[..., Any],
    args: Any,
) -> None:
    torch.set_num_threads(1)
    with open(f"{folder}/stack-{rank}", "w") as stack:
        faulthandler.register(10, file=stack, all_threads=False)
        try:
            store = dist.FileStore(f"{folder}/store", world_size)
            if device == "cuda":
                torch.cuda.set_device(rank)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
                store=store,
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout),
                device_id=torch.device("cuda", rank) if device == "cuda" else None,
            )
            message = (True, function(*args))
        except BaseException:
            message = (False, traceback.format_exc())
        # plain pickle: the pipe's own would send a tensor as a handle, which dies with this process
        sender.send_bytes(pickle.dumps(message))
        sender.close()
        if message[0]:
            dist.destroy_process_group()
    os._exit(0 if message[0] else 1)
