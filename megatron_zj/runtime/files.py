"""Files that are there whole, and on the disk, or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, data: bytes) -> None:
    """Replace ``path`` in one step: ``data`` is written under another name in its folder, synced, and renamed."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
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
