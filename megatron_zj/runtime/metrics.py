"""Numbers by step: one JSON object a line, and optionally TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib
import json
import math
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_zj.runtime.files import named, write_whole

FILE_NAME = "metrics.jsonl"
WANDB_ID = "wandb_id.txt"  # in the run's folder


class MetricsLog:
    """``folder/metrics.jsonl``: ``{"step": 3, "time": 1767225600.0, "loss": 2.5, ...}``, written on rank 0 only.

    A line is on disk when ``write`` returns.  The first ``write`` drops the lines of that step and of later ones, which
    a run that was killed may have left: a resumed run's file has each step once, and so has a fresh run's in an old
    folder.  NaN and infinities, which JSON lacks, are written as null.
    """

    def __init__(self, folder: Path, tensorboard: bool = False, wandb_project: str | None = None, rank: int = 0):
        self._path = folder / FILE_NAME
        self._writes = rank == 0
        self._started = False
        self._tensorboard: ModuleType | None = None
        self._summary: Any = None
        self._wandb: Any = None
        if not self._writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if tensorboard:
            self._tensorboard = _optional("torch.utils.tensorboard", "run.tensorboard", "tensorboard")
        self._project = wandb_project
        if wandb_project is not None:
            _optional("wandb", "run.wandb_project", "wandb")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the line of ``step`` (algorithm steps, counted from 1); steps are written in rising order."""
        if not self._writes:
            return
        if not self._started:
            self._start(step)
        values = {name: float(value) for name, value in metrics.items()}
        line: dict[str, float | None] = {"step": step, "time": round(time.time(), 3)}
        line.update({name: value if math.isfinite(value) else None for name, value in values.items()})
        with named(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        if self._summary is not None:
            for name, value in values.items():
                self._summary.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Flush what TensorBoard and Weights & Biases still hold."""
        if self._summary is not None:
            self._summary.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _start(self, first_step: int) -> None:
        kept = [line for line in read_metrics(self._path) if line["step"] < first_step]
        write_whole(self._path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept).encode())
        if self._tensorboard is not None:
            self._summary = self._tensorboard.SummaryWriter(self._path.parent / "tensorboard", purge_step=first_step)
        if self._project is not None:
            self._wandb = self._start_wandb(self._project, resumed=bool(kept))
        self._started = True

    def _start_wandb(self, project: str, resumed: bool) -> Any:
        """A resumed run goes on under the id that its folder keeps; every other run, in whatever folder, gets a new one
        (folders share names, and Weights & Biases drops steps at or below those it has)."""
        folder = self._path.parent
        kept = folder / WANDB_ID
        if not (resumed and kept.exists()):
            write_whole(kept, uuid.uuid4().hex.encode())
        wandb = _optional("wandb", "run.wandb_project", "wandb")
        return wandb.init(project=project, dir=folder, id=kept.read_text(), name=str(folder), resume="allow")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, [] where there is none; a last line cut short by a kill is left out.

    Raises ValueError when any other line is not an object with a step.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace").split("\n")
    lines = []
    for number, line in enumerate(text, start=1):
        try:
            value = json.loads(line)
            value["step"]
        except (ValueError, TypeError, KeyError) as error:
            if number == len(text):  # behind the last newline: nothing, or the line the kill cut
                break
            raise ValueError(f"{path}:{number} is no metrics line: {line[:80]!r}; repair or remove the file") from error
        lines.append(value)
    return lines


def _optional(module: str, field: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{field} needs the package {package}: pip install {package}, or leave {field} out"
        ) from error
