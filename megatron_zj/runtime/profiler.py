"""torch.profiler on chosen steps."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


class StepProfiler:
    """``with profiler.step(12): ...`` writes ``folder/step_00000012_rank_00000.json.gz`` when 12 was chosen.

    The file is a Chrome trace: open it at chrome://tracing or https://ui.perfetto.dev.
    """

    def __init__(self, folder: Path, steps: Collection[int], rank: int) -> None:
        self._folder, self._steps, self._rank = folder, frozenset(steps), rank

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Profile the block if ``step`` was chosen; a block that raises leaves no file."""
        if step not in self._steps:
            yield
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        with profile(activities=activities, record_shapes=True) as record:
            yield
        self._folder.mkdir(parents=True, exist_ok=True)
        record.export_chrome_trace(str(self._folder / f"step_{step:08d}_rank_{self._rank:05d}.json.gz"))
