"""Proof, before any step is trained, that all ranks write into one folder."""

from __future__ import annotations

import socket
import time
import uuid
from pathlib import Path

from megatron_zj.checkpoint.errors import CheckpointError, everywhere, gather, this_rank, world_size

_VISIBLE_SECONDS = 30.0  # how long a new file may take to reach another node of a network file system


def require_shared(folder: Path) -> None:
    """Rank 0 writes a file into ``folder``, which every rank must see.  Collective over the world.

    Without it a run on nodes of their own would train for hours and fail at its first save.  Raises CheckpointError on
    all ranks, naming the first that does not see the file, and its host.
    """
    if world_size() == 1:
        return
    host = socket.gethostname()
    name, writer = gather((f".shared_{uuid.uuid4().hex}", host))[0]
    token = folder / name
    try:
        with everywhere(f"writing {token}"):
            if this_rank() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                token.touch()
        with everywhere(f"looking for {token}"):
            _await(token, f"on host {host} there is no {token}, which rank 0 has written on host {writer}")
    finally:
        if this_rank() == 0:
            token.unlink(missing_ok=True)


def _await(token: Path, otherwise: str) -> None:
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not token.exists():
        if time.monotonic() > deadline:
            raise CheckpointError(f"{otherwise}: run.dir must lie on a file system that all nodes share")
        time.sleep(0.05)
