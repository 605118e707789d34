"""Jobs of ``zj launch``: sweep expansion by Hydra's grammar, folders, states, torchrun."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_zj.cli.compose import frozen_text, load_frozen, parse_overrides, save_frozen
from megatron_zj.config.loader import ConfigError
from megatron_zj.config.run import RunConfig
from megatron_zj.runtime.files import write_json

State = Literal["waiting", "running", "done", "failed", "interrupted"]

# The reasons are in launch/env.sh, which a test keeps equal to this.
ENVIRONMENT = {
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}
_TAIL_LINES = 3  # of a failed job's output, in the table
_NOT_IN_A_NAME = r"[^\w.,=+-]+"
_NAME_LENGTH = 60  # characters: file names end at 255 bytes, and one character takes up to 4
_GRACE_SECONDS = 30  # what torchrun gets to end its workers after an interrupt


@dataclass(frozen=True)
class Job:
    """One point: its configuration, already resolved, and its folder."""

    index: int
    overrides: tuple[str, ...]
    config: RunConfig
    world_size: int
    folder: Path
    swept: bool  # one of several under one folder; False: a lone run, whose folder is the user's run.dir

    @classmethod
    def of(
        cls, index: int, point: Sequence[str], config: RunConfig, world_size: int, folder: Path, *, swept: bool
    ) -> Job:
        """A job whose configuration says its folder and its ranks."""
        settled = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=folder), world_size=world_size)
        return cls(index, tuple(point), settled, world_size, folder, swept)

    @classmethod
    def read(cls, folder: Path) -> Job:
        """A job of a sweep that was frozen before."""
        config = load_frozen(folder / "config.yaml")
        overrides = tuple(json.loads((folder / "overrides.json").read_text(encoding="utf-8")))
        return cls(0, overrides, config, config.world_size or 1, folder, swept=True)

    @property
    def name(self) -> str:
        """For tables: the folder's name, or the whole folder of a lone run."""
        return self.folder.name if self.swept else str(self.folder)


def expand(overrides: Sequence[str]) -> list[tuple[str, ...]]:
    """Every combination of the sweeps (``a=1,2``, ``range(1,4)``, ``choice(x,y)``), last one fastest."""
    axes: list[list[str]] = []
    for override in parse_overrides(overrides):
        if override.is_sweep_override():
            if not override.is_discrete_sweep():
                raise ConfigError([f"{override.input_line!r}: only lists, choice(), range() and glob() can be swept"])
            key = override.get_key_element()
            axes.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            axes.append([str(override.input_line)])
    return [tuple(point) for point in itertools.product(*axes)]


def freeze(job: Job) -> None:
    """Write the job's folder.  A sweep's folder with another configuration is refused: its name would be a lie."""
    path = job.folder / "config.yaml"
    if job.swept and path.exists() and path.read_text(encoding="utf-8") != frozen_text(job.config):
        raise ConfigError([f"{path} is another configuration; give another --dir, or remove that job's folder"])
    save_frozen(job.config, path)
    write_json(job.folder / "overrides.json", list(job.overrides))
    if read_state(job.folder) is None:
        write_state(job, "waiting")


def read_state(folder: Path) -> State | None:
    """How a job stands; None before it was ever launched."""
    try:
        state: State = json.loads((folder / "status.json").read_text(encoding="utf-8"))["state"]
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return None
    return state


def write_state(job: Job, state: State, **more: Any) -> None:
    """Replace ``status.json`` in one step."""
    write_json(job.folder / "status.json", {"state": state, "overrides": list(job.overrides), **more})


def torchrun_command(job: Job, train: Sequence[str], max_restarts: int) -> list[str]:
    """One node.  ``env`` carries the variables, so that the printed command is the whole truth."""
    variables = dict(ENVIRONMENT)
    if job.config.run.device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""  # megatron-core takes any GPU it sees
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job.world_size)]
    return [
        "env",
        *(f"{name}={value}" for name, value in variables.items()),
        *torchrun,
        "--max-restarts",
        str(max_restarts),
        *train,
        str(job.folder / "config.yaml"),
    ]


def run_job(job: Job, train: Sequence[str], max_restarts: int, *, echo: bool) -> int:
    """Run to the end; the output goes to ``output.log``, or to the terminal with ``echo``.  Returns the exit code.

    An interrupt (Ctrl-C, SIGTERM) is passed on, waited for, recorded and raised again: no worker is left behind.
    """
    started = time.time()
    write_state(job, "running", started=started)
    command = torchrun_command(job, train, max_restarts)
    with (job.folder / "output.log").open("ab") as log:
        output = None if echo else log
        process = subprocess.Popen(command, stdout=output, stderr=None if echo else subprocess.STDOUT)
        try:
            code = process.wait()
        except BaseException:  # KeyboardInterrupt, or SystemExit from SIGTERM
            _end(process)
            write_state(job, "interrupted", started=started, seconds=round(time.time() - started, 1))
            raise
    seconds = round(time.time() - started, 1)
    write_state(job, "failed" if code else "done", exit_code=code, started=started, seconds=seconds)
    return code


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, which torchrun hands to its workers; SIGKILL if that does not help."""
    process.terminate()
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def table(jobs: Sequence[Job]) -> str:
    """One line a job, and for a failed one where its output is and how it ends."""
    width = max(len(job.name) for job in jobs)
    lines = [f"{'job':<{width}}  state        exit  seconds"]
    for job in jobs:
        state = read_state(job.folder) or "waiting"
        status = json.loads((job.folder / "status.json").read_text(encoding="utf-8")) if state != "waiting" else {}
        code, seconds = status.get("exit_code", "-"), status.get("seconds", "-")
        lines.append(f"{job.name:<{width}}  {state:<11}  {code!s:>4}  {seconds!s:>7}")
    for job in jobs:
        if read_state(job.folder) == "failed":
            lines += [f"FAILED {job.name}: {' '.join(job.overrides)}", *_tail(job.folder / "output.log")]
    return "\n".join(lines) + "\n"


def _tail(log: Path) -> list[str]:
    """The program's own error from the log (torchrun's report about it comes after), else its last lines."""
    text = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    if not text:
        return []
    errors = [line for line in text if line.startswith("error: ")]
    shown = errors[-1:] or [line for line in text if line.strip()][-_TAIL_LINES:]
    return [f"  {line[:200]}" for line in shown] + [f"  output: {log}"]


def job_name(index: int, swept: Sequence[str]) -> str:
    """``002_optim.lr=1e-4,run.seed=2``: what tells the job from the others, without what a file system dislikes."""
    return f"{index:03d}_{re.sub(_NOT_IN_A_NAME, '_', ','.join(swept))[:_NAME_LENGTH]}".rstrip("_")
