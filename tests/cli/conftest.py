"""One small world for all command tests: the demo's files in miniature, and a checkpoint of each kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.commands import zj
from tests.train import stages

ONE_RANK = {
    "parallel__tp": 1,
    "parallel__pp": 1,
    "parallel__sequence_parallel": "false",
    "run__eval_every": 0,
    "optim__warmup_steps": 0,
}


def train_argv(stage: str, folder: Path, run: str, **changes: object) -> list[str]:
    """``zj`` words that train a stage on one rank; ``changes`` use double underscores for dots."""
    return ["train", *stages.overrides_of(stage, folder, run, **{**ONE_RANK, **changes})]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, tokenizer and one-step runs: ``pretrain``, ``sft``, ``reward``."""
    made = tmp_path_factory.mktemp("world")
    stages.make_data(made)
    for stage in ("pretrain", "sft", "reward"):
        outcome = zj(train_argv(stage, made, stage, run__num_steps=1))
        assert outcome.code == 0, outcome.output
    return made
