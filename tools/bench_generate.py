"""Generation side by side with Hugging Face on the same weights: python tools/bench_generate.py [--turns 7]

Greedy, one process, the same prompts in the same batches; the tokens must be equal before anything is timed.

equal     every answer has the full length
ragged    answers end at stop tokens, after a third of the full length on average
refilled  ragged, and more prompts than rows at once: a row that ends makes room for the next prompt here, and waits
          for its batch there

Writes benchmarks/generate.json: tokens a second of both in every turn, and the median ratios by the clock and by
processor time (above 1: we are faster).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_zj.config.derived import ALL
from megatron_zj.config.model import ModelConfig
from megatron_zj.config.optim import EngineConfig
from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.config.sampling import SamplingConfig
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.engine.build import build_engine
from megatron_zj.engine.engine import Engine
from megatron_zj.models.canonical import read_stage
from megatron_zj.models.presets import preset
from megatron_zj.roles.placement import build_placements
from megatron_zj.rollout.generate import generate

ROWS, NEW_TOKENS = 32, 64
Answers = list[list[int]]


@dataclass(frozen=True)
class Case:
    """What is generated: prompts, ``ROWS`` at a time, until one of the stop tokens."""

    prompts: list[Tensor]
    stop_ids: frozenset[int]


def build() -> Engine:
    """The small preset with fresh weights, alone in its world."""
    groups = build_placements(ParallelConfig(), {}, {ALL}, 1, 60)[ALL].groups
    if groups is None:
        raise RuntimeError("no placement")
    return build_engine(preset("small"), "lm", groups, EngineConfig(), None, 1, torch.device("cpu"), 0)


def hugging_face(model: ModelConfig, weights: dict[str, Tensor]) -> LlamaForCausalLM:
    """The same weights in transformers."""
    config = LlamaConfig(
        vocab_size=model.padded_vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.norm_eps,
        rope_theta=model.rope_theta,
        tie_word_embeddings=model.tie_embeddings,
        attn_implementation="sdpa",
    )
    network = LlamaForCausalLM(config).eval()
    network.load_state_dict(weights)
    return network


def run_ours(engine: Engine, case: Case) -> Answers:
    """Greedy continuations."""
    batch = Batch(Rows.of(case.prompts, torch.int64), {}, {"sample_id": torch.arange(len(case.prompts))})
    sampling = SamplingConfig(max_new_tokens=NEW_TOKENS, temperature=0.0, max_batch_rows=ROWS)
    samples = generate(engine, batch, sampling, stop_ids=case.stop_ids, seed=0)
    return [row[len(prompt) :].tolist() for row, prompt in zip(samples.tokens.split(), case.prompts, strict=True)]


def run_theirs(network: LlamaForCausalLM, case: Case) -> Answers:
    """Greedy continuations, a batch of ``ROWS`` after the other, left-padded as Hugging Face wants it."""
    found: Answers = []
    for start in range(0, len(case.prompts), ROWS):
        found += _their_batch(network, case.prompts[start : start + ROWS], case.stop_ids)
    return found


@torch.no_grad()
def _their_batch(network: LlamaForCausalLM, prompts: list[Tensor], stop_ids: frozenset[int]) -> Answers:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros((len(prompts), longest), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
    found = network.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=sorted(stop_ids) or None,
    )
    return [until(row, stop_ids) for row in found[:, longest:].tolist()]


def until(tokens: list[int], stop_ids: frozenset[int]) -> list[int]:
    """The tokens up to the first stop token, it included."""
    return next((tokens[: at + 1] for at, token in enumerate(tokens) if token in stop_ids), tokens)


def stops_for(answers: Answers, mean: float) -> frozenset[int]:
    """Stop tokens that cut these full answers to about this mean length, the longest to none."""
    generator, seen = random.Random(0), sorted({token for answer in answers for token in answer})
    best, off = frozenset[int](), float("inf")
    for _ in range(4000):
        tried = frozenset(generator.sample(seen, generator.randint(1, len(seen) // 4)))
        lengths = [len(until(answer, tried)) for answer in answers]
        distance = abs(statistics.mean(lengths) - mean)
        if distance < off and max(lengths) == NEW_TOKENS and tried:
            best, off = tried, distance
    return best


def cases(engine: Engine, names: list[str]) -> dict[str, Case]:
    """The cases by name."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int, shortest: int) -> list[Tensor]:
        lengths = torch.randint(shortest, 33, (count,), generator=generator).tolist()
        return [torch.randint(4, engine.model.vocab_size, (length,), generator=generator) for length in lengths]

    equal, ragged = Case(draw(ROWS, 32), frozenset()), draw(2 * ROWS, 8)
    stop_ids = stops_for(run_ours(engine, Case(ragged, frozenset())), NEW_TOKENS / 3)
    found = {"equal": equal, "ragged": Case(ragged[:ROWS], stop_ids), "refilled": Case(ragged, stop_ids)}
    return {name: found[name] for name in names}


def measure(sides: dict[str, Callable[[], Answers]], turns: int) -> dict[str, Any]:
    """Both sides in turn; the first turn warms up and compares."""
    first = {name: side() for name, side in sides.items()}
    if first["ours"] != first["hugging_face"]:
        raise SystemExit("the tokens differ, so the speeds mean nothing")
    lengths = [len(answer) for answer in first["ours"]]
    clock: dict[str, list[float]] = {name: [] for name in sides}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(turns):
        for name, side in sides.items():
            begin, busy = time.perf_counter(), time.process_time()
            side()
            clock[name].append(time.perf_counter() - begin)
            processor[name].append(time.process_time() - busy)
    ratios = [theirs / ours for ours, theirs in zip(clock["ours"], clock["hugging_face"], strict=True)]
    medians = [{name: statistics.median(found) for name, found in kind.items()} for kind in (clock, processor)]
    ratio, processor_ratio = (found["hugging_face"] / found["ours"] for found in medians)
    return {
        "answers": {"rows": len(lengths), "mean_length": statistics.mean(lengths), "longest": max(lengths)},
        "ratio": round(ratio, 3),
        "processor_ratio": round(processor_ratio, 3),
        "ratio_of_turns": [round(ratio, 3) for ratio in ratios],
        "tokens_per_second": {name: [round(sum(lengths) / one, 1) for one in found] for name, found in clock.items()},
    }


def main() -> None:
    """Check, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", nargs="+", default=["equal", "ragged", "refilled"])
    parser.add_argument("--note", default="", help="what a reader must know of the measurement, such as a busy machine")
    parser.add_argument("--to", type=Path, default=Path("benchmarks/generate.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=600))
        engine = build()
        network = hugging_face(engine.model, read_stage(engine.chunks, engine.groups))
        result: dict[str, Any] = {
            "what": f"greedy, small preset, fp32, {ROWS} rows at once, up to {NEW_TOKENS} new tokens",
            "threads": arguments.threads,
            "note": arguments.note,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        }
        for name, case in cases(engine, arguments.cases).items():
            result[name] = measure(
                {
                    "ours": lambda case=case: run_ours(engine, case),  # type: ignore[misc]
                    "hugging_face": lambda case=case: run_theirs(network, case),  # type: ignore[misc]
                },
                arguments.turns,
            )
            print(name, json.dumps({key: result[name][key] for key in ("answers", "ratio", "processor_ratio")}))
        arguments.to.parent.mkdir(parents=True, exist_ok=True)
        arguments.to.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
