"""Packed SFT side by side: this framework and TRL's packings, on the same dialogues, in one run.

    python tools/bench_packing.py --peer-python /path/to/python [--out benchmarks/packing.json]

Counted are the dialogues' own tokens, padding left out, that a side trains on in a second; a turn is one epoch.  The
sides take turns, each in a process of its own with the same number of threads while the others wait, and the
medians of the turns are compared.  TRL runs every packing it has (benchmarks/peers/trl_sft.py).  A first sweep
(``--shapes``) finds the best shape of each packing and, in the same way, the best pack size of ours.
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
import time
from collections.abc import Callable
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_zj.algorithms.pretrain import NextToken
from megatron_zj.algorithms.supervised import Supervised
from megatron_zj.config.derived import ALL
from megatron_zj.config.model import ModelConfig
from megatron_zj.config.optim import EngineConfig, OptimConfig
from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.engine.build import build_engine
from megatron_zj.roles.exchange import Exchange
from megatron_zj.roles.placement import build_placements
from megatron_zj.roles.role import Role
from megatron_zj.roles.world import World
from megatron_zj.runtime.memory import keep_freed_memory
from megatron_zj.runtime.timers import Timers

PEER = Path(__file__).resolve().parent.parent / "benchmarks" / "peers" / "trl_sft.py"
LLAMA = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 10,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
LONGEST, LR = 512, 1e-4
OURS = "megatron_zj"
PACKS = (1024, 2048, 4096)  # tokens of our packs
# rows a device batch x tokens a row; padding_free and padded take whole dialogues, so there length is a limit only
SHAPES = {
    "bfd": [(1, 512), (1, 1024), (2, 512), (4, 512)],
    "wrapped": [(1, 512), (4, 256), (4, 512), (8, 512)],
    "padding_free": [(2, LONGEST), (4, LONGEST), (8, LONGEST)],
    "padded": [(4, LONGEST), (8, LONGEST)],
}


def dialogues(count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids and 0/1 masks of the doctor's words; lengths are log-normal, 24 to LONGEST tokens, turns alternate."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(count).log_normal_(5.0, 0.7, generator=generator).round().clamp(24, LONGEST).int().tolist()
    ids = [torch.randint(4, LLAMA["vocab_size"], (length,), generator=generator).tolist() for length in lengths]
    masks = []
    for length in lengths:
        turns = torch.randint(8, 48, (length,), generator=generator)
        speaker = torch.repeat_interleave(torch.arange(length) % 2, turns)[:length]
        masks.append(speaker.tolist())
    return ids, masks


class Dialogues:
    """A stream of the dialogues, in a fresh order each epoch."""

    def __init__(self, ids: list[list[int]], masks: list[list[int]]) -> None:
        self.rows = [torch.tensor(row) for row in ids]
        self.masks = [torch.tensor(mask) for mask in masks]
        self.num_units, self.order = len(ids), list[int]()

    def next(self, num_units: int, rank: int, world_size: int) -> Batch:
        """The next of this rank's share."""
        while len(self.order) < num_units:
            self.order += torch.randperm(self.num_units).tolist()
        taken, self.order = self.order[:num_units], self.order[num_units:]
        mine = [taken[at] for at in torch.tensor_split(torch.arange(num_units), world_size)[rank].tolist()]
        fields = {"loss_mask": Rows.of([self.masks[row] for row in mine])}
        return Batch(Rows.of([self.rows[row] for row in mine]), fields)

    def describe(self, draw: int) -> str:
        """Which dialogue."""
        return f"dialogue {draw}"

    def state_dict(self) -> dict[str, Any]:
        """Nothing here is resumed."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


def own_turn(
    options: argparse.Namespace, ids: list[list[int]], masks: list[list[int]], pack: int
) -> Callable[[], dict[str, Any]]:
    """One epoch of ``Supervised``, as ``zj train`` runs it, in packs of ``pack`` tokens."""
    model = ModelConfig(
        vocab_size=LLAMA["vocab_size"],
        hidden_size=LLAMA["hidden_size"],
        ffn_hidden_size=LLAMA["intermediate_size"],
        num_layers=LLAMA["num_hidden_layers"],
        num_attention_heads=LLAMA["num_attention_heads"],
        max_position_embeddings=LLAMA["max_position_embeddings"],
    )
    placement = build_placements(ParallelConfig(), {}, {ALL}, 1, 600)[ALL]
    if placement.groups is None:
        raise RuntimeError("this process is outside the only placement")
    engine = build_engine(
        model,
        "lm",
        placement.groups,
        EngineConfig(micro_batch_tokens=pack),
        OptimConfig(lr=LR, weight_decay=0.1, schedule="constant"),
        1000,
        torch.device("cpu"),
        0,
    )
    role, batch_size = Role("model", placement, engine, Exchange()), options.batch_size
    timers = Timers(torch.device("cpu"))
    algorithm = Supervised(role, NextToken(), Dialogues(ids, masks), batch_size, World.current(), timers)

    def turn() -> dict[str, Any]:
        start, busy = time.perf_counter(), time.process_time()
        for _ in range(len(ids) // batch_size):
            algorithm.step()
        return {"seconds": time.perf_counter() - start, "processor": time.process_time() - busy}

    return turn


class Peer:
    """TRL with one packing, in its own process."""

    def __init__(
        self, options: argparse.Namespace, folder: str, packing: str, shape: tuple[int, int], data: Any
    ) -> None:
        ids, masks = data
        labels = [[i if m else -100 for i, m in zip(*pair, strict=True)] for pair in zip(ids, masks, strict=True)]
        mean = sum(map(len, ids)) / len(ids)
        settings = {
            "packing": packing,
            "rows": shape[0],
            "length": shape[1],
            "mean_length": mean,
            "tokens_a_step": mean * options.batch_size,
            "loss_type": "chunked_nll",  # TRL's default; drops what carries no loss before the vocabulary
            "attention": "sdpa",
            "threads": options.threads,
            "lr": LR,
            "llama": LLAMA,
            "folder": folder,
            "input_ids": ids,
            "labels": labels,
        }
        name = Path(folder) / f"{packing}-{shape[0]}-{shape[1]}.json"
        name.write_text(json.dumps(settings))
        self.log = open(name.with_suffix(".log"), "w")  # noqa: SIM115  (as long as the process)
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        self.process = subprocess.Popen(
            [options.peer_python, str(PEER), str(name)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )
        self.shape, self.about = shape, self._answer()

    def turn(self) -> dict[str, Any]:
        """One epoch."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.log.close()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("PEER "):
                return dict(json.loads(line.removeprefix("PEER ")))
        raise RuntimeError(f"the peer ended; see {self.log.name}:\n{Path(self.log.name).read_text()[-2000:]}")


