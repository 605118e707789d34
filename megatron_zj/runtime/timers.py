"""Seconds by phase, and the phase told to the other ranks while it lasts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

from megatron_zj.runtime.activity import Activity


class Timers:
    """``with timers("generate"): ...`` adds to ``time/generate``.

    On CUDA a phase is measured between two events on the current stream, so that timing does not stop the queue; the
    wait is in ``pop``.  Phases may nest; each name counts its whole duration.
    """

    def __init__(self, device: torch.device, activity: Activity | None = None) -> None:
        self._on_cuda = device.type == "cuda"
        self.activity = activity or Activity()
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the block; a block that raises is not counted."""
        with self.activity.doing(name):
            if self._on_cuda:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                begin.record()
                yield
                end.record()
                self._events.append((name, begin, end))
            else:
                start = time.perf_counter()
                yield
                self._add(name, time.perf_counter() - start)

    def pop(self) -> dict[str, float]:
        """``{"time/<name>": seconds}`` since the last call, in the order of first use."""
        if self._events:
            torch.cuda.synchronize()
        for name, begin, end in self._events:
            self._add(name, begin.elapsed_time(end) / 1000)  # milliseconds
        seconds = {f"time/{name}": value for name, value in self._seconds.items()}
        self._seconds, self._events = {}, []
        return seconds

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
