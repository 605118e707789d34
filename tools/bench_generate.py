"""Generation side by side with Hugging Face on the same weights: python tools/bench_generate.py [--rounds 5]

Greedy, one process, the same prompts in the same batch; the tokens must be equal before anything is timed.  Writes
benchmarks/generate.json: tokens a second of both in every round, and the median ratio.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_zj.config.algorithm import SamplingConfig
from megatron_zj.config.model import ModelConfig
from megatron_zj.config.optim import EngineConfig
from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.engine.build import build_engine
from megatron_zj.engine.engine import Engine
from megatron_zj.models.canonical import read_stage
from megatron_zj.models.presets import preset
from megatron_zj.roles.placement import ALL, build_placements
from megatron_zj.rollout.generate import generate

ROWS, NEW_TOKENS, SHORTEST, LONGEST = 16, 64, 8, 32


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


def run_ours(engine: Engine, prompts: list[Tensor]) -> list[list[int]]:
    """Greedy continuations."""
    batch = Batch(Rows.of(prompts, torch.int64), {}, {"sample_id": torch.arange(len(prompts))})
    sampling = SamplingConfig(max_new_tokens=NEW_TOKENS, temperature=0.0, max_batch_rows=ROWS)
    samples = generate(engine, batch, sampling, stop_ids=frozenset(), seed=0)
    return [row[len(prompt) :].tolist() for row, prompt in zip(samples.tokens.split(), prompts, strict=True)]


@torch.no_grad()
def run_theirs(network: LlamaForCausalLM, prompts: list[Tensor]) -> list[list[int]]:
    """Greedy continuations, left-padded as Hugging Face wants it."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros((len(prompts), longest), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
    found = network.generate(
        ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    return found[:, longest:].tolist()


def main() -> None:
    """Check, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--to", type=Path, default=Path("benchmarks/generate.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=600))
        engine = build()
        network = hugging_face(engine.model, read_stage(engine.chunks, engine.groups))
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(SHORTEST, LONGEST + 1, (ROWS,), generator=generator).tolist()
        prompts = [torch.randint(4, engine.model.vocab_size, (length,), generator=generator) for length in lengths]
        sides = {"ours": lambda: run_ours(engine, prompts), "hugging_face": lambda: run_theirs(network, prompts)}
        first = {name: side() for name, side in sides.items()}
        if first["ours"] != first["hugging_face"]:
            raise SystemExit("the tokens differ, so the speeds mean nothing")
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(arguments.rounds):
            for name, side in sides.items():
                start = time.perf_counter()
                side()
                rates[name].append(ROWS * NEW_TOKENS / (time.perf_counter() - start))
        ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates["hugging_face"], strict=True)]
        result = {
            "what": f"greedy, {ROWS} prompts of {SHORTEST}-{LONGEST} tokens, {NEW_TOKENS} new, small preset, fp32",
            "tokens_per_second": {name: [round(rate, 1) for rate in found] for name, found in rates.items()},
            "ratio": {"median": round(statistics.median(ratios), 3), "all": [round(ratio, 3) for ratio in ratios]},
            "threads": arguments.threads,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "machine": f"{platform.machine()}, {platform.python_implementation()} {platform.python_version()}",
        }
        arguments.to.parent.mkdir(parents=True, exist_ok=True)
        arguments.to.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(result["ratio"]), arguments.to)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
