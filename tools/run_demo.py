"""The whole chain on the demo's clinic: python tools/run_demo.py [--device cuda] [--seed 1] [--miniature]

prepare -> pre-train (DP2, distributed optimizer) -> SFT (TP2), and SFT from scratch -> reward model (PP2) ->
PPO (DP2) -> evaluate -> runs/demo/report.html and runs/demo/summary.json.  Each stage loads the one before it under
another layout.  A stage that is done is not done again; remove the folder to start over.

The clinic is written for testing software and is no medical advice.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_zj.cli.compose import compose_run
from megatron_zj.evaluation.clinic.files import DemoSizes, write_demo
from megatron_zj.evaluation.report import write_report

RANKS = 2
ROOT = Path(__file__).resolve().parents[1]
SIZES = DemoSizes()
VOCAB_SIZE = 2048
MINI_SIZES = DemoSizes(
    documents_per_condition=2, sft=80, sft_validation=6, preference=40, preference_validation=8, prompts=40, cases=8
)
# The miniature proves that the chain holds together, not that anything is learned.
MINI_MODEL = ["model.hidden_size=32", "model.ffn_hidden_size=64", "model.num_layers=2", "model.num_attention_heads=4"]
MINI_STAGES = {
    "pretrain": ["run.num_steps=4", "optim.warmup_steps=1"],
    "sft_scratch": ["run.num_steps=3", "optim.warmup_steps=1"],
    "sft": ["run.num_steps=3", "optim.warmup_steps=1"],
    "reward": ["run.num_steps=3", "optim.warmup_steps=1"],
    "ppo": [
        "run.num_steps=2",
        "algorithm.prompts_per_step=8",
        "algorithm.minibatch_size=4",
        "algorithm.sampling.max_new_tokens=8",
    ],
}


@dataclass(frozen=True)
class Stage:
    """One training run, and what is measured on it."""

    name: str
    after: str | None  # the stage whose weights it starts from
    suites: dict[str, str] = field(default_factory=dict)  # suite -> file of the demo's data


JUDGED = {"exam": "exam.csv", "clinic": "cases.jsonl", "safety": "safety.jsonl"}
STAGES = (
    Stage("pretrain", None),
    Stage("sft_scratch", None, {"exam": "exam.csv"}),
    Stage("sft", "pretrain", JUDGED),
    Stage("reward", "sft", {"preference": "preference_validation.jsonl"}),
    Stage("ppo", "sft", JUDGED),
)


class Demo:
    """Runs stages in a folder."""

    def __init__(self, folder: Path, device: str, seed: int, miniature: bool) -> None:
        self.folder, self.device, self.seed, self.miniature = folder, device, seed, miniature
        self.ranks = 1 if device == "cuda" and torch.cuda.device_count() == 1 else RANKS

    def run(self) -> None:
        """Everything, in order."""
        self._once("prepare", self.prepare)
        for stage in STAGES:
            self._once(stage.name, lambda stage=stage: self.train(stage))
            if stage.name == "pretrain":
                self._once("untrained", lambda: self.evaluate("untrained", "pretrain", {"exam": "exam.csv"}))
            if stage.suites:
                self._once(
                    f"{stage.name}-evaluation", lambda stage=stage: self.evaluate(stage.name, stage.name, stage.suites)
                )
        summary = write_report(self.folder)
        say(
            json.dumps(
                {name: value for name, value in summary.items() if name != "notice"}, ensure_ascii=False, indent=1
            )
        )
        say(f"report: {self.folder / 'report.html'}")

    def prepare(self) -> None:
        """Write the clinic's files, train a tokenizer on them, tokenize the encyclopaedia."""
        data = self.folder / "data"
        write_demo(data, self.seed, MINI_SIZES if self.miniature else SIZES)
        self._python(
            "megatron_zj.cli.tokenizer",
            "train",
            f"data.files=[{data / 'tokenizer.txt'}]",
            f"vocab_size={VOCAB_SIZE}",
            f"model_type={'bpe' if self.miniature else 'unigram'}",  # the miniature's texts hold too few pieces
            "character_coverage=1.0",
            "special_tokens=['<human>','<bot>']",
            f"out={self.folder / 'tokenizer'}",
        )
        self._python(
            "megatron_zj.cli.prepare",
            f"tokenizer.path={self.folder / 'tokenizer'}",
            f"data.files=[{data / 'encyclopaedia.jsonl'}]",
            f"out={data / 'encyclopaedia'}",
        )

    def train(self, stage: Stage) -> None:
        """One stage on two ranks; leaves stage.json with its seconds and layout."""
        overrides = self._overrides(stage)
        start = time.monotonic()
        self._ranks("megatron_zj.cli.train", *overrides)
        facts = {"seconds": round(time.monotonic() - start, 1), "layout": layout(overrides, self.ranks)}
        (self.folder / stage.name / "stage.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")

    def evaluate(self, name: str, source: str, suites: dict[str, str]) -> None:
        """Score a stage's checkpoint; ``untrained`` is a fresh model of the same shape."""
        files = ",".join(str(self.folder / "data" / file) for file in suites.values())
        self._ranks(
            "megatron_zj.cli.evaluate",
            f"checkpoint.load={self.folder / source}",
            f"suites=[{','.join(suites)}]",
            f"data.files=[{files}]",
            f"run.dir={self.folder / name}",
            f"run.seed={self.seed}",
            f"run.device={self.device}",
            f"untrained={str(name == 'untrained').lower()}",
            f"sampling.max_new_tokens={8 if self.miniature else 64}",
            "data.template=ziya",
        )

    def _overrides(self, stage: Stage) -> list[str]:
        run = self.folder
        data = {
            "pretrain": "encyclopaedia",
            "sft": "sft.jsonl",
            "sft_scratch": "sft.jsonl",
            "reward": "preference.jsonl",
            "ppo": "prompts.jsonl",
        }
        overrides = [
            f"experiment=demo/{stage.name}",
            f"run.dir={run / stage.name}",
            f"run.seed={self.seed}",
            f"run.device={self.device}",
            f"tokenizer.path={run / 'tokenizer'}",
            f"model.vocab_size={VOCAB_SIZE}",
            f"data.files=[{run / 'data' / data[stage.name]}]",
        ]
        if stage.name in ("sft", "sft_scratch", "reward"):
            held_out = data[stage.name].replace(".", "_validation.")
            overrides.append(f"data.validation_files=[{run / 'data' / held_out}]")
        if stage.after is not None:
            overrides.append(f"checkpoint.load={run / stage.after}")
        if stage.name == "ppo":
            overrides.append(f"algorithm.reward.load={run / 'reward'}")
        if self.ranks == 1:  # a single GPU: every stage on one rank
            overrides += ["world_size=1", "parallel=single", "engine.distributed_optimizer=false"]
        return [*overrides, *(MINI_MODEL + MINI_STAGES[stage.name] if self.miniature else [])]

    def _once(self, name: str, work: object) -> None:
        """Do a stage unless its mark says that it was done with the same seed, size and device."""
        mark = self.folder / "done" / name
        setting = json.dumps({"seed": self.seed, "miniature": self.miniature, "device": self.device})
        if mark.is_file() and mark.read_text(encoding="utf-8") == setting:
            say(f"== {name}: done before")
            return
        say(f"== {name}")
        start = time.monotonic()
        work()  # type: ignore[operator]
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(setting, encoding="utf-8")
        say(f"== {name}: {time.monotonic() - start:.0f} s")

    def _python(self, module: str, *arguments: str) -> None:
        self._call([sys.executable, "-m", module, *arguments])

    def _ranks(self, module: str, *arguments: str) -> None:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}"]
        self._call([*launcher, "-m", module, *arguments])

    def _call(self, command: list[str]) -> None:
        environment = {**os.environ, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
        if self.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        code = subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, check=False).returncode
        if code:
            raise SystemExit(f"stage failed with exit code {code}: {' '.join(command)}")


def layout(overrides: list[str], ranks: int) -> str:
    """The stage's parallel axes in words."""
    config = compose_run(overrides)
    sizes = {"tp": config.parallel.tp, "pp": config.parallel.pp, "cp": config.parallel.cp}
    dp = ranks // config.parallel.model_size
    words = [f"{axis}{size}" for axis, size in {"dp": dp, **sizes}.items() if size > 1] or ["one rank"]
    return ", ".join([*words, *(["distributed optimizer"] if config.engine.distributed_optimizer else [])])


def say(text: str) -> None:
    """To the screen, at once."""
    print(text, flush=True)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="default runs/demo, or runs/demo-miniature")
    parser.add_argument("--miniature", action="store_true", help="seconds instead of minutes; learns nothing")
    parser.add_argument("--fresh", action="store_true", help="remove the folder first")
    arguments = parser.parse_args()
    folder = arguments.folder or Path("runs/demo-miniature" if arguments.miniature else "runs/demo")
    if arguments.fresh or arguments.miniature:
        shutil.rmtree(folder, ignore_errors=True)
    Demo(folder.resolve(), arguments.device, arguments.seed, arguments.miniature).run()


if __name__ == "__main__":
    main()
