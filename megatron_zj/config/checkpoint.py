"""When checkpoints are written, which are kept, and what a run starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_zj.config.ranges import check_ranges


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints live in ``<run.dir>/checkpoints/step_<8 digits>``."""

    load: Path | None = None  # a previous stage's checkpoint (or its run or checkpoints folder): weights only
    resume: Literal["auto", "never", "must"] = "auto"  # continue from the newest complete one in run.dir
    every: int = 0  # steps between saves; 0: only at the end
    keep_last: int = 2  # newest ones kept; 0: all
    keep_every: int = 0  # multiples of this step are never deleted; 0: none
    async_save: bool = False  # write in the background

    def __post_init__(self) -> None:
        check_ranges(self, every="[0, inf)", keep_last="[0, inf)", keep_every="[0, inf)")
