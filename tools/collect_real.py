"""The four real/* experiments in one file: python tools/collect_real.py FOLDER

FOLDER holds the runs ``pretrain``, ``sft``, ``reward`` and ``ppo`` (pytest's ``--basetemp`` of
tests/cli/test_real_data.py has them in ``real0``).  Writes benchmarks/real.json: per stage its steps, its rate, its
files, and every number of NUMBERS at the first and the last step and as the mean of both halves of the run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from megatron_zj.runtime.metrics import read_metrics

NUMBERS = {
    "pretrain": ("loss", "validation/loss"),
    "sft": ("loss", "validation/loss"),
    "reward": ("loss", "validation/loss", "validation/pair_accuracy", "validation/longer_wins"),
    "ppo": ("critic/loss", "score", "kl", "response_length"),
}


def course(lines: list[dict[str, Any]], name: str) -> dict[str, float] | None:
    """Of the steps that have the number; None: none has."""
    values = [line[name] for line in lines if name in line]
    if not values:
        return None
    middle = len(values) // 2
    found = {"first": values[0], "last": values[-1]}
    if middle:
        found |= {"first_half": fmean(values[:middle]), "second_half": fmean(values[middle:])}
    return {key: round(value, 4) for key, value in found.items()}


def main() -> int:
    """Read, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/real.json"))
    options = parser.parse_args()
    stages = {}
    for stage, names in NUMBERS.items():
        lines = read_metrics(options.folder / stage / "metrics.jsonl")
        config = yaml.safe_load((options.folder / stage / "config.yaml").read_text(encoding="utf-8"))
        stages[stage] = {
            "steps": len(lines),
            "lr": config["optim"]["lr"],
            "files": [Path(name).name for name in config["data"]["files"]],
            **{name: found for name in names if (found := course(lines, name)) is not None},
        }
    document = {
        "what": "the real/* experiments in turn, small model: enough steps to see that they run, not to learn",
        "machine": f"{platform.machine()}, {platform.python_implementation()} {platform.python_version()}, 2 CPU ranks",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "megatron-zj")},
        "stages": stages,
    }
    options.out.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(stages, indent=1, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
