"""Run the checks in stages, say what each did and how long it took, and end with one pytest-style line.

python tools/run_tests.py [--only STAGE,...] [--long | --gpu] [--list]

A stage that runs over its limit is stopped and counts as failed; the others still run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTEST = (sys.executable, "-m", "pytest")
KERNELS = (sys.executable, "-m", "kernels.check")
OTHER_TRITONS = ("3.6.0", "3.9.0")  # beside the lock's; downloaded into .triton/ at first use
DEFAULT = "not slow and not gpu and not multi_gpu"
NUM_WORKERS = max(1, min(4, len(os.sched_getaffinity(0))))


@dataclass(frozen=True)
class Stage:
    """One step: a command, what it shows, and the seconds after which it hangs: far more than a slow machine takes."""

    name: str
    what: str
    command: tuple[str, ...]
    limit: int = 900
    needs: str = ""  # a file without which the stage is left out
    gpus: int = 0  # with fewer it is left out

    @property
    def is_pytest(self) -> bool:
        """Whether the command's counts come from pytest."""
        return self.command[: len(PYTEST)] == PYTEST


@dataclass
class Outcome:
    """Counts of one stage; a command that is not pytest counts as one."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    note: str = ""
    names: list[str] = field(default_factory=list)  # of failed tests


def pytest_over(where: str, marks: str = DEFAULT, parallel: bool = False) -> tuple[str, ...]:
    """A pytest command over these paths with these marks."""
    spread = ("-n", str(NUM_WORKERS), "--dist", "worksteal") if parallel and NUM_WORKERS > 1 else ()
    return (*PYTEST, *where.split(), "-m", marks, "-p", "no:cacheprovider", *spread)


def default_stages() -> list[Stage]:
    """What ``make test`` runs, quickest answers first."""
    elsewhere = "--ignore=tests/architecture --ignore=tests/kernels"
    return [
        Stage("ruff", "style, imports, prints", (sys.executable, "-m", "ruff", "check", "."), 60),
        Stage("format", "layout of the source", (sys.executable, "-m", "ruff", "format", "--check", "."), 60),
        Stage("mypy", "types; strict where numbers are made", (sys.executable, "-m", "mypy")),
        Stage(
            "architecture",
            "who imports whom, sizes, names, docstrings",
            pytest_over("tests/architecture --ignore=tests/architecture/test_experiments.py"),
        ),
        Stage(
            "experiments",
            "every experiment composes and is possible",
            pytest_over("tests/architecture/test_experiments.py"),
        ),
        Stage(
            "unit",
            "one process",
            pytest_over(f"tests {elsewhere}", f"{DEFAULT} and not ranks and not resume", True),
        ),
        Stage("ranks", "several ranks: exactness", pytest_over(f"tests {elsewhere}", f"{DEFAULT} and ranks", True)),
        Stage(
            "resume",
            "stopped, killed and resumed runs",
            pytest_over(f"tests {elsewhere}", f"{DEFAULT} and resume"),
        ),
        Stage("kernels", "references, interpreter, planted bugs, compilation", KERNELS),
        Stage(
            "demo",
            "raw text to an aligned model, in miniature",
            (sys.executable, "tools/run_demo.py", "--miniature"),
            needs="tools/run_demo.py",
        ),
    ]


def long_stages() -> list[Stage]:
    """What ``make test-long`` runs."""
    return [
        Stage(
            "long",
            "every test marked slow, the kernels apart",
            pytest_over("tests --ignore=tests/kernels", "slow and not gpu and not multi_gpu"),
            4 * 3600,
        ),
        Stage("kernels", "every planted bug, every architecture", (*KERNELS, "--long"), 2 * 3600),
        *(
            Stage(
                f"triton-{version}",
                f"interpreter and compilation on Triton {version}",
                (*KERNELS, "interpreter", "compile", "--triton", version),
                3600,
            )
            for version in OTHER_TRITONS
        ),
        *(
            Stage(
                f"demo-{seed}",
                f"the whole demo with seed {seed}, every algorithm; all targets met",
                (
                    *(sys.executable, "tools/run_demo.py", "--seed", str(seed), "--folder", f"runs/demo-seed-{seed}"),
                    *("--fresh", "--algorithms", "all", "--check-targets"),
                ),
                3600,
                needs="tools/run_demo.py",
            )
            for seed in (0, 1, 2)
        ),
    ]


def gpu_stages() -> list[Stage]:
    """What ``make gpu-check`` runs."""
    return [
        Stage("gpu", "every test marked gpu", pytest_over("tests", "gpu and not multi_gpu"), 1800),
        Stage("gpus", "every test marked multi_gpu, over NCCL", pytest_over("tests", "multi_gpu"), 1800, gpus=2),
        Stage("kernels", "each op on the device", (*KERNELS, "gpu"), 1800),
        Stage(
            "demo",
            "raw text to an aligned model on the device",
            (sys.executable, "tools/run_demo.py", "--device", "cuda", "--fresh", "--folder", "runs/demo-gpu"),
            1800,
            needs="tools/run_demo.py",
        ),
    ]


def run(stage: Stage) -> Outcome:
    """Run one stage in a process group of its own, its output shown as it comes."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [*stage.command, *([f"--junitxml={report}"] if stage.is_pytest else [])]
        start = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            code = process.wait(timeout=stage.limit)
            note = ""
        except subprocess.TimeoutExpired:
            code, note = -1, f"stopped after {stage.limit} s"
        except KeyboardInterrupt:
            code, note = -1, "interrupted"
            raise
        finally:
            stop_group(process)
        outcome = read_report(report) if stage.is_pytest else Outcome()
    outcome.seconds, outcome.note = time.monotonic() - start, note
    nothing_there = stage.is_pytest and code == 5  # pytest found no test with these marks
    if not stage.is_pytest and code == 0:
        outcome.passed = 1
    elif code != 0 and outcome.failed == 0 and not nothing_there:
        outcome.failed, outcome.names = 1, [f"{stage.name}: {note or f'exit code {code}'}"]
    return outcome


