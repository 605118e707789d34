"""One sbatch array over frozen jobs: no pickles, every node starts torchrun on the same file."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_zj.cli.jobs import ENVIRONMENT, Job


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What each job of the array asks for."""

    nodes: int
    time: str  # SLURM's format: HH:MM:SS or D-HH:MM:SS
    partition: str | None
    account: str | None
    parallel_jobs: int  # jobs of the array at the same time
    max_restarts: int  # of dead workers, by torchrun
    cpus_per_rank: int | None = None  # None: 4 beside a GPU, 1 without; SLURM's own default is one core for a node


# A requeued or restarted job resumes from its newest checkpoint, because its run.dir is fixed.  The port comes from the
# job id, which each task of an array has for itself, so that two jobs that share a node do not meet.  srun is told the
# cores again: since SLURM 22.05 it does not take them over from sbatch.
_SCRIPT = """#!/bin/bash
{directives}
set -euo pipefail
cd {cwd}
{exports}
FOLDER=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {listing})
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((20000 + SLURM_JOB_ID % 20000))
state() {{
  printf '{{"state": "%s", "exit_code": %s, "seconds": %s, "slurm_job": %s}}\\n' \\
    "$1" "$2" "$SECONDS" "$SLURM_JOB_ID" > "$FOLDER/status.partial"
  mv "$FOLDER/status.partial" "$FOLDER/status.json"
}}
state running null
code=0
srun --kill-on-bad-exit=1 --ntasks-per-node=1 --cpus-per-task={cpus} {python} -m torch.distributed.run \\
  --nnodes="$SLURM_NNODES" --nproc-per-node={nproc} --max-restarts={max_restarts} \\
  --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$HEAD:$PORT" \\
  {train} "$FOLDER/config.yaml" || code=$?
if [ "$code" -eq 0 ]; then state done 0; else state failed "$code"; fi
exit "$code"
"""


def write_sbatch(jobs: Sequence[Job], root: Path, allocation: Allocation, train: Sequence[str]) -> Path:
    """Write ``root/sweep.sbatch`` and the list of folders it reads.  Returns the script's path.

    All jobs of one array ask for the same resources, so they must be of one size; another raises ValueError.
    """
    [size] = {job.world_size for job in jobs}
    nproc = size // allocation.nodes
    root = root.resolve()
    listing, script = root / "jobs.txt", root / "sweep.sbatch"
    listing.write_text("".join(f"{job.folder.resolve()}\n" for job in jobs), encoding="utf-8")
    on_gpu = all(job.config.run.device != "cpu" for job in jobs)
    cpus = nproc * (allocation.cpus_per_rank or (4 if on_gpu else 1))
    text = _SCRIPT.format(
        directives="\n".join(_directives(len(jobs), nproc if on_gpu else None, cpus, root, allocation)),
        cpus=cpus,
        cwd=shlex.quote(str(Path.cwd())),
        exports="\n".join(f"export {name}={value}" for name, value in ENVIRONMENT.items()),
        listing=shlex.quote(str(listing)),
        python=shlex.quote(sys.executable),
        nproc=nproc,
        max_restarts=allocation.max_restarts,
        train=shlex.join(train),
    )
    script.write_text(text, encoding="utf-8")
    return script


def _directives(num_jobs: int, gpus: int | None, cpus: int, root: Path, allocation: Allocation) -> list[str]:
    options = {
        "job-name": f"zj-{root.name}",
        "array": f"0-{num_jobs - 1}%{allocation.parallel_jobs}",
        "nodes": str(allocation.nodes),
        "ntasks-per-node": "1",
        "gpus-per-node": None if gpus is None else str(gpus),
        "cpus-per-task": str(cpus),
        "time": allocation.time,
        "partition": allocation.partition,
        "account": allocation.account,
        "output": f"{root}/%A_%a.out",
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    return [*lines, "#SBATCH --requeue"]
