"""Training speed side by side: an engine's update and a plain-torch loop, on the same shapes in the same process.

    python tools/bench_step.py [--hidden 256 --layers 6 --sequence 256 --rows 8] [--ranks 1 2] [--out FILE]

The plain loop is a LLaMA of torch operators (scaled_dot_product_attention, rms_norm, cross_entropy) with fused AdamW
and clip_grad_norm_; with two ranks, under torch's DistributedDataParallel.  Both run the same micro-batches.  The two
take turns, and what is reported is the median of the turns and the ratio of the medians (above 1: the engine is
faster), by the clock and by processor time, which other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from megatron_zj.algorithms.pretrain import NextToken
from megatron_zj.config.model import ModelConfig
from megatron_zj.config.optim import EngineConfig, OptimConfig
from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.engine.build import build_engine
from megatron_zj.parallel.grid import RankGrid
from megatron_zj.parallel.groups import create_groups

VOCABULARY = 4096


class PlainLayer(nn.Module):
    """Pre-norm attention and SwiGLU on [B, S, D]."""

    def __init__(self, size: int, ffn: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ParameterList(nn.Parameter(torch.ones(size)) for _ in range(2))
        self.qkv, self.out = nn.Linear(size, 3 * size, bias=False), nn.Linear(size, size, bias=False)
        self.gate_up, self.down = nn.Linear(size, 2 * ffn, bias=False), nn.Linear(ffn, size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, size = x.shape
        qkv = self.qkv(F.rms_norm(x, (size,), self.norms[0], 1e-6)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, size))
        gate, up = self.gate_up(F.rms_norm(x, (size,), self.norms[1], 1e-6)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class PlainLlama(nn.Module):
    """Mean cross-entropy of the next token over [B, S] tokens."""

    def __init__(self, size: int, ffn: int, heads: int, layers: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, size)
        self.layers = nn.ModuleList(PlainLayer(size, ffn, heads) for _ in range(layers))
        self.norm = nn.Parameter(torch.ones(size))
        self.head = nn.Linear(size, VOCABULARY, bias=False)
        head_size = size // heads
        angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, head_size, 2) / head_size)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        x = F.rms_norm(x, (x.shape[-1],), self.norm, 1e-6)
        return F.cross_entropy(self.head(x[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def plain_step(options: argparse.Namespace, tokens: Tensor, device: torch.device) -> Callable[[], None]:
    """One optimizer step of the plain loop."""
    model: Any = PlainLlama(options.hidden, options.ffn, options.heads, options.layers, options.sequence).to(device)
    if dist.get_world_size() > 1:
        model = DistributedDataParallel(model)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    parts = tokens.split(options.micro_rows)

    def step() -> None:
        adam.zero_grad(set_to_none=True)
        for index, part in enumerate(parts):
            if isinstance(model, DistributedDataParallel):
                model.require_backward_grad_sync = index == len(parts) - 1
            (model(part) / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()

    return step


def engine_step(options: argparse.Namespace, tokens: Tensor, device: torch.device) -> Callable[[], None]:
    """One update of an engine on the same rows."""
    parallel = ParallelConfig()
    grid = RankGrid.from_config(parallel, 0, dist.get_world_size())
    groups = create_groups({"all": grid}, {"all": parallel}, 600)["all"]
    assert groups is not None
    model = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        ffn_hidden_size=options.ffn,
        num_layers=options.layers,
        num_attention_heads=options.heads,
        max_position_embeddings=options.sequence,
    )
    config = EngineConfig(micro_batch_tokens=options.micro_rows * options.sequence)
    optim = OptimConfig(lr=1e-3, weight_decay=0.1, schedule="constant")
    engine = build_engine(model, "lm", groups, config, optim, 1000, device, 0)
    rows = Rows.of(list(tokens.cpu()))
    batch = Batch(rows, {"loss_mask": rows.replace(torch.ones_like(rows.values))})
    objective = NextToken()
    return lambda: (engine.update(objective, batch), None)[1]


def measure(steps: dict[str, Callable[[], None]], options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Tokens a second of each, taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    processor: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(options.turns + 1):  # the first turn warms up
        for name, step in steps.items():
            dist.barrier()
            start, busy = time.perf_counter(), time.process_time()
            for _ in range(options.steps):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append((time.perf_counter() - start) / options.steps)
                processor[name].append((time.process_time() - busy) / options.steps)
    tokens = options.rows * options.sequence * dist.get_world_size()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "tokens_per_second": {name: tokens / median for name, median in medians.items()},
        "ratio": medians["plain"] / medians["engine"],
        "processor_ratio": statistics.median(processor["plain"]) / statistics.median(processor["engine"]),
        "turns": {name: [tokens / value for value in values] for name, values in seconds.items()},
    }


def run_rank(rank: int, ranks: int, folder: str, options: argparse.Namespace) -> None:
    """One process of a measurement; rank 0 leaves the result in ``folder``."""
    torch.set_num_threads(options.threads)
    device = torch.device(f"cuda:{rank}" if options.device == "cuda" else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = dist.FileStore(f"{folder}/store", ranks)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=600))
    torch.manual_seed(rank)
    tokens = torch.randint(0, VOCABULARY, (options.rows, options.sequence)).to(device)
    steps = {"plain": plain_step(options, tokens, device), "engine": engine_step(options, tokens, device)}
    result = measure(steps, options, device)
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("hidden", 256), ("layers", 6), ("heads", 4), ("ffn", 704), ("sequence", 256), ("rows", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--micro-rows", type=int, default=2, help="rows a micro-batch")
    parser.add_argument("--threads", type=int, default=1, help="threads a process")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps a turn")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="data-parallel ranks")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--note", default="", help="what a reader must know of the measurement, such as a busy machine")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/step.json"))
    options = parser.parse_args()
    report: dict[str, Any] = {
        "shape": {key: value for key, value in vars(options).items() if isinstance(value, int)},
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {
            "torch": torch.__version__,
            "megatron-core": metadata.version("megatron-core"),
            "python": platform.python_version(),
        },
        "note": options.note,
    }
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(run_rank, (ranks, folder, options), nprocs=ranks)
            result = json.loads(Path(folder, "result.json").read_text())
        report[f"dp{ranks}"] = result
        speed = result["tokens_per_second"]
        print(
            f"dp{ranks}: engine {speed['engine']:.0f} tok/s, plain {speed['plain']:.0f}, ratio {result['ratio']:.3f}"
            f" (by processor time {result['processor_ratio']:.3f})"
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
