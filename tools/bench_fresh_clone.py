"""What the README's two commands take on a fresh clone, in a fresh environment: python tools/bench_fresh_clone.py

Clones what is committed, then runs ``make setup``, ``make test`` and ``make demo`` there (``--steps`` chooses), and
writes benchmarks/fresh_clone.json: seconds of each, tests by stage, the demo's stages and targets.  Stops at the first
that fails, with its code.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS = {"setup": "setup", "test": "test", "demo": "demo ARGS=--check-targets"}
ROW = re.compile(r"^(\w\S*) +(\d+\.\d) +(\d+) +(\d+) +(\d+)", re.MULTILINE)  # of the table that make test ends with
DEMO = ("seconds", "peak_memory_mib", "exam_accuracy", "reward_pair_accuracy", "oracle_score", "kl", "layout")


def stages_of(output: str) -> dict[str, dict[str, float]]:
    """The closing table of ``make test``."""
    _, _, table = output.rpartition("\nstage          seconds")
    counts = ("passed", "failed", "skipped")
    return {
        name: {"seconds": float(seconds), **{kind: int(n) for kind, n in zip(counts, found, strict=True)}}
        for name, seconds, *found in ROW.findall(table)
    }


def measured(step: str, clone: Path) -> dict[str, Any]:
    """Run ``make`` for one step, its output on the screen too."""
    start, lines = time.perf_counter(), []
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    command = ["make", *STEPS[step].split()]
    with subprocess.Popen(
        command, cwd=clone, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise SystemExit(process.returncode)
    found: dict[str, Any] = {"command": " ".join(command), "seconds": round(time.perf_counter() - start, 1)}
    if step == "test":
        found["stages"] = stages_of("".join(lines))
    if step == "demo":
        summary = json.loads((clone / "runs" / "demo" / "summary.json").read_text(encoding="utf-8"))
        found["stages"] = {name: summary[name] for name in DEMO}
        found["targets"] = [line.strip() for line in lines if line.startswith(("met ", "MISSED "))]
    return found


def main() -> None:
    """Clone, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="an empty or absent folder to clone into; default: a temporary one")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--note", default="", help="what a reader must know of the measurement, such as a busy machine")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "fresh_clone.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        clone = options.folder or Path(temporary) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        git = ["git", "-C", str(clone), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
        steps = {step: measured(step, clone) for step in options.steps}
        version = [str(clone / ".venv" / "bin" / "python"), "-c", "import platform; print(platform.python_version())"]
        python = subprocess.run(version, check=True, capture_output=True, text=True).stdout.strip()
    document = {
        "what": "wall seconds of the README's commands, each after the one before",
        "commit": commit,
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "python": python,
        "note": options.note,
        **steps,
    }
    options.out.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(", ".join(f"{step} {found['seconds']:.0f} s" for step, found in steps.items()))


if __name__ == "__main__":
    sys.exit(main())
