"""Every stage, killed at any moment and started again, ends with the bits of the run that was never killed."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_zj.checkpoint.hf import export_hf
from megatron_zj.checkpoint.load import load
from megatron_zj.checkpoint.manifest import read_manifest, write_manifest
from megatron_zj.runtime.metrics import read_metrics
from tests.helpers.chance import chance
from tests.helpers.ranks import RankFailure, run_ranks
from tests.train import stages

GENERATING = ("ppo", "grpo", "rejection")
KILLS = 13  # of each of the eight stages: 104
WHERE = ("", "step", "actor.generate", "save")  # any moment, inside a step, inside generation, inside a save


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage run once without interruption; ``seconds`` holds how long each took."""
    made = tmp_path_factory.mktemp("stages")
    (made / "seconds").mkdir()
    stages.make_data(made)
    for stage in stages.STAGES:
        start = time.monotonic()
        run_ranks(2, stages.run_stage, stages.overrides_of(stage, made, stage), timeout=120)
        (made / "seconds" / stage).write_text(str(time.monotonic() - start))
    return made


def _check_equal(folder: Path, stage: str, run: str) -> None:
    assert stages.metrics(folder / run) == stages.metrics(folder / stage)
    assert stages.content(folder / run, stages.STEPS) == stages.content(folder / stage, stages.STEPS)


@pytest.mark.parametrize("stage", stages.STAGES)
def test_stopping_and_going_on_changes_no_bit(folder: Path, stage: str) -> None:
    run = f"{stage}_stopped"
    for steps in (2, stages.STEPS):
        overrides = stages.overrides_of(stage, folder, run, run__num_steps=steps, **stages.schedule_of(stage, folder))
        run_ranks(2, stages.run_stage, overrides, timeout=120)
    _check_equal(folder, stage, run)


def _kill_and_resume(folder: Path, stage: str, run: str, phase: str, pick: random.Random) -> str:
    """The phases in which a rank died; "" where the run had ended before, and there is nothing to resume."""
    rank, step, note = pick.randrange(2), pick.randint(1, stages.STEPS), folder / f"{run}.killed"
    whole = float((folder / "seconds" / stage).read_text())
    longest = {"": whole, "step": read_metrics(folder / stage / "metrics.jsonl")[step - 1]["time/step"]}
    seconds = pick.uniform(0.0, longest.get(phase, 0.05))
    name, entry = (f"step {step}", 1) if phase == "step" else (phase, step)
    kill = stages.Kill(rank, seconds, note, name, entry)
    overrides = stages.overrides_of(stage, folder, run)
    with contextlib.suppress(RankFailure):  # a late kill may find the run already done
        run_ranks(2, stages.run_stage, overrides, kill, timeout=120)
    if not note.exists():
        return ""
    run_ranks(2, stages.run_stage, overrides, timeout=120)
    _check_equal(folder, stage, run)
    return note.read_text()


def _kills(folder: Path, stage: str, phases: Sequence[str], count: int, pick: random.Random) -> list[str]:
    """Draws until ``count`` ranks have really died; where they did."""
    died: list[str] = []
    for attempt in range(20 * count):
        if len(died) < count:
            phase = phases[len(died) % len(phases)]
            found = _kill_and_resume(folder, stage, f"{stage}_{phase}_kill{attempt}", phase, pick)
            died += [found] if found else []
    assert len(died) == count
    return died


@pytest.mark.parametrize("phase", WHERE, ids=["any moment", "step", "generation", "save"])
def test_a_kill_at_a_random_moment_changes_no_bit(folder: Path, phase: str) -> None:
    pick = chance()
    stage = pick.choice(GENERATING if phase == "actor.generate" else list(stages.STAGES))
    _kills(folder, stage, [phase], 1, pick)


@pytest.mark.slow
@pytest.mark.parametrize("stage", stages.STAGES)
def test_many_kills_at_random_moments_change_no_bit(folder: Path, stage: str) -> None:
    """``pytest -rP`` shows where they died."""
    phases = [phase for phase in WHERE if phase != "actor.generate" or stage in GENERATING]
    died = _kills(folder, stage, phases, KILLS, chance())
    places = Counter(phases.split(" > ")[-1] for phases in died)
    print(f"{stage}: {len(died)} kills; died in " + ", ".join(f"{at} {n}" for at, n in places.most_common()))


def _split(stage: str) -> dict[str, Any]:
    """The policy (and PPO's and GRPO's reference) on one rank, what judges it on the other."""
    judges = {"ppo": ("critic", "reward"), "dpo": ("reference",)}.get(stage, ("reward",))
    where = dict.fromkeys(judges, "judges") | {"actor": "policy"}
    if stage in ("ppo", "grpo"):
        where["reference"] = "policy"
    ranks = {"policy": 0, "judges": 1}
    placements = {f"placements__{name}__first_rank": rank for name, rank in ranks.items()}
    placements |= {f"placements__{name}__num_ranks": 1 for name in ranks}
    return placements | {f"algorithm__{role}__placement": at for role, at in where.items()}


