"""Every stage, killed at any moment and started again, ends with the bits of the run that was never killed."""

from __future__ import annotations

import contextlib
import random
import time
from pathlib import Path

import pytest

from tests.helpers.ranks import RankFailure, run_ranks
from tests.train import stages


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All four stages, each run once without interruption."""
    made = tmp_path_factory.mktemp("stages")
    stages.make_data(made)
    for stage in stages.STAGES:
        run_ranks(2, stages.run_stage, stages.overrides_of(stage, made, stage), timeout=120)
    return made


def _check_equal(folder: Path, stage: str, run: str) -> None:
    assert stages.metrics(folder / run) == stages.metrics(folder / stage)
    assert stages.content(folder / run, stages.STEPS) == stages.content(folder / stage, stages.STEPS)


@pytest.mark.parametrize("stage", stages.STAGES)
def test_stopping_and_going_on_changes_no_bit(folder: Path, stage: str) -> None:
    run = f"{stage}_stopped"
    # the schedule ends where the whole run's does, so only the number of steps may differ
    decay = {"optim__decay_steps": _updates(stage)}
    for steps in (2, stages.STEPS):
        overrides = stages.overrides_of(stage, folder, run, run__num_steps=steps, **decay)
        run_ranks(2, stages.run_stage, overrides, timeout=120)
    _check_equal(folder, stage, run)


def _updates(stage: str) -> int:
    return stages.STEPS * (4 if stage == "ppo" else 1)


def _kill_and_resume(folder: Path, stage: str, run: str, pick: random.Random) -> None:
    overrides = stages.overrides_of(stage, folder, run)
    start = time.monotonic()
    run_ranks(2, stages.run_stage, stages.overrides_of(stage, folder, f"{run}_timing"), timeout=120)
    moment = pick.uniform(0.2, 1.0) * (time.monotonic() - start)
    with contextlib.suppress(RankFailure):  # a late kill may find the run already done
        run_ranks(2, stages.run_stage, overrides, moment, timeout=120)
    run_ranks(2, stages.run_stage, overrides, timeout=120)
    _check_equal(folder, stage, run)


def test_a_kill_at_a_random_moment_changes_no_bit(folder: Path) -> None:
    pick = random.Random(time.time_ns())
    stage = pick.choice(list(stages.STAGES))
    _kill_and_resume(folder, stage, "killed", pick)


@pytest.mark.slow
@pytest.mark.parametrize("stage", stages.STAGES)
def test_many_kills_at_random_moments_change_no_bit(folder: Path, stage: str) -> None:
    pick = random.Random(stage)
    for index in range(25):
        _kill_and_resume(folder, stage, f"{stage}_kill{index}", pick)


def test_a_reward_role_without_a_trained_head_is_refused(folder: Path) -> None:
    overrides = stages.overrides_of("ppo", folder, "headless", algorithm__reward__load=folder / "sft")
    with pytest.raises(RankFailure, match=r"algorithm\.reward\.load: .*'lm' head.* needs a 'score' head"):
        run_ranks(1, stages.run_stage, overrides, timeout=120)
