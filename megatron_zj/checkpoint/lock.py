"""One run a folder: a lock that the operating system frees when the process that holds it dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_zj.checkpoint.errors import CheckpointError, everywhere, this_rank

log = logging.getLogger(__name__)
LOCK = ".lock"  # in a run folder; holds the host and the process id of who has it
OTHER_HOST_SECONDS = 100.0  # NFS frees the locks of a node that died when its lease of 90 s is over


@contextlib.contextmanager
def alone(folder: Path, patience: float = OTHER_HOST_SECONDS) -> Iterator[None]:
    """No other run works in ``folder`` while the block does.  Collective over the world on entry.

    ``patience``: seconds to wait for a holder on another host, which may be a dead node's.  CheckpointError on all
    ranks, naming the holder.  A file system without locks is used without one.
    """
    descriptor: int | None = None
    with everywhere(f"locking {folder}"):
        descriptor = _take(folder, patience) if this_rank() == 0 else None
    try:
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
            os.close(descriptor)  # the lock goes with it


def _take(folder: Path, patience: float) -> int | None:
    """A POSIX lock (no child inherits it): the descriptor that holds it; None where there is no such thing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        return None  # the log, which comes next, meets the same error and tells it
    here, deadline, told = socket.gethostname(), time.monotonic() + patience, False
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                os.close(descriptor)
                return None
        host, _, process = os.pread(descriptor, 1024, 0).decode(errors="replace").strip().partition(" ")
        who = f"process {process} on host {host}" if process else "another process"
        if host == here or time.monotonic() > deadline:
            os.close(descriptor)
            raise CheckpointError(
                f"{who} trains in {folder} already; wait for its end, or choose another run.dir (should it be a dead "
                f"node's: remove {folder / LOCK})"
            )
        if not told:
            log.warning("%s holds %s; waiting up to %.0f s for it to end", who, folder / LOCK, patience)
        told = True
        time.sleep(0.2)
    with contextlib.suppress(OSError):  # on a full disk the lock has no label
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{here} {os.getpid()}\n".encode(), 0)
    return descriptor
