"""The four stages on published data with the small model, two CPU ranks, as docs/data.md names the files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from megatron_zj.runtime.metrics import read_metrics
from tests.cli.commands import zj
from tests.helpers.published import DATA, needs_data

pytestmark = [needs_data, pytest.mark.slow]
TOKENIZER = f"tokenizer.path={DATA / 'tokenizers/chinese_llama2_tokenizer.model'}"
FILES = {
    "pretrain": ("text",),  # prepared from PRETRAINING
    "sft": ("sft/cmdd_train.jsonl", "sft/medicalgpt_medical_sft_1k.jsonl", "sft/remedi_dev_human_annotation.txt"),
    "reward": ("rm/disc_ranked_dialogues.jsonl", "rm/disc_pairs_firstturn.jsonl"),
    "ppo": ("ppo/prompts_cmedqq.jsonl",),
}
PRETRAINING = ("pt/tcm_classics.jsonl", "pt/drug_inserts.json")
EARLIER = {"sft": "pretrain", "reward": "sft", "ppo": "sft"}  # whose weights a stage starts from
SECONDS = 1800.0  # a stage may take, on a busy machine


def _listed(folder: Path, names: tuple[str, ...]) -> str:
    return f"data.files=[{','.join(str(folder / name) for name in names)}]"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The metrics of every stage, each started from the one before."""
    made = tmp_path_factory.mktemp("real")
    prepared = zj(["prepare", TOKENIZER, _listed(DATA, PRETRAINING), f"out={made / 'text'}"], timeout=SECONDS)
    assert prepared.code == 0, prepared.output
    found = {}
    for stage, names in FILES.items():
        argv = [f"experiment=real/{stage}", TOKENIZER, _listed(made if stage == "pretrain" else DATA, names)]
        argv += [f"run.dir={made / stage}"]
        argv += [f"checkpoint.load={made / EARLIER[stage]}"] if stage in EARLIER else []
        argv += [f"algorithm.reward.load={made / 'reward'}"] if stage == "ppo" else []
        outcome = zj(["train", *argv], ranks=2, timeout=SECONDS)
        assert outcome.codes == (0, 0), outcome.output[-4000:]
        found[stage] = read_metrics(made / stage / "metrics.jsonl")
    return found


def _halves(lines: list[dict[str, Any]], name: str) -> tuple[float, float]:
    """Mean over the first and the second half of the run: a single step is a few rows."""
    values = [line[name] for line in lines]
    return fmean(values[: len(values) // 2]), fmean(values[len(values) // 2 :])


def test_every_stage_runs_fifty_steps_and_its_loss_falls(chain: dict[str, list[dict[str, Any]]]) -> None:
    assert all(len(lines) >= 50 for lines in chain.values())
    loss = {"pretrain": "loss", "sft": "loss", "reward": "loss", "ppo": "critic/loss"}
    halves = {stage: _halves(chain[stage], name) for stage, name in loss.items()}
    print(json.dumps(halves))
    assert all(second < first for first, second in halves.values()), halves
    assert chain["pretrain"][-1]["loss"] < math.log(55296) - 2  # far below knowing nothing


def test_held_out_reward_accuracy_stands_beside_the_longer_answer(chain: dict[str, list[dict[str, Any]]]) -> None:
    """Nothing is claimed about who wins: fifty steps are too few to learn from, and the labels are noisy."""
    last = chain["reward"][-1]
    shown = {name: last[f"validation/{name}"] for name in ("pair_accuracy", "longer_wins", "loss")}
    print(json.dumps(shown))
    assert all(0 < value < 1 for value in shown.values())


def test_ppo_raises_its_score_near_its_reference(chain: dict[str, list[dict[str, Any]]]) -> None:
    score = _halves(chain["ppo"], "score")
    print(json.dumps({"score": score, "kl": _halves(chain["ppo"], "kl")}))
    assert score[1] > score[0]
    assert abs(chain["ppo"][0]["kl"]) < 1e-3  # the first samples are the reference's own
    assert chain["ppo"][-1]["kl"] < 6.0  # the experiment's kl_target
