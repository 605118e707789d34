"""Whole commands in forked processes: what a user types, what is printed, and the exit code.

A fork spares the seconds that importing torch costs; several ranks meet as under torchrun, through the environment.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_zj.cli.main import main

_FORK = multiprocessing.get_context("fork")
MAX_LINES = 32  # one screen


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    codes: tuple[int, ...]  # exit codes in rank order; minus the signal's number where a signal ended it
    outputs: tuple[str, ...]  # of stdout and stderr together, in rank order
    seconds: float

    @property
    def code(self) -> int:
        """Of rank 0."""
        return self.codes[0]

    @property
    def output(self) -> str:
        """Of all ranks."""
        return "".join(self.outputs)

    @property
    def error(self) -> str:
        """The error message, from the word "error:" on; it must be the only one and fit a screen."""
        assert self.output.count("error: ") == 1, self.output
        assert "Traceback" not in self.output, self.output
        message = self.output[self.output.index("error: ") :]
        assert len(message.splitlines()) <= MAX_LINES, message
        return message


def zj(
    argv: Sequence[object],
    *,
    ranks: int = 1,
    typed: str = "",
    kill: tuple[int, Path] | None = None,
    timeout: float = 60.0,
) -> Outcome:
    """``zj ARGV`` on this many ranks, with ``typed`` on standard input.  A rank that does not end is killed.

    ``kill``: a rank that gets SIGKILL as soon as the file is there.
    """
    words = [str(word) for word in argv]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="zj-") as folder:
        (Path(folder) / "stdin").write_text(typed, encoding="utf-8")
        processes = []
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            variables = {name: str(value) for name, value in place.items()} if ranks > 1 else {}
            if ranks > 1:
                variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            process = _FORK.Process(target=_child, args=(words, variables, Path(folder), rank))
            process.start()
            processes.append(process)
        while kill is not None and not kill[1].exists() and time.monotonic() < start + timeout:
            time.sleep(0.01)
        if kill is not None:
            processes[kill[0]].kill()
        for process in processes:
            process.join(max(0.0, start + timeout - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        outputs = tuple((Path(folder) / f"output{rank}").read_text(encoding="utf-8") for rank in range(ranks))
    codes = tuple(int(process.exitcode or 0) for process in processes)
    return Outcome(codes, outputs, time.monotonic() - start)


def _child(words: list[str], variables: Mapping[str, str], folder: Path, rank: int) -> None:
    os.environ.update(variables)
    source = os.open(folder / "stdin", os.O_RDONLY)
    target = os.open(folder / f"output{rank}", os.O_WRONLY | os.O_CREAT)
    for number in (1, 2):
        os.dup2(target, number)
    os.dup2(source, 0)
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding="utf-8")
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding="utf-8", line_buffering=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), encoding="utf-8", line_buffering=True)
    try:
        code = main(words)
    except SystemExit as end:  # argparse
        code = end.code if isinstance(end.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
