"""The demo's stages in miniature: real files, real configurations, one step takes milliseconds."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_zj.checkpoint.manifest import read_manifest
from megatron_zj.cli.compose import compose_run
from megatron_zj.cli.train import train
from megatron_zj.config.data import TokenizerConfig
from megatron_zj.config.derived import optimizer_steps
from megatron_zj.data.prepare import PrepareConfig, TextConfig, prepare
from megatron_zj.data.vocabulary import train_sentencepiece
from megatron_zj.evaluation.clinic.files import DemoSizes, write_demo
from megatron_zj.runtime.activity import Activity
from megatron_zj.runtime.distributed import Process

SIZES = DemoSizes(
    documents_per_condition=1, sft=40, sft_validation=4, preference=24, preference_validation=4, prompts=40, cases=4
)
STEPS = 4
MODEL = {
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "max_position_embeddings": 512,
    "init_std": 0.05,
}
STAGES: dict[str, dict[str, Any]] = {
    "pretrain": {"data.sequence_length": 64, "algorithm.global_batch_size": 4},
    "sft": {"algorithm.global_batch_size": 4},
    "reward": {"algorithm.global_batch_size": 3},
    "ppo": {
        "algorithm.prompts_per_step": 4,
        "algorithm.minibatch_size": 2,
        "algorithm.sampling.max_new_tokens": 6,
        "algorithm.epochs": 2,
        "algorithm.running_scores": True,
        "algorithm.kl_controller": "adaptive",
    },
    "grpo": {
        "algorithm.prompts_per_step": 2,
        "algorithm.samples_per_prompt": 2,
        "algorithm.minibatch_size": 2,
        "algorithm.sampling.max_new_tokens": 6,
    },
    "rejection": {
        "algorithm.prompts_per_step": 2,
        "algorithm.samples_per_prompt": 2,
        "algorithm.minibatch_size": 2,
        "algorithm.running_scores": True,
        "algorithm.sampling.max_new_tokens": 6,
    },
    "rejection_filter": {"algorithm.keep": 6, "algorithm.minibatch_size": 4},
    "dpo": {"algorithm.global_batch_size": 3},
}
JUDGED = ("ppo", "grpo", "rejection", "rejection_filter")  # they need the reward model


def make_data(folder: Path) -> None:
    """Files of the demo, a tokenizer, and the prepared corpus."""
    write_demo(folder / "data", 0, SIZES)
    lines = (folder / "data/tokenizer.txt").read_text(encoding="utf-8").splitlines()
    tokenizer = train_sentencepiece(lines, vocab_size=1300, special_tokens=("<human>", "<bot>"))
    tokenizer.save(folder / "tokenizer")
    prepare(
        PrepareConfig(
            tokenizer=TokenizerConfig(path=folder / "tokenizer"),
            data=TextConfig(files=(str(folder / "data/encyclopaedia.jsonl"),)),
            out=folder / "data/encyclopaedia",
        )
    )


def overrides_of(stage: str, folder: Path, run: str, **changes: Any) -> list[str]:
    """Of the stage's demo experiment; ``changes`` use double underscores for dots."""
    values: dict[str, Any] = {
        "experiment": f"demo/{stage}",
        "world_size": "null",
        "run.dir": folder / run,
        "run.num_steps": STEPS,
        "run.eval_every": 1,
        "run.timeout_seconds": 60,
        "tokenizer.path": folder / "tokenizer",
        "model.vocab_size": 1300,
        "optim.warmup_steps": 1,
        "checkpoint.every": 1,
        "checkpoint.keep_last": 0,
        **{f"model.{name}": value for name, value in MODEL.items()},
        **STAGES[stage],
    }
    files = {
        "pretrain": "encyclopaedia",
        "sft": "sft.jsonl",
        "reward": "preference.jsonl",
        "ppo": "prompts.jsonl",
        "grpo": "prompts.jsonl",
        "rejection": "prompts.jsonl",
        "rejection_filter": "sft.jsonl",
        "dpo": "preference.jsonl",
    }
    values["data.files"] = f"[{folder / 'data' / files[stage]}]"
    if stage in ("sft", "reward", "dpo"):
        values["data.validation_files"] = f"[{folder / 'data' / files[stage].replace('.', '_validation.')}]"
    if stage != "pretrain":
        values["checkpoint.load"] = folder / ("pretrain" if stage == "sft" else "sft")
    if stage in JUDGED:
        values["algorithm.reward.load"] = folder / "reward"
    values.update({name.replace("__", "."): value for name, value in changes.items()})
    return [f"{name}={value}" for name, value in values.items()]


def schedule_of(stage: str, folder: Path) -> dict[str, int]:
    """For a run that is stopped: the schedule ends where the whole run's does, so only the number of steps differs."""
    return {"optim__decay_steps": optimizer_steps(compose_run(overrides_of(stage, folder, stage)))}


@dataclass(frozen=True)
class Kill:
    """SIGKILL for one rank: ``seconds`` after it has entered ``phase`` for the ``time``-th time (no phase: at once).

    ``note``: a file that is told the phases in which it died.
    """

    rank: int
    seconds: float
    note: Path
    phase: str = ""
    time: int = 1

    def arm(self, activity: Activity) -> None:
        """To be called on every rank."""
        if dist.get_rank() != self.rank:
            return
        entered = itertools.count(1)

        def watch() -> None:
            if activity.phases and activity.phases[-1] == self.phase and next(entered) == self.time:
                self._start(activity)

        if self.phase:
            activity.on_change = watch
        else:
            self._start(activity)

    def _start(self, activity: Activity) -> None:
        def die() -> None:
            self.note.write_text(str(activity))
            os.kill(os.getpid(), signal.SIGKILL)

        timer = threading.Timer(self.seconds, die)
        timer.daemon = True
        timer.start()


def run_stage(overrides: list[str], kill: Kill | None = None) -> None:
    """Train on the ranks of this world."""
    rank, size = dist.get_rank(), dist.get_world_size()
    process = Process(rank, rank, size, torch.device("cpu"))
    if kill is not None:
        kill.arm(process.activity)
    train(compose_run(overrides), process)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The run's metrics without what depends on the clock or the machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    volatile = ("time", "memory/", "tokens_per_second")
    return [{name: value for name, value in line.items() if not name.startswith(volatile)} for line in lines]


def content(folder: Path, step: int) -> dict[str, Any]:
    """Checksums of everything in one checkpoint but its manifest (which holds dates and paths)."""
    manifest = read_manifest(folder / "checkpoints" / f"step_{step:08d}")
    return {name: record.sha256 for name, record in manifest.files.items()}
