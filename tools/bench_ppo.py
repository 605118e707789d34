"""An iteration of PPO side by side with TRL's: python tools/bench_ppo.py --peer-python PYTHON [--turns 5]

PYTHON is one that has trl 1.12.0, accelerate and datasets (and torch and transformers); without it, or where TRL is
missing there, only our side is measured.  Each side is a process of its own with the same model (the small preset,
fp32, the same weights), prompts and numbers; the sides take turns, one iteration at a time.

full    32 prompts of 32 tokens, 64 new tokens each, 4 minibatches, 1 epoch, 2 threads
ragged  the same, answers end at a stop token after a third of that on average; TRL's get the lengths that ours had
cost    our side alone against world size (a thread a rank), prompts, and new tokens

``shortcut``: algorithm.recompute_logprobs=false, which takes the old log-probabilities from sampling as TRL does.
Writes benchmarks/ppo.json (medians, spread, ratios below 1 where we are faster, by the clock and by processor time)
and benchmarks/ppo_cost.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megatron_zj.evaluation.plot import line_plot
from megatron_zj.models.presets import preset

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
OURS, PEER = BENCHMARKS / "own_ppo.py", BENCHMARKS / "peers" / "trl_ppo.py"
STOP, PAD = 2, 0
STOP_LOGIT = 4.05  # at temperature 0.7 a stop token after a third of 64 tokens on average, cut there
WARM_UP = 2  # turns
PHASES = ("generate", "score", "learn")
ROWS, NEW_TOKENS, RANKS = (8, 16, 32, 64), (32, 64, 128, 256), (1, 2, 4)  # of ``cost``


class Side:
    """A process that does an iteration when it is asked to."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.hello = self._hear()

    def iterate(self, lengths: list[int] | None) -> dict[str, Any]:
        """One iteration; ``lengths``: of the responses, for a side that does not draw them itself."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"lengths": lengths}) + "\n")
        self._process.stdin.flush()
        return self._hear()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        said: list[str] = []
        for line in self._process.stdout:
            if line.startswith("PEER "):
                found: dict[str, Any] = json.loads(line.removeprefix("PEER "))
                return found
            said.append(line)
        raise SystemExit("a side ended:\n" + "".join(said[-40:]))

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """What both sides run."""
    model, generator = preset("small"), torch.Generator().manual_seed(0)
    found: dict[str, Any] = {
        "preset": "small",
        "parallel": {},
        "rows": 32,
        "prompt_tokens": 32,
        "new_tokens": 64,
        "minibatches": 4,
        "threads": 2,
        "temperature": 0.7,
        "lr": 1e-6,
        "micro_batch_tokens": 1024,
        "ragged": False,
        "recompute": False,
        "stop": STOP,
        "pad": PAD,
        "stop_logit": STOP_LOGIT,
        "folder": str(folder),
        "weights": str(folder / "weights.safetensors"),
        **changes,
    }
    shape = (8 * found["rows"], found["prompt_tokens"])
    found["prompts"] = torch.randint(4, model.vocab_size, shape, generator=generator).tolist()
    found["llama"] = {
        "vocab_size": model.padded_vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.kv_heads,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": STOP,
    }
    return found


def command(script: Path, python: str, folder: Path, name: str, ranks: int = 1, **changes: Any) -> list[str]:
    """The command line of a side; its settings go to a file."""
    file = folder / f"{name}.json"
    file.write_text(json.dumps(settings(folder, **changes)))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return [python, "-W", "ignore", *launcher, str(script), str(file)]


def peer_versions(python: str | None) -> dict[str, str] | None:
    """What that Python has of the peer; None, and a line that says so, where it cannot run."""
    if python is None:
        print("TRL is left out: no --peer-python")
        return None
    ask = "import json,importlib.metadata as m;print(json.dumps({n:m.version(n) for n in ('trl','accelerate')}))"
    found = subprocess.run([python, "-c", ask], capture_output=True, text=True)
    if found.returncode:
        print(f"TRL is left out: {python} does not have it ({found.stderr.strip().splitlines()[-1]})")
        return None
    versions: dict[str, str] = json.loads(found.stdout)
    return versions


def compare(ragged: bool, peer: str | None, options: argparse.Namespace) -> dict[str, Any]:
    """The sides in turn."""
    told: dict[str, list[dict[str, Any]]] = {}
    lengths: list[int] | None = None
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder, sides = Path(name), {}
        common = {"ragged": ragged, "threads": options.threads}
        for side, recompute in (("shortcut", False), ("recompute", True)):
            line = command(OURS, sys.executable, folder, side, recompute=recompute, **common)
            sides[side] = stack.enter_context(Side(line))
        if peer is not None:
            sides["trl"] = stack.enter_context(Side(command(PEER, peer, folder, "trl", **common)))
        for turn in range(WARM_UP + options.turns):
            for side, process in sides.items():
                found = process.iterate(lengths if side == "trl" and ragged else None)
                if side == "shortcut":
                    lengths = found["lengths"]
                if turn >= WARM_UP:
                    told.setdefault(side, []).append(found)
        report: dict[str, Any] = {side: summary(turns) for side, turns in told.items()}
        if peer is not None:
            report["versions"] = sides["trl"].hello["versions"]
    if peer is not None:
        report["ratio_to_trl"] = {side: ratios(report[side], report["trl"]) for side in ("shortcut", "recompute")}
    return report


def summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and spread of a side's turns."""
    whole = [sum(turn["seconds"].values()) for turn in turns]
    busy = [processor_seconds(turn) for turn in turns]
    found: dict[str, Any] = {
        "seconds": round(statistics.median(whole), 4),
        "turns": [round(value, 4) for value in whole],
        "phases": {phase: round(statistics.median(turn["seconds"][phase] for turn in turns), 4) for phase in PHASES},
        "processor_seconds": round(statistics.median(busy), 4),
        "peak_mib": round(max(turn["peak_mib"] for turn in turns), 1),
    }
    if "outside" in turns[0]:
        found["outside_model"] = round(statistics.median(turn["outside"] for turn in turns), 4)
        every = [length for turn in turns for length in turn["lengths"]]
        found["answers"] = {"mean_length": round(statistics.mean(every), 2), "longest": max(every)}
    return found


