"""Several seeds of the demo in one file: python tools/collect_learning.py runs/demo-seed-0 runs/demo-seed-1 ...

Reads each folder's summary.json and the stages' config.yaml (made by tools/run_demo.py --algorithms all), writes
benchmarks/learning.json, and prints the tables of docs/rlhf.md.  Folders whose settings differ are refused.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

import yaml

from megatron_zj.evaluation.report import targets

STAGES = ("sft", "reward", "ppo", "grpo", "rejection", "dpo", "ppo_flipped")
PACKAGES = ("torch", "megatron-core", "megatron-zj")
KEPT = ("exam_accuracy", "reward_pair_accuracy", "oracle_score", "kl", "safety_refused", "learning")
PLACES = ("actor", "critic", "reference", "reward", "model", "health", "parity")  # paths, limits, defaults
Json = dict[str, Any]


def settings(folder: Path) -> Json:
    """What each stage was run with, less paths and the seed."""
    found = {}
    for stage in STAGES:
        config = yaml.safe_load((folder / stage / "config.yaml").read_text(encoding="utf-8"))
        algorithm = {name: value for name, value in config["algorithm"].items() if name not in PLACES}
        critic = (config["algorithm"].get("critic") or {}).get("optim")
        rates = {
            "lr": config["optim"]["lr"],
            "schedule": config["optim"]["schedule"],
            **({"critic_lr": critic["lr"]} if critic else {}),
        }
        found[stage] = {"num_steps": config["run"]["num_steps"], **rates, **algorithm}
    return found


def seed_of(folder: Path) -> str:
    """The seed of the run."""
    return str(yaml.safe_load((folder / "ppo" / "config.yaml").read_text(encoding="utf-8"))["run"]["seed"])


def kl_table(seeds: dict[str, Json]) -> str:
    """Markdown: a row an algorithm, a column a seed; KL of its answers to the SFT model, and its standard error."""
    head = "| KL, nats an answer (k3) | " + " | ".join(f"seed {seed}" for seed in seeds) + " |"
    lines = [head, "|---" * (len(seeds) + 1) + "|"]
    for name in next(iter(seeds.values()))["learning"]:
        found = [one["learning"][name]["held_out_kl"] for one in seeds.values()]
        cells = [f"{one['kl']:.2f} ± {one['kl_standard_error']:.2f} ({one['k3']:.2f})" for one in found]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table(seeds: dict[str, Json]) -> str:
    """Markdown: a row a model, a column a seed; oracle score, and its change from the SFT model."""
    lines = [
        "| oracle score (change) | " + " | ".join(f"seed {seed}" for seed in seeds) + " |",
        "|---" * (len(seeds) + 1) + "|",
        "| SFT | " + " | ".join(f"{one['oracle_score']['sft']:.3f}" for one in seeds.values()) + " |",
    ]
    for name in next(iter(seeds.values()))["learning"]:
        cells = [
            f"{one['learning'][name]['oracle_score']:.3f} "
            f"({one['learning'][name]['oracle_score'] - one['oracle_score']['sft']:+.3f})"
            for one in seeds.values()
        ]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Gather, check, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--to", type=Path, default=Path("benchmarks/learning.json"))
    arguments = parser.parse_args()
    common, seeds = settings(arguments.folders[0]), {}
    for folder in arguments.folders:
        if settings(folder) != common:
            parser.error(f"{folder} was run with other settings than {arguments.folders[0]}")
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        checked = {"targets_missed": [str(target) for target in targets(summary) if not target.met]}
        seeds[seed_of(folder)] = {name: summary[name] for name in KEPT} | checked
    result = {
        "what": "the demo from raw text, then each algorithm from the same SFT model; 200 held-out patients, sampled",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": f"{platform.machine()}, CPython {platform.python_version()}, 2 CPU ranks of 1 thread, fp32",
        "settings": common,
        "seeds": seeds,
    }
    arguments.to.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{table(seeds)}\n\n{kl_table(seeds)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
