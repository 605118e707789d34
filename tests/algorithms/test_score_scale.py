"""The mean and deviation that scale the scores of a policy's answers are of the reward model that gives them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from megatron_zj.checkpoint.load import load
from megatron_zj.cli.build import score_scale
from megatron_zj.cli.compose import compose_run
from megatron_zj.config.loader import ConfigError
from tests.helpers.ranks import run_ranks
from tests.train import stages

STATISTICS = {"score_mean": 0.5, "score_deviation": 2.0}
WHERE = Path("runs/reward/checkpoints/step_00000030")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("scale")
    stages.make_data(made)
    return made


def test_every_checkpoint_of_a_reward_run_holds_the_statistics_of_its_own_scores(folder: Path) -> None:
    """Also where it never validates otherwise; they are what validating at every step finds."""
    states: dict[int, list[dict[str, Any]]] = {}
    for eval_every in (0, 1):
        changes = {"checkpoint__load": "null", "run__eval_every": eval_every, "checkpoint__every": 2}
        overrides = stages.overrides_of("reward", folder, f"reward_{eval_every}", **changes, run__num_steps=5)
        run_ranks(2, stages.run_stage, overrides)
        root = folder / f"reward_{eval_every}" / "checkpoints"
        states[eval_every] = [load(root / f"step_{step:08d}", {}) for step in (2, 4, 5)]
    for seldom, always in zip(states[0], states[1], strict=True):
        assert seldom["validation"] == always["validation"]
        assert seldom["validation_step"] == seldom["num_steps_done"]
    assert len({state["validation"]["score_mean"] for state in states[0]}) == 3


def _scale(state: dict[str, Any], *overrides: str) -> tuple[float, float]:
    config = compose_run(["experiment=demo/ppo", "world_size=null", *overrides])
    found = score_scale(config, {"num_steps_done": 30, **state}, WHERE)
    return found.mean, found.deviation


def test_statistics_of_other_weights_are_refused_where_they_would_be_used() -> None:
    own, stale = ({"validation": STATISTICS, "validation_step": step} for step in (30, 20))
    assert _scale(own) == (0.5, 2.0)
    with pytest.raises(ConfigError) as caught:
        _scale(stale)
    said = str(caught.value)
    assert f"the score statistics in {WHERE} are of step 20, its weights of step 30" in said
    for advice in ("data.validation_fraction or data.validation_files", "algorithm.whiten_scores=false"):
        assert advice in said
    for unused in ("algorithm.whiten_scores=false", "algorithm.running_scores=true"):
        assert _scale(stale, unused) == (0.0, 1.0)


def test_a_reward_model_without_statistics_is_refused_where_they_would_be_used(
    caplog: pytest.LogCaptureFixture,
) -> None:
    without: dict[str, Any] = {"validation": {}, "validation_step": None}
    with pytest.raises(ConfigError) as caught:
        _scale(without)
    assert f"{WHERE} has no score statistics; give the reward run validation data" in str(caught.value)
    assert "algorithm.whiten_scores=false" in str(caught.value)
    for unused in ("algorithm.whiten_scores=false", "algorithm.running_scores=true"):
        assert _scale(without, unused) == (0.0, 1.0)
    assert not caplog.records


def test_statistics_that_name_no_step_are_used_and_told(caplog: pytest.LogCaptureFixture) -> None:
    """As they were written before the step was."""
    with caplog.at_level(logging.WARNING):
        assert _scale({"validation": STATISTICS}) == (0.5, 2.0)
    (told,) = (record.getMessage() for record in caplog.records)
    assert "does not say of which step" in told