def processor_seconds(turn: Mapping[str, Any]) -> float:
    """Of the whole iteration; a side may give it by phase."""
    found = turn["processor"]
    return float(sum(found.values()) if isinstance(found, dict) else found)


def ratios(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Mine by theirs: below 1 is less time, or less memory."""
    found = {key: round(mine[key] / theirs[key], 3) for key in ("seconds", "processor_seconds", "peak_mib")}
    phases = {phase: round(mine["phases"][phase] / theirs["phases"][phase], 3) for phase in PHASES}
    spread = [round(a / b, 3) for a, b in zip(mine["turns"], theirs["turns"], strict=True)]
    return {**found, "phases": phases, "turns": spread}


def cost(options: argparse.Namespace) -> dict[str, dict[str, dict[str, Any]]]:
    """Our seconds an iteration, one thing varied at a time."""
    report: dict[str, dict[str, dict[str, Any]]] = {}
    varied = (
        ("ranks", RANKS, lambda ranks: {"ranks": ranks, "threads": 1}),
        ("prompts", ROWS, lambda rows: {"rows": rows, "threads": options.threads}),
        ("new tokens", NEW_TOKENS, lambda tokens: {"new_tokens": tokens, "rows": 16, "threads": options.threads}),
    )
    for name, values, changes in varied:
        report[name] = {}
        for value in values:
            with ExitStack() as stack:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                side = stack.enter_context(Side(command(OURS, sys.executable, folder, "cost", **changes(value))))
                turns = [side.iterate(None) for _ in range(1 + options.cost_turns)][1:]
            found = summary(turns)
            report[name][str(value)] = {key: found[key] for key in ("seconds", "phases", "peak_mib")}
            print(f"cost: {value} {name}: {found['seconds']:.2f} s")
    return report


def plots(report: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """One SVG: seconds by phase against each thing varied, side by side."""
    parts, across = [], 0
    for name, found in report.items():
        lines = {p: [(float(x), entry["phases"][p]) for x, entry in found.items()] for p in PHASES}
        lines["all"] = [(float(x), entry["seconds"]) for x, entry in found.items()]
        inner = line_plot(f"seconds an iteration by {name}", lines, name)
        parts.append(inner.replace("<svg ", f'<svg x="{across}" ', 1))
        across += 430
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="{across}" height="240">{"".join(parts)}</svg>\n'


def main() -> None:
    """Measure, print, write; a part that was not measured keeps its last result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="a Python that has TRL")
    parser.add_argument("--parts", nargs="+", choices=("full", "ragged", "cost"), default=["full", "ragged", "cost"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--cost-turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--note", default="", help="what a reader must know of the measurement, such as a busy machine")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "ppo.json")
    options = parser.parse_args()
    report: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    report["machine"] = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    report["versions"] = {name: metadata.version(name) for name in ("torch", "megatron-core")}
    measured = {"threads": options.threads, "turns": options.turns, "note": options.note}
    beside = {"full", "ragged"} & set(options.parts)
    peer = options.peer_python if beside and peer_versions(options.peer_python) else None
    for part in options.parts:
        if part == "cost":
            report[part] = cost(options)
            (options.out.parent / "ppo_cost.svg").write_text(plots(report[part]), encoding="utf-8")
            continue
        report[part] = {**measured, **compare(part == "ragged", peer, options)}
        print(part, json.dumps(report[part].get("ratio_to_trl") or report[part]["shortcut"]))
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