@pytest.mark.parametrize(
    ("stage", "first", "then"),
    [
        ("ppo", "data", "split"),
        *((stage, "tp2", "pp2") for stage in ("pretrain", "sft", "reward", "ppo")),
        *(pytest.param("ppo", one, two, marks=pytest.mark.slow) for one, two in (("split", "tp2"), ("pp2", "data"))),
        *(
            pytest.param(s, "data", "split", marks=pytest.mark.slow)
            for s in ("grpo", "rejection", "rejection_filter", "dpo")
        ),
        *(
            pytest.param(s, "tp2", "pp2", marks=pytest.mark.slow)
            for s in ("grpo", "rejection", "rejection_filter", "dpo")
        ),
        *(
            pytest.param(s, one, two, marks=pytest.mark.slow)
            for s in ("pretrain", "sft", "reward")
            for one, two in (("data", "tp2"), ("pp2", "data"))
        ),
    ],
)
def test_a_run_goes_on_under_another_layout_within_1e_6(folder: Path, stage: str, first: str, then: str) -> None:
    """Beside the run that was never stopped, which had the stage's own layout throughout."""
    layouts: dict[str, dict[str, Any]] = {
        "tp2": {"parallel__tp": 2},
        "pp2": {"parallel__pp": 2},
        "split": _split(stage),
    }
    one = {"world_size": 2, "parallel__tp": 1, "parallel__pp": 1, "parallel__sequence_parallel": "false"}
    run = f"{stage}_{first}_{then}"
    for steps, layout in ((2, first), (stages.STEPS, then)):
        changes = {**one, "run__num_steps": steps, **stages.schedule_of(stage, folder), **layouts.get(layout, {})}
        run_ranks(2, stages.run_stage, stages.overrides_of(stage, folder, run, **changes), timeout=120)
    for mine, theirs in zip(stages.metrics(folder / run), stages.metrics(folder / stage), strict=True):
        for name, value in theirs.items():
            if name.endswith("pair_accuracy"):
                continue  # DPO's actor is the reference at first: margins of 0, whose signs are rounding
            if name.endswith(("loss", "score")):
                assert abs(mine[name] - value) <= 1e-6, (mine["step"], name)
            else:  # norms, perplexities; deviations (a difference of squares) and kl (a sum over tokens) near 0
                assert mine[name] == pytest.approx(value, rel=2e-6, abs=4e-6), (mine["step"], name)
    trained = {"ppo": ("actor", "critic"), "reward": ("model",), "sft": ("model",), "pretrain": ("model",)}
    for role in trained.get(stage, ("actor",)):
        ours, whole = (_weights(folder / one, role) for one in (run, stage))
        for name, tensor in whole.items():
            off = float((ours[name] - tensor).norm() / tensor.norm().clamp(min=1.0))
            assert off <= 5e-6, (role, name, off)


def _weights(run: Path, role: str) -> dict[str, torch.Tensor]:
    """Whole tensors of the last checkpoint."""
    target = run / f"hf_{role}"
    if not target.exists():
        export_hf(run / "checkpoints" / f"step_{stages.STEPS:08d}", target, role=role)
    return {name: tensor for file in target.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_ppo_scales_scores_by_what_the_reward_model_stored_and_knows_its_head(folder: Path) -> None:
    reward, ppo = (load(folder / stage / f"checkpoints/step_{stages.STEPS:08d}", {}) for stage in ("reward", "ppo"))
    found = reward["validation"]
    assert ppo["shaping"]["scale"] == {"mean": found["score_mean"], "deviation": found["score_deviation"]}
    log = (folder / "ppo" / "log.txt").read_text(encoding="utf-8")
    assert f"reward head {reward['head']['sha256'][:16]} (float32) of " in log
    assert "the very head that was trained" in log


def test_a_reward_model_of_another_tokenizer_is_refused(folder: Path) -> None:
    """Its weights would read other pieces in the same ids, and score nonsense."""
    other = folder / "reward_of_another_tokenizer"
    shutil.copytree(folder / "reward", other)
    for step in other.glob("checkpoints/step_*"):
        write_manifest(step, dataclasses.replace(read_manifest(step), tokenizer="0" * 64))
    overrides = stages.overrides_of("ppo", folder, "foreign", algorithm__reward__load=other)
    with pytest.raises(RankFailure, match=r"was trained with another tokenizer \(0{12}; in use: .*set tokenizer\.path"):
        run_ranks(1, stages.run_stage, overrides, timeout=120)


def test_a_reward_role_without_a_trained_head_is_refused(folder: Path) -> None:
    overrides = stages.overrides_of("ppo", folder, "headless", algorithm__reward__load=folder / "sft")
    with pytest.raises(RankFailure, match=r"algorithm\.reward\.load: .*'lm' head.* needs a 'score' head"):
        run_ranks(1, stages.run_stage, overrides, timeout=120)
