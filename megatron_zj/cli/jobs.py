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
from typing import Any, Literal, get_args

from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from megatron_zj.cli.compose import frozen_text, load_frozen, options_of, parse_overrides, save_frozen
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
        """A job of a sweep that was frozen before.  Raises ``ConfigError`` and ``OSError``."""
        config, path = load_frozen(folder / "config.yaml"), folder / "overrides.json"
        overrides = _json(path)
        if not isinstance(overrides, list) or not all(isinstance(text, str) for text in overrides):
            raise ConfigError([f"{path}: not a list of overrides; remove the job's folder and start the sweep again"])
        return cls(0, tuple(overrides), config, config.world_size or 1, folder, swept=True)

    @property
    def name(self) -> str:
        """For tables: the folder's name, or the whole folder of a lone run."""
        return self.folder.name if self.swept else str(self.folder)


def expand(overrides: Sequence[str]) -> list[tuple[str, ...]]:
    """Every combination of the sweeps (``a=1,2``, ``range(1,4)``, ``choice(x,y)``, ``experiment=glob(debug/*)``), last
    one fastest.  Raises ``ConfigError``, also for a sweep without a value.
    """
    axes = [_axis(override) for override in parse_overrides(overrides)]
    return [tuple(point) for point in itertools.product(*axes)]


def _axis(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not override.is_discrete_sweep():
        raise ConfigError([f"{override.input_line!r}: only lists, choice(), range() and glob() can be swept"])
    chosen = override.value()
    try:
        if isinstance(chosen, Glob):
            values = chosen.filter(options_of(override.key_or_group))
        else:
            values = list(override.sweep_string_iterator())
    except (HydraException, ValueError) as error:  # range() with a step of 0
        raise ConfigError([f"{override.input_line!r}: {error}"]) from None
    if not values:
        what = f"matches no option of conf/{override.key_or_group}" if isinstance(chosen, Glob) else "has no value"
        raise ConfigError([f"{override.input_line!r}: this sweep {what}"])
    return [f"{override.get_key_element()}={value}" for value in values]


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
    """How a job stands; None before it was ever launched, and where ``status.json`` is damaged."""
    return _read_status(folder).get("state")


def _read_status(folder: Path) -> dict[str, Any]:
    path = folder / "status.json"
    status = _json(path) if path.exists() else None
    return status if isinstance(status, dict) and status.get("state") in get_args(State) else {}


def _json(path: Path) -> object:
    """What the file holds; None where that is not JSON."""
    try:
        value: object = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return value


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
        status = {"state": "waiting", "exit_code": "-", "seconds": "-", **_read_status(job.folder)}
        lines.append(
            f"{job.name:<{width}}  {status['state']:<11}  {status['exit_code']!s:>4}  {status['seconds']!s:>7}"
        )
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
