"""Prove the kernels: ``python -m kernels.check [lanes] [--long] [--triton VERSION]``, from the root of a checkout.

Lanes: reference (torch against fp64), interpreter (Triton in its interpreter), mutation (planted bugs), compile (for
GPUs that are not here); those four by default, one table at the end.  ``gpu`` runs the same proofs on the device,
then the memory checker, then the benchmark.  ``--triton`` takes another version than the installed one.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from dataclasses import dataclass
from pathlib import Path

from kernels import dispatch

LANES = ("reference", "interpreter", "mutation", "compile")
FORMS = "tests/kernels/triton_forms"
_QUIET = ["-q", "-p", "no:cacheprovider", "--no-header", "--tb=short"]


@dataclass(frozen=True)
class Outcome:
    """One lane's line in the table."""

    lane: str
    passed: int
    failed: int
    skipped: int
    seconds: float
    note: str = ""

    @property
    def red(self) -> bool:
        """Whether the lane failed, or ran nothing without a reason."""
        return self.failed > 0 or (self.passed == 0 and not self.note)


def _command(lane: str, long: bool) -> tuple[list[str], list[str]]:
    """Environment settings and pytest arguments of a lane."""
    marks = [] if long else ["-m", "not slow"]
    if lane == "reference":
        return [], ["tests/kernels", *marks, f"--ignore={FORMS}", "--ignore=tests/kernels/compiled"]
    if lane == "interpreter":
        return ["TRITON_INTERPRET=1"], [FORMS, *marks, "--deselect", f"{FORMS}/test_mutations.py"]
    if lane == "mutation":
        return ["TRITON_INTERPRET=1"], [f"{FORMS}/test_mutations.py", *marks]
    if lane == "gpu":
        return [], [FORMS, *marks, "--deselect", f"{FORMS}/test_mutations.py"]
    return ["TRITON_DISABLE_LINE_INFO=1"], ["tests/kernels/compiled", *marks]


class NoTritonError(Exception):
    """The Triton version asked for could not be had."""


def other_triton(version: str) -> list[str]:
    """Environment settings under which this Triton is imported, all else as it is; downloaded at first use.

    Its folder holds nothing else and comes first on the path.  Raises NoTritonError.
    """
    folder = Path(".triton", version).absolute()
    settings = [f"PYTHONPATH={folder}"]

    def found() -> str:
        code = "import triton; print(triton.__version__)"
        return subprocess.run(
            ["env", *settings, sys.executable, "-c", code], check=False, capture_output=True, text=True
        ).stdout.strip()

    if found() != version:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--upgrade", "--target", str(folder), f"triton=={version}"], check=False)
    if (have := found()) != version:
        raise NoTritonError(f"could not install triton=={version} into {folder} (there is {have or 'none'})")
    return settings


def run_lane(lane: str, long: bool, version: str | None = None) -> Outcome:
    """Run one lane in a process of its own; ``version``: of Triton, None: the installed one."""
    settings, arguments = _command(lane, long)
    if version is not None:
        try:
            settings, lane = [*settings, *other_triton(version)], f"{lane} {version}"
        except NoTritonError as error:
            return Outcome(f"{lane} {version}", 0, 1, 0, 0.0, str(error))
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lane-") as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *_QUIET, f"--junitxml={report}", *arguments]
        done = subprocess.run(["env", "OMP_NUM_THREADS=1", *settings, *command], check=False)
        seconds = time.monotonic() - started
        if not report.exists():
            return Outcome(lane, 0, 1, 0, seconds, f"pytest ended with {done.returncode}")
        suite = xml.parse(report).getroot().find("testsuite")
    counts = {} if suite is None else suite.attrib
    total, skipped = int(counts.get("tests", 0)), int(counts.get("skipped", 0))
    failed = int(counts.get("failures", 0)) + int(counts.get("errors", 0))
    return Outcome(lane, total - failed - skipped, failed, skipped, seconds)


def table(outcomes: list[Outcome]) -> str:
    """The lanes, one line each."""
    lines = [f"{'lane':<18} {'passed':>7} {'failed':>7} {'skipped':>8} {'seconds':>8}"]
    for outcome in outcomes:
        numbers = f"{outcome.passed:>7} {outcome.failed:>7} {outcome.skipped:>8} {outcome.seconds:>8.1f}"
        lines.append(f"{outcome.lane:<18} {numbers}  {outcome.note}".rstrip())
    return "\n".join(lines) + "\n"


def _run(lane: str, command: list[str]) -> Outcome:
    """A lane that is one command: passed where it ends with 0."""
    started = time.monotonic()
    passed = int(subprocess.run(command, check=False).returncode == 0)
    return Outcome(lane, passed, 1 - passed, 0, time.monotonic() - started)


def gpu() -> list[Outcome]:
    """The proofs on the device, the memory checker on small ones, then the benchmark."""
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return [Outcome("gpu", 0, 0, 0, 0.0, "skipped: no CUDA device here")]
    outcomes = [run_lane("gpu", long=False)]
    checker = shutil.which("compute-sanitizer")
    if checker is None:
        outcomes.append(Outcome("sanitizer", 0, 0, 0, 0.0, "skipped: compute-sanitizer is not installed"))
    else:
        small = [sys.executable, "-m", "pytest", *_QUIET, FORMS, "-k", "one or primes or ragged or odd"]
        # Within a block of torch's caching allocator a wrong address is still a good one.
        seen = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", checker, "--error-exitcode=1"]
        for tool in ("memcheck", "racecheck"):
            outcomes.append(_run(tool, [*seen, "--tool", tool, *small]))
    if not any(outcome.red for outcome in outcomes):
        outcomes.append(_run("benchmark", [sys.executable, "-m", "kernels.bench", "--plot", "bench.svg"]))
    return outcomes


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 where a lane is red."""
    parser = argparse.ArgumentParser(prog="python -m kernels.check", description=__doc__)
    parser.add_argument("lanes", nargs="*", choices=[*LANES, "gpu", []], help="default: the four that need no GPU")
    parser.add_argument("--long", action="store_true", help="every bug, every table entry, every architecture")
    parser.add_argument("--write", action="store_true", help="with compile: renew kernels/resources.json first")
    parser.add_argument("--triton", metavar="VERSION", help="run the lanes on this Triton (kept in .triton/VERSION)")
    chosen = parser.parse_args(arguments)
    if not Path("tests/kernels").is_dir():
        parser.error("run this from the root of a checkout: the proofs are in tests/kernels")
    if chosen.write:
        write = "from kernels import resources; import sys; sys.exit('\\n'.join(resources.write(resources.ALL)) or 0)"
        subprocess.run(["env", "TRITON_DISABLE_LINE_INFO=1", sys.executable, "-c", write], check=True)
    outcomes: list[Outcome] = []
    for lane in chosen.lanes or LANES:
        outcomes += gpu() if lane == "gpu" else [run_lane(lane, chosen.long, chosen.triton)]
    staleness = importlib.import_module("kernels.staleness") if dispatch.has_triton() else None
    timings = "" if staleness is None else f"timings: {staleness.summary()}\n"
    sys.stdout.write("\n" + table(outcomes) + timings)
    return int(any(outcome.red for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
