"""The whole chain on the demo's clinic: python tools/run_demo.py [--device cuda] [--seed 1] [--algorithms all]

prepare -> pre-train (DP2, distributed optimizer) -> SFT (TP2), and SFT from scratch -> reward model (PP2) ->
PPO (DP2) -> evaluate -> runs/demo/report.html and runs/demo/summary.json.  Each stage loads the one before it under
another layout.  A stage that is done is not done again; --fresh starts over.  A folder belongs to one seed and size;
one that holds something else than a demo is refused.  The last lines say which targets were met and missed.

--algorithms all: from the same SFT model also GRPO, rejection sampling, DPO, and PPO with the reward's sign flipped,
each judged along the way.

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
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from megatron_zj.cli.compose import compose_run
from megatron_zj.config.run import RunConfig
from megatron_zj.evaluation.clinic.files import DemoSizes, write_demo
from megatron_zj.evaluation.report import targets, write_report
from megatron_zj.runtime.files import write_json

RANKS = 2
ROOT = Path(__file__).resolve().parents[1]
SIZES = DemoSizes()
VOCAB_SIZE = 2048
MINI_SIZES = DemoSizes(
    documents_per_condition=2, sft=80, sft_validation=6, preference=40, preference_validation=8, prompts=40, cases=8
)
# The miniature proves that the chain holds together, not that anything is learned.
MINI_MODEL = ["model.hidden_size=32", "model.ffn_hidden_size=64", "model.num_layers=2", "model.num_attention_heads=4"]
MINI_POLICY = [
    *("run.num_steps=2", "checkpoint.every=1", "algorithm.minibatch_size=4", "algorithm.sampling.max_new_tokens=8"),
]
MINI_STAGES = {
    "pretrain": ["run.num_steps=4", "optim.warmup_steps=1"],
    "sft_scratch": ["run.num_steps=3", "optim.warmup_steps=1"],
    "sft": ["run.num_steps=3", "optim.warmup_steps=1"],
    "reward": ["run.num_steps=3", "optim.warmup_steps=1"],
    "ppo": [*MINI_POLICY, "algorithm.prompts_per_step=8"],
    "ppo_flipped": [*MINI_POLICY, "algorithm.prompts_per_step=8"],
    "grpo": [*MINI_POLICY, "algorithm.prompts_per_step=4"],
    "rejection": [*MINI_POLICY, "algorithm.prompts_per_step=8"],
    "dpo": ["run.num_steps=2", "checkpoint.every=1"],
}


@dataclass(frozen=True)
class Stage:
    """One training run, and what is measured on it."""

    name: str
    data: str  # what it learns from, in the demo's data
    after: str | None  # the stage whose weights it starts from
    suites: dict[str, str] = field(default_factory=dict)  # suite -> file of the demo's data
    scored: bool = False  # whether it learns from the reward model


JUDGED = {"exam": "exam.csv", "clinic": "cases.jsonl", "safety": "safety.jsonl"}
PPO = Stage("ppo", "prompts.jsonl", "sft", JUDGED, scored=True)
STAGES = (
    Stage("pretrain", "encyclopaedia", None),
    Stage("sft_scratch", "sft.jsonl", None, {"exam": "exam.csv"}),
    Stage("sft", "sft.jsonl", "pretrain", JUDGED),
    Stage("reward", "preference.jsonl", "sft", {"preference": "preference_validation.jsonl"}),
    PPO,
)
OTHERS = (
    Stage("grpo", "prompts.jsonl", "sft", JUDGED, scored=True),
    Stage("rejection", "prompts.jsonl", "sft", JUDGED, scored=True),
    Stage("dpo", "preference.jsonl", "sft", JUDGED),
    Stage("ppo_flipped", "prompts.jsonl", "sft", JUDGED, scored=True),
)
VALIDATED = ("sft.jsonl", "preference.jsonl")  # each with a held-out file beside it
SETTINGS = "demo.json"  # what the folder's data was made with
STAGE_FOLDERS = ("untrained", *(stage.name for stage in (*STAGES, *OTHERS)))
WRITTEN = ("done", "data", "tokenizer", *STAGE_FOLDERS, "report.html", "summary.json")  # all that a demo writes beside


class Demo:
    """Runs stages in a folder."""

    def __init__(self, folder: Path, device: str, seed: int, miniature: bool) -> None:
        self.folder, self.device, self.seed, self.miniature = folder, device, seed, miniature
        self.ranks = 1 if device == "cuda" and torch.cuda.device_count() == 1 else RANKS

    def run(self, others: bool) -> bool:
        """Everything, in order; ``others``: with the other algorithms.  Returns whether every target was met."""
        self._once("prepare", self.prepare)
        for stage in (*STAGES, *(OTHERS if others else ())):
            self._once(stage.name, partial(self.train, stage))
            if stage.name == "pretrain":
                self._once("untrained", partial(self.evaluate, "untrained", "pretrain", {"exam": "exam.csv"}))
            if stage.suites:
                reference = stage.after if stage in (PPO, *OTHERS) else None
                work = partial(self.evaluate, stage.name, stage.name, stage.suites, reference)
                self._once(f"{stage.name}-evaluation", work)
            if others and stage in (PPO, *OTHERS):
                self._once(f"{stage.name}-along", partial(self.evaluate_along, stage))
        summary = write_report(self.folder)
        shown = {name: value for name, value in summary.items() if name != "notice"}
        say(json.dumps(shown, ensure_ascii=False, indent=1))
        found = [] if self.miniature else targets(summary)  # the miniature is not meant to learn anything
        for target in found:
            say(str(target))
        say(f"report: {self.folder / 'report.html'}")
        return all(target.met for target in found)

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
        config = compose_run(overrides)
        facts = {
            "seconds": round(time.monotonic() - start, 1),
            "layout": layout(config, self.ranks),
            "kl_target": getattr(config.algorithm, "kl_target", None),
        }
        (self.folder / stage.name / "stage.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")

    def evaluate(self, name: str, source: str, suites: dict[str, str], reference: str | None = None) -> None:
        """Score a stage's checkpoint; ``untrained`` is a fresh model of the same shape.

        ``reference``: the stage that the KL of its answers is measured to.
        """
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
            *([f"reference.load={self.folder / reference}"] if reference is not None else []),
        )

    def evaluate_along(self, stage: Stage) -> None:
        """Judge the checkpoints that the stage left on its way; the last one is judged as the stage's own."""
        for checkpoint in sorted((self.folder / stage.name / "checkpoints").glob("step_*"))[:-1]:
            steps = checkpoint.relative_to(self.folder)
            name = f"{stage.name}/along/{checkpoint.name}"
            self.evaluate(name, str(steps), {"clinic": JUDGED["clinic"]}, stage.after)

    def _overrides(self, stage: Stage) -> list[str]:
        run = self.folder
        overrides = [
            f"experiment=demo/{stage.name}",
            f"run.dir={run / stage.name}",
            f"run.seed={self.seed}",
            f"run.device={self.device}",
            f"tokenizer.path={run / 'tokenizer'}",
            f"model.vocab_size={VOCAB_SIZE}",
            f"data.files=[{run / 'data' / stage.data}]",
        ]
        if stage.data in VALIDATED:
            held_out = stage.data.replace(".", "_validation.")
            overrides.append(f"data.validation_files=[{run / 'data' / held_out}]")
        if stage.after is not None:
            overrides.append(f"checkpoint.load={run / stage.after}")
        if stage.scored:
            overrides.append(f"algorithm.reward.load={run / 'reward'}")
        if self.ranks == 1:  # a single GPU: every stage on one rank
            overrides += ["world_size=1", "parallel=single", "engine.distributed_optimizer=false"]
        return [*overrides, *(MINI_MODEL + MINI_STAGES[stage.name] if self.miniature else [])]

    def _once(self, name: str, work: Callable[[], None]) -> None:
        """Do a stage unless its mark says that it was done with the same seed, size and device."""
        mark = self.folder / "done" / name
        setting = json.dumps({"seed": self.seed, "miniature": self.miniature, "device": self.device})
        if mark.is_file() and mark.read_text(encoding="utf-8") == setting:
            say(f"== {name}: done before")
            return
        say(f"== {name}")
        start = time.monotonic()
        work()
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


