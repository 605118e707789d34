"""What people read: one line a step and a progress bar on rank 0, warnings with their rank from everywhere."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_zj.runtime.distributed import Process

NAME = "megatron_zj"
FILE_NAME = "log.txt"


class _AboveTheBar(logging.Handler):
    """Writes to stderr through tqdm, which puts the progress bar back below the line."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except (OSError, ValueError):  # the terminal went away, or stderr is closed at exit: nowhere to say so
            return


class _LogFile(logging.FileHandler):
    """Where the disk is full, lines are lost, which is said once: they are on the screen too, and a run goes on."""

    _told = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Anything but a file that cannot be written is a fault of ours, and logging shows it."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._told:
            self._told = True
            tqdm.write(f"{self.baseFilename}: {error.strerror}: the log goes on here only", file=sys.stderr)

    def close(self) -> None:
        """What could not be written is lost."""
        with contextlib.suppress(OSError):
            super().close()


def setup(process: Process, folder: Path | None) -> logging.Logger:
    """The project's logger.  Rank 0 shows INFO and appends it to ``folder/log.txt`` (UTF-8); others show warnings.

    Calling it again replaces the handlers.
    """
    logger = logging.getLogger(NAME)
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    logger.propagate = False
    logger.setLevel(logging.INFO if process.rank == 0 else logging.WARNING)
    who = f"rank {process.rank} " if process.world_size > 1 else ""
    screen: list[logging.Handler] = [_AboveTheBar()]
    screen[0].setFormatter(logging.Formatter(f"%(asctime)s {who}%(message)s", "%H:%M:%S"))
    if folder is not None and process.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        file = _LogFile(folder / FILE_NAME, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        screen.append(file)
    for handler in screen:
        logger.addHandler(handler)
    return logger


def progress_bar(process: Process, total: int, done: int = 0, description: str = "") -> tqdm[Any]:
    """A bar over ``total`` units of which ``done`` are behind us; silent off rank 0 and where stderr is no terminal."""
    hidden = process.rank != 0 or not sys.stderr.isatty()
    return tqdm(total=total, initial=done, desc=description, disable=hidden, dynamic_ncols=True, file=sys.stderr)


def step_line(step: int, num_steps: int, metrics: Mapping[str, float]) -> str:
    """``step  12/400  loss 2.513  grad_norm 0.81  lr 1.0e-04  time/update 1.2``, names in the order given."""
    width = len(str(num_steps))
    return "  ".join([f"step {step:>{width}}/{num_steps}", *(f"{name} {_number(metrics[name])}" for name in metrics)])


def _number(value: float) -> str:
    """Four significant digits without an exponent where that is readable."""
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and size < 1e9:
        return f"{int(value):,}"
    if 1e-3 <= size < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}" if 1e4 <= size < 1e9 else f"{value:.2e}"
