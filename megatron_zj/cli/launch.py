"""``zj launch``: a configuration, a sweep of them, or a SLURM array of them, under torchrun.

Every point is composed and checked before any starts.  Each job has a folder with its frozen configuration
(``config.yaml``), its overrides (``overrides.json``), its output (``output.log``) and its state (``status.json``).
A failing job does not stop the others.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType

from megatron_zj.cli.compose import compose_run, experiments, load_frozen, parse_overrides
from megatron_zj.cli.jobs import Job, expand, freeze, job_name, read_state, run_job, table, torchrun_command
from megatron_zj.cli.main import entry
from megatron_zj.cli.slurm import Allocation, write_sbatch
from megatron_zj.config.checks import check, require
from megatron_zj.config.loader import ConfigError
from megatron_zj.config.run import RunConfig

TRAIN = ("-m", "megatron_zj.cli.train", "--config")  # what torchrun runs; the configuration's path follows
SLURM: dict[str, object] = {  # options that --slurm alone takes -> what holds where they are not given
    "nodes": 1,
    "gpus_per_node": 8,
    "cpus_per_rank": None,
    "time": "24:00:00",
    "partition": None,
    "account": None,
    "parallel_jobs": 8,
}


def main(argv: Sequence[str], train: Sequence[str] = TRAIN) -> int:
    """Launch.  ``train``: what to run on a frozen configuration (a stand-in, in tests).

    Returns 0 when every job ended well, 1 when one did not.
    """
    options = _parse(argv)
    if options.status is not None:
        sys.stdout.write(table(_jobs_under(options.status)))
        return 0
    jobs = _plan(options)
    if options.dry_run:
        for job in jobs:
            command = torchrun_command(job, train, options.max_restarts)
            sys.stdout.write(f"{job.name}: {' '.join(command)}\n")
        return 0
    for job in jobs:
        freeze(job)
    if options.slurm:
        allocation = Allocation(
            nodes=options.nodes,
            time=options.time,
            partition=options.partition,
            account=options.account,
            parallel_jobs=options.parallel_jobs,
            max_restarts=options.max_restarts,
            cpus_per_rank=options.cpus_per_rank,
        )
        script = write_sbatch(jobs, options.dir, allocation, train)
        sys.stdout.write(f"{len(jobs)} jobs frozen under {options.dir}\nsubmit with: sbatch {script}\n")
        return 0
    return _run_all(jobs, train, options.max_restarts)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, whole; an option that would have no effect is refused."""
    parser = _parser()
    options = parser.parse_intermixed_args(list(argv))
    if options.config is not None and (options.overrides or options.multirun):
        parser.error("--config is a whole configuration; it takes no overrides and no --multirun")
    if options.dir is not None and not (options.multirun or options.slurm):
        parser.error("--dir is for --multirun and --slurm; a lone run's folder is run.dir=...")
    given = [name for name in SLURM if getattr(options, name) is not None]
    if given and not options.slurm:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        parser.error(f"{flags}: for --slurm alone; a run here is on one node, with world_size or --nproc ranks")
    for name in SLURM.keys() - set(given):
        setattr(options, name, SLURM[name])
    if options.multirun or options.slurm:
        options.dir = _jobs_folder(options.dir, options.overrides)
    return options


def _jobs_folder(folder: Path | None, overrides: Sequence[str]) -> Path:
    """Where jobs have their folders: ``--dir``, else what ``run.dir`` says, else a name by the experiment."""
    given = [override for override in parse_overrides(overrides) if override.key_or_group == "run.dir"]
    if any(override.is_sweep_override() for override in given):
        raise ConfigError(["run.dir: a job's folder is named by what is swept; give one folder for all"])
    if folder is not None:
        if given:
            sys.stderr.write(f"run.dir is not used: each job has its own folder below --dir={folder}\n")
        return folder
    if given:
        return Path(str(given[-1].value()))
    chosen = [text.partition("=")[2] for text in overrides if text.startswith("experiment=")]
    is_one = len(chosen) > 0 and re.fullmatch(r"[\w./-]+", chosen[0])  # no sweep of experiments
    return Path("runs/sweeps") / (chosen[0] if is_one else "sweep")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zj launch", description="Run configurations under torchrun.", epilog=experiments()
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="a sweep has commas: optim.lr=1e-4,3e-4")
    parser.add_argument("-m", "--multirun", action="store_true", help="every combination of the values given")
    parser.add_argument("--config", type=Path, help="a frozen configuration instead of overrides")
    parser.add_argument(
        "--nproc", type=_count, metavar="N", help="ranks; default: the configuration's world_size, else 1"
    )
    parser.add_argument(
        "--max-restarts",
        type=partial(_count, least=0),
        default=0,
        metavar="N",
        help="times torchrun restarts dead workers",
    )
    parser.add_argument(
        "--dir",
        type=Path,
        help="folder of the jobs of --multirun or --slurm; default run.dir=..., else runs/sweeps/<experiment>",
    )
    parser.add_argument("--dry-run", action="store_true", help="compose, check, and print the commands")
    parser.add_argument("--no-files", action="store_true", help="do not look for input files (they are elsewhere)")
    parser.add_argument("--status", type=Path, metavar="DIR", help="print how the jobs of a sweep stand, and end")
    slurm = parser.add_argument_group("SLURM")
    slurm.add_argument("--slurm", action="store_true", help="write one sbatch array instead of running")
    slurm.add_argument("--nodes", type=_count, metavar="N", help="nodes a job (1); world_size is shared among them")
    slurm.add_argument("--gpus-per-node", type=_count, metavar="N", help="GPUs a node has (8); a job may ask for fewer")
    slurm.add_argument(
        "--cpus-per-rank", type=_count, metavar="N", help="cores a rank asks for; default 4 with a GPU, 1 without"
    )
    slurm.add_argument("--time", help=f"time limit of a job ({SLURM['time']})")
    slurm.add_argument("--partition", help="SLURM partition")
    slurm.add_argument("--account", help="SLURM account")
    slurm.add_argument("--parallel-jobs", type=_count, metavar="N", help="jobs of the array at the same time (8)")
    return parser


