"""Files that are there whole, and on the disk, or not at all; and what to say when the disk is full."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_whole(path: Path, data: bytes) -> None:
    """Replace ``path`` in one step: ``data`` is written under another name in its folder, synced, and renamed."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with named(path), partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)  # on a full disk its bytes are wanted
        raise
    fsync(path.parent)


def write_json(path: Path, value: Any) -> bytes:
    """``value`` as readable JSON, ``write_whole``; returns what was written."""
    data = (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
    write_whole(path, data)
    return data


def fsync(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """An OSError of the block names ``path``: a failed write or close has a number, and no file, of its own."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def room(path: Path, code: int = errno.ENOSPC) -> str:
    """What stops ``path`` from growing, for an error ``code`` of NO_SPACE: the disk it is on, or a limit."""
    if code == errno.EFBIG:
        return "no larger file is allowed here (ulimit -f, or the file system)"
    mount = existing(path)
    usage = shutil.disk_usage(mount)
    while not os.path.ismount(mount):
        mount = mount.parent
    if code == errno.EDQUOT:
        return f"your quota on the disk at {mount} is used up"
    return f"the disk at {mount} has {usage.free / 2**20:,.1f} of {usage.total / 2**20:,.1f} MiB free"


def existing(path: Path) -> Path:
    """``path``, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())