def made_with(folder: Path) -> dict[str, object] | None:
    """The seed and size of the demo in ``folder``; None where nothing is there.

    Raises ValueError where something else is: it would be overwritten, or removed.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    for mark in (folder / SETTINGS, folder / "done" / "prepare"):  # the latter is all that older demos left
        try:
            found = json.loads(mark.read_text(encoding="utf-8"))
            return {name: found[name] for name in ("seed", "miniature")}
        except (OSError, ValueError, TypeError, KeyError):
            continue
    raise ValueError(
        f"{folder} is not a demo's folder (it has no {SETTINGS}) and stays as it is; give another --folder"
    )


def claim(folder: Path, settings: dict[str, object], fresh: bool) -> None:
    """Make ``folder`` the place of a demo with these settings.

    ``fresh``: what an earlier one wrote goes first, as that of a miniature always does for the next miniature.
    Raises ValueError, before anything is written, where another demo or something else is there.
    """
    found = made_with(folder)
    fresh = fresh or bool(found and found["miniature"] and settings["miniature"])
    if found and found != settings and not fresh:
        was, now = (", ".join(f"{key} {value}" for key, value in each.items()) for each in (found, settings))
        raise ValueError(f"{folder} is a demo with {was}, not {now}; give another --folder, or --fresh to start over")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SETTINGS, found or settings)  # until all is removed, so that a stop midway leaves no mix
    for path in (folder / name for name in WRITTEN if fresh):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    write_json(folder / SETTINGS, settings)


def layout(config: RunConfig, ranks: int) -> str:
    """The stage's parallel axes in words."""
    sizes = {"tp": config.parallel.tp, "pp": config.parallel.pp, "cp": config.parallel.cp}
    dp = ranks // config.parallel.model_size
    words = [f"{axis}{size}" for axis, size in {"dp": dp, **sizes}.items() if size > 1] or ["one rank"]
    return ", ".join([*words, *(["distributed optimizer"] if config.engine.distributed_optimizer else [])])


def say(text: str) -> None:
    """To the screen, at once."""
    print(text, flush=True)


def main() -> int:
    """Parse the command line and run; 1 where targets count and one was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="default runs/demo, or runs/demo-miniature")
    parser.add_argument("--miniature", action="store_true", help="seconds instead of minutes; learns nothing")
    parser.add_argument("--algorithms", choices=("ppo", "all"), default="ppo", help="what to train from the SFT model")
    parser.add_argument("--check-targets", action="store_true", help="exit with 1 when a target is missed")
    parser.add_argument("--fresh", action="store_true", help="remove first what a demo left in the folder")
    arguments = parser.parse_args()
    folder = (arguments.folder or Path("runs/demo-miniature" if arguments.miniature else "runs/demo")).resolve()
    try:
        claim(folder, {"seed": arguments.seed, "miniature": arguments.miniature}, arguments.fresh)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    demo = Demo(folder, arguments.device, arguments.seed, arguments.miniature)
    met = demo.run(others=arguments.algorithms == "all")
    return int(arguments.check_targets and not met)


if __name__ == "__main__":
    sys.exit(main())