def _count(text: str, least: int = 1) -> int:
    """A number of things, of an option."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number >= {least}, got {text!r}")
    return int(text)


def _plan(options: argparse.Namespace) -> list[Job]:
    """All jobs, composed and checked; ``ConfigError`` with every problem of every point otherwise."""
    if options.config is not None:
        points: list[tuple[str, ...]] = [()]
    else:
        points = expand(options.overrides) if options.multirun else [tuple(options.overrides)]
    one_folder = not (options.multirun or options.slurm)
    fixed = set(points[0]).intersection(*points)
    jobs, problems = [], []
    for index, point in enumerate(points):
        try:
            config = load_frozen(options.config) if options.config is not None else compose_run(point)
            world_size = options.nproc or config.world_size or 1
            _require(config, world_size, options)
        except ConfigError as error:
            where = f"point {index} ({' '.join(point)}): " if options.multirun else ""
            problems += [f"{where}{problem}" for problem in error.problems]
            continue
        label = [text for text in point if text not in fixed]
        folder = config.run.dir if one_folder else options.dir / job_name(index, label)
        jobs.append(Job.of(index, point, config, world_size, folder, swept=not one_folder))
    if problems:
        raise ConfigError(problems)
    if options.slurm:
        _require_one_shape(jobs, options.nodes, options.gpus_per_node)
    return jobs


def _require_one_shape(jobs: list[Job], nodes: int, gpus_per_node: int) -> None:
    """One array asks for the same nodes for each of its jobs."""
    sizes = sorted({job.world_size for job in jobs})
    if len(sizes) > 1:
        raise ConfigError(
            [f"--slurm: one array has one size of job, this sweep has {sizes} ranks; sweep each size alone"]
        )
    ranks, rest = divmod(sizes[0], nodes)
    if rest:
        raise ConfigError([f"--nodes: {nodes} does not divide the {sizes[0]} ranks of a job; change it or world_size"])
    if ranks > gpus_per_node and any(job.config.run.device != "cpu" for job in jobs):
        raise ConfigError(
            [
                f"--nodes: {sizes[0]} ranks on {nodes} are {ranks} GPUs a node, and a node has {gpus_per_node}; set "
                f"--nodes {-(-sizes[0] // gpus_per_node)}, or --gpus-per-node {ranks} where nodes have as many"
            ]
        )


def _require(config: RunConfig, world_size: int, options: argparse.Namespace) -> None:
    """The checks of a run; for SLURM the packages of this machine do not matter."""
    if options.no_files:
        errors = [f for f in check(config, world_size, files=False, here=not options.slurm) if f.level == "error"]
        if errors:
            raise ConfigError([str(finding) for finding in errors])
    else:
        require(config, world_size, here=not options.slurm)


def _run_all(jobs: list[Job], train: Sequence[str], max_restarts: int) -> int:
    """One after the other.  A job that is done, with the same configuration, is not run again."""
    signal.signal(signal.SIGTERM, _exit_on_signal)
    for number, job in enumerate(jobs, start=1):
        if len(jobs) > 1 and read_state(job.folder) == "done":
            sys.stdout.write(f"[{number}/{len(jobs)}] {job.name}: done before\n")
            continue
        sys.stdout.write(f"[{number}/{len(jobs)}] {job.name}: {job.world_size} ranks, {job.folder}\n")
        sys.stdout.flush()
        code = run_job(job, train, max_restarts, echo=len(jobs) == 1)
        if code and len(jobs) > 1:
            sys.stdout.write(f"[{number}/{len(jobs)}] {job.name}: FAILED, exit code {code}\n")
    failed = [job for job in jobs if read_state(job.folder) != "done"]
    if len(jobs) > 1 or failed:
        sys.stdout.write(table(jobs))
    return 1 if failed else 0


def _exit_on_signal(number: int, _: FrameType | None) -> None:
    """A kill becomes an exception, so that the workers are ended too."""
    sys.exit(128 + number)


def _jobs_under(root: Path) -> list[Job]:
    folders = sorted(path.parent for path in root.glob("*/config.yaml"))
    if not folders:
        raise ConfigError([f"{root}: no job there (a job is a folder with a config.yaml)"])
    return [Job.read(folder) for folder in folders]


if __name__ == "__main__":
    sys.exit(entry("launch", sys.argv[1:]))