def why_not(stage: Stage) -> str:
    """Why a stage is left out; empty: it runs."""
    if stage.needs and not (ROOT / stage.needs).exists():
        return f"there is no {stage.needs}"
    if stage.gpus and (there := num_gpus()) < stage.gpus:
        return f"it needs {stage.gpus} GPUs, torch sees {there}"
    return ""


def num_gpus() -> int:
    """As torch counts them, in a process of its own."""
    words = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """Nothing that the stage started outlives it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def read_report(path: Path) -> Outcome:
    """The counts and failed names of a JUnit file; empty where pytest wrote none."""
    outcome = Outcome()
    if not path.exists():
        return outcome
    for case in ET.parse(path).iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            outcome.failed += 1
            where = case.get("classname", "").replace(".", "/")
            outcome.names.append(f"{where}.py::{case.get('name')}" if where else f"{case.get('name')} (collection)")
        elif "skipped" in kinds:
            outcome.skipped += 1
        else:
            outcome.passed += 1
    return outcome


def closing_line(outcomes: list[Outcome], seconds: float) -> str:
    """``===== 812 passed, 3 skipped in 301.22s (0:05:01) =====``."""
    totals = {kind: sum(getattr(outcome, kind) for outcome in outcomes) for kind in ("failed", "passed", "skipped")}
    counts = ", ".join(f"{count} {kind}" for kind, count in totals.items() if count) or "no tests ran"
    minutes, rest = divmod(int(seconds), 60)
    return f" {counts} in {seconds:.2f}s ({minutes // 60}:{minutes % 60:02d}:{rest:02d}) ".center(100, "=")


def main() -> int:
    """Run the chosen stages; 1 when anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="stages, separated by commas")
    parser.add_argument("--long", action="store_true", help="the long forms")
    parser.add_argument("--gpu", action="store_true", help="what needs a GPU")
    parser.add_argument("--list", action="store_true", help="show the stages and their commands, run nothing")
    args = parser.parse_args()
    stages = long_stages() if args.long else gpu_stages() if args.gpu else default_stages()
    asked = [name for name in args.only.split(",") if name]
    if unknown := set(asked) - {stage.name for stage in stages}:
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(stage.name for stage in stages)}")
    stages = [stage for stage in stages if not asked or stage.name in asked]
    if args.list:
        for stage in stages:
            print(f"{stage.name:13} {stage.what}\n{'':13} {shlex.join(stage.command)}")
        return 0
    start, done, left_out = time.monotonic(), [], list[str]()
    for stage in stages:
        if reason := why_not(stage):
            print(f"\n--- {stage.name}: left out, {reason}", flush=True)
            left_out.append(f"{stage.name:13} left out: {reason}")
            continue
        print(f"\n--- {stage.name}: {stage.what}", flush=True)
        done.append((stage, run(stage)))
    print("\nstage          seconds  passed  failed  skipped")
    for stage, outcome in done:
        counts = f"{outcome.passed:>7} {outcome.failed:>7} {outcome.skipped:>8}"
        print(f"{stage.name:13} {outcome.seconds:>8.1f} {counts}  {outcome.note}")
    for line in left_out:
        print(line)
    if args.gpu and importlib.util.find_spec("transformer_engine") is None:
        print(
            "Transformer Engine is not installed, its tests were skipped: make gpu-check TE=1 installs and requires it"
        )
    for _, outcome in done:
        for name in outcome.names:
            print(f"FAILED {name}")
    outcomes = [outcome for _, outcome in done]
    print(closing_line(outcomes, time.monotonic() - start), flush=True)
    return 1 if any(outcome.failed for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
