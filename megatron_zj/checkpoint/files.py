"""Files that are on disk when a call returns, and that say what was written: size and SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from megatron_zj.checkpoint.errors import CheckpointError
from megatron_zj.runtime import files

_BLOCK = 8 << 20  # bytes read at once when hashing


@dataclass(frozen=True)
class FileRecord:
    """What the manifest knows of a file."""

    size: int  # bytes
    sha256: str


class HashingFile:
    """A file that is only written from start to end, hashed on the way: the hash is of what was meant."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0  # bytes
        self._hash = hashlib.sha256()
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115  closed by close() or the with statement
        self.error: OSError | None = None

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append; bytes written."""
        view = memoryview(data).cast("B")
        try:
            with files.named(self.path):
                self._file.write(view)
        except OSError as error:
            self.error = error  # a C++ caller would lose it
            raise
        self._hash.update(view)
        self.position += len(view)
        return len(view)

    def tell(self) -> int:
        """Bytes written so far."""
        return self.position

    def flush(self) -> None:
        """Hand everything to the operating system."""
        with files.named(self.path):
            self._file.flush()

    def close(self) -> FileRecord:
        """Reach the disk, then close."""
        try:
            with files.named(self.path), self._file:  # which flushes once more, and fails once more
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as error:
            self.error = error
            raise
        return FileRecord(self.position, self._hash.hexdigest())

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._file.closed:
            try:
                self._file.close()
            except OSError:
                if error is None:
                    raise


def write_bytes(path: Path, data: bytes) -> FileRecord:
    """A small file, complete or absent."""
    files.write_whole(path, data)
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def write_json(path: Path, value: Any) -> FileRecord:
    """``value`` as JSON, complete or absent."""
    data = files.write_json(path, value)
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def read_json(path: Path, advice: str) -> Any:
    """The JSON value in ``path``; CheckpointError with ``advice`` where it is missing or malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; {advice}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {advice}") from None


def record_of(path: Path) -> FileRecord:
    """Size and hash of a file as it is on disk now."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return FileRecord(size, digest.hexdigest())


def copy_file(source: Path, target: Path) -> FileRecord:
    """Copy a small file durably."""
    with HashingFile(target) as file:
        with open(source, "rb") as stream:
            while block := stream.read(_BLOCK):
                file.write(block)
        return file.close()


def require_space(folder: Path, needed: int, advice: str) -> None:
    """Refuse before the first byte when ``needed`` bytes do not fit; the ``advice`` ends the message."""
    if needed > shutil.disk_usage(files.existing(folder)).free:
        raise CheckpointError(
            f"no space left for a checkpoint in {folder}: it needs {needed / 2**20:.1f} MiB, and {files.room(folder)}. "
            f"{advice}"
        )
