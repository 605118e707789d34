"""Programs that a test starts: what they start in turn ends with the test, whatever happens to it.

Killing a process group does not do: torchrun gives each worker a session, and so a group, of its own, and a worker
whose agent is gone lives on.  A mark in the environment is inherited by all of them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


class Family:
    """Programs and all that descends from them.  A context manager: on leaving it none is alive."""

    def __init__(self) -> None:
        self._name, self._value = "ZJ_TEST_FAMILY", uuid.uuid4().hex
        self._started: list[subprocess.Popen[str]] = []

    def start(self, command: Sequence[str], environment: Mapping[str, str], **options: Any) -> subprocess.Popen[str]:
        """``subprocess.Popen`` with this environment; ``options`` are its own."""
        process = subprocess.Popen(command, env={**environment, self._name: self._value}, text=True, **options)
        self._started.append(process)
        return process

    def members(self) -> list[int]:
        """Process ids of those alive (a dead one has no environment)."""
        mark = f"{self._name}={self._value}".encode()
        return [pid for pid, environment in _environments() if mark in environment.split(b"\0")]

    def end(self, seconds: float = 30.0) -> None:
        """Kill them until none is left, which new ones may delay, and reap those that were started here."""
        deadline = time.monotonic() + seconds
        while members := self.members():
            assert time.monotonic() < deadline, f"processes {members} do not end"
            for pid in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        for process in self._started:
            with contextlib.suppress(ValueError):  # its output was read, and closed, before
                process.communicate(timeout=seconds)  # a survivor would hold its pipe open

    def __enter__(self) -> Family:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def _environments() -> Iterator[tuple[int, bytes]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # gone meanwhile, or another user's
                yield int(folder.name), (folder / "environ").read_bytes()
