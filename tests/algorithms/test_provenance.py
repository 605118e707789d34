"""PPO knows the very head that a reward model was trained to, also where it scores in another precision."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from megatron_zj.algorithms.provenance import RewardHeadError, head_checksum, require_head
from megatron_zj.checkpoint.load import load
from megatron_zj.checkpoint.manifest import ManifestInfo
from megatron_zj.checkpoint.save import Checkpointer
from megatron_zj.config.checkpoint import CheckpointConfig
from megatron_zj.roles.role import Role
from tests.algorithms.layouts import ENGINE, LAYOUTS, Layout
from tests.algorithms.ppo_world import build_roles
from tests.helpers.ranks import run_ranks

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")


def _reward(precision: Precision, *, trained: bool = False) -> Role:
    layout = Layout(engine=dataclasses.replace(ENGINE, precision=precision))
    return build_roles(["reward"], layout, trained=["reward"] if trained else [])["reward"]


def _checksum(layout: Layout) -> dict[str, Any]:
    return head_checksum(build_roles(["reward"], layout)["reward"])


def test_the_checksum_is_the_same_on_every_rank_of_every_layout() -> None:
    found = run_ranks(1, _checksum, Layout())
    found += run_ranks(2, _checksum, LAYOUTS["tp2 sp"])
    found += run_ranks(2, _checksum, LAYOUTS["pp2"])
    assert all(one == found[0] for one in found)
    assert found[0]["dtype"] == "float32"
    assert found[0]["sha256"] == found[0]["casts"]["float32"]


def _compare() -> list[str]:
    role = _reward("fp32")
    stored = head_checksum(role)
    old = {name: stored[name] for name in ("sha256", "dtype")}  # before there were casts
    said = [require_head(role, found, "run") for found in (stored, None, old, old | {"dtype": "bfloat16"})]
    assert role.engine is not None
    with torch.no_grad():
        role.engine.chunks[-1].output_layer.weight[0, 3] += 1e-7  # one bit of one weight
    for one in (stored, old):
        with pytest.raises(RewardHeadError, match="not the one that run was trained to"):
            require_head(role, one, "run")
    return said


def test_one_changed_bit_is_found() -> None:
    [[same, unknown, old, other]] = run_ranks(1, _compare)
    assert same.endswith("the very head that was trained")
    assert old == same
    assert "no checksum" in unknown
    assert "stores a checksum in bfloat16 alone, so not compared" in other


def _loaded(folder: Path, trained: Precision, scores: Precision) -> str:
    """What is said of a head that was trained in one precision and scores in another; a foreign one is refused."""
    model = _reward(trained, trained=True)
    assert model.engine is not None
    with torch.no_grad():
        model.engine.chunks[-1].output_layer.bias += 0.3  # so that every cast rounds something
    Checkpointer(folder, CheckpointConfig(), ManifestInfo(config={})).save(
        1, {"model": model.engine}, {"head": head_checksum(model)}
    )
    stored, reward = load(folder, {})["head"], _reward(scores)
    load(folder, {"reward": reward.engine}, weights_only=True)
    said = require_head(reward, stored, "run")
    with pytest.raises(RewardHeadError, match="not the one that run was trained to"):
        require_head(_reward(scores), stored, "run")
    return said


@pytest.mark.parametrize("scores", PRECISIONS)
@pytest.mark.parametrize("trained", PRECISIONS)
def test_a_head_is_known_in_whatever_precision_it_scores(tmp_path: Path, trained: Precision, scores: Precision) -> None:
    [said] = run_ranks(1, _loaded, tmp_path / "checkpoints", trained, scores)
    assert "the very head that was trained" in said
    assert ("cast from" in said) == (trained != scores)