def best_shapes(options: argparse.Namespace, folder: str, data: Any) -> dict[str, tuple[int, int]]:
    """The fastest shape of each packing, and pack of ours (1 row), by the second of two turns."""
    best, seconds = {}, {}
    for pack in PACKS:
        turn = own_turn(options, *data, pack)
        turn()
        seconds[1, pack] = turn()["processor"]
    best[OURS] = report_best(OURS, seconds)
    for packing, shapes in SHAPES.items():
        seconds = {}
        for shape in shapes:
            peer = Peer(options, folder, packing, shape, data)
            peer.turn()
            seconds[shape] = peer.turn()["processor"]  # other programs disturb it less than the clock
            peer.close()
        best[packing] = report_best(packing, seconds)
    return best


def report_best(name: str, seconds: dict[tuple[int, int], float]) -> tuple[int, int]:
    """The shape of the fewest processor seconds, after a line that shows all."""
    print(f"{name}: " + ", ".join(f"{rows}x{length} {spent:.2f} s" for (rows, length), spent in seconds.items()))
    return min(seconds, key=seconds.__getitem__)


def compare(options: argparse.Namespace, folder: str, data: Any, shapes: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """Medians of alternating turns, in tokens a second."""
    peers = {
        f"trl {packing}": Peer(options, folder, packing, shape, data)
        for packing, shape in shapes.items()
        if packing != OURS
    }
    turns = {OURS: own_turn(options, *data, shapes[OURS][1]), **{name: peer.turn for name, peer in peers.items()}}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in turns}
    for number in range(options.turns + 1):  # the first turn warms up
        for name, turn in turns.items():
            result = turn()
            if number:
                found[name].append(result)
    tokens = sum(map(len, data[0]))
    speed = {name: [tokens / one["seconds"] for one in results] for name, results in found.items()}
    busy = {name: statistics.median(one["processor"] for one in results) for name, results in found.items()}
    medians = {name: statistics.median(values) for name, values in speed.items()}
    best = min(peers, key=busy.__getitem__)
    exact = min((name for name in peers if not peers[name].about["dialogues_see_each_other"]), key=busy.__getitem__)
    report = {
        "tokens_per_second": medians,
        "tokens_per_processor_second": {name: tokens / seconds for name, seconds in busy.items()},
        "ratios": {name: medians[OURS] / medians[name] for name in peers},
        "processor_ratios": {name: busy[name] / busy[OURS] for name in peers},
        "best_peer": best,
        "best_peer_whose_dialogues_do_not_see_each_other": exact,
        "our_pack": shapes[OURS][1],
        "turns": speed,
        "peers": {
            name: {"rows": peer.shape[0], "length": peer.shape[1], **peer.about, "steps": found[name][0]["steps"]}
            for name, peer in peers.items()
        },
    }
    for peer in peers.values():
        peer.close()
    return report


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="a Python that has trl 1.12.0")
    for name, value, text in (
        ("dialogues", 32, "dialogues an epoch"),
        ("batch-size", 16, "dialogues an optimizer step"),
        ("threads", 1, "threads of each side"),
        ("turns", 5, "turns that count"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=text)
    parser.add_argument("--shapes", type=Path, help="a file of the sweep's result: made if it is not there")
    parser.add_argument("--sweep", action="store_true", help="only make --shapes")
    parser.add_argument("--note", default="", help="what a reader must know of the measurement, such as a busy machine")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/packing.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as any session of zj on a CPU
    data = dialogues(options.dialogues)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1, timeout=timedelta(seconds=600)
        )
        if options.shapes and options.shapes.exists():
            shapes = {name: tuple(shape) for name, shape in json.loads(options.shapes.read_text()).items()}
        else:
            shapes = best_shapes(options, folder, data)
            if options.shapes:
                options.shapes.write_text(json.dumps(shapes))
        if options.sweep:
            return
        report = compare(options, folder, data, shapes)
        dist.destroy_process_group()
    lengths = [len(row) for row in data[0]]
    document = {
        "what": "fp32 SFT, real tokens a second; one turn is an epoch of the same dialogues",
        "shape": {**LLAMA, "dialogues": len(lengths), "tokens": sum(lengths), "longest": max(lengths)},
        "loss_tokens": sum(map(sum, data[1])),
        "settings": {key: value for key, value in vars(options).items() if isinstance(value, int)},
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {
            "megatron-zj": metadata.version("megatron-zj"),
            "torch": torch.__version__,
            "megatron-core": metadata.version("megatron-core"),
            "python": platform.python_version(),
        },
        "note": options.note,
        **report,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=2) + "\n")
    for name, ratio in report["ratios"].items():
        print(f"{name}: ours is {ratio:.3f} x (by processor time {report['processor_ratios'][name]:.3f} x)")
    apart = report["best_peer_whose_dialogues_do_not_see_each_other"]
    print(f"best: {report['best_peer']}; of those that keep dialogues apart: {apart}")


if __name__ == "__main__":
    sys.exit(main())
