"""PPO knows the very head that a reward model was trained to."""

from __future__ import annotations

import pytest
import torch

from megatron_zj.algorithms.provenance import RewardHeadError, head_checksum, require_head
from tests.algorithms.layouts import LAYOUTS, Layout
from tests.algorithms.ppo_world import build_roles
from tests.helpers.ranks import run_ranks


def _checksum(layout: Layout) -> dict[str, str]:
    return head_checksum(build_roles(["reward"], layout)["reward"])


def test_the_checksum_is_the_same_on_every_rank_of_every_layout() -> None:
    found = run_ranks(1, _checksum, Layout())
    found += run_ranks(2, _checksum, LAYOUTS["tp2 sp"])
    found += run_ranks(2, _checksum, LAYOUTS["pp2"])
    assert len({one["sha256"] for one in found}) == 1
    assert found[0]["dtype"] == "float32"


def _compare() -> list[str]:
    role = build_roles(["reward"], Layout())["reward"]
    stored = head_checksum(role)
    said = [require_head(role, stored, "run"), require_head(role, None, "run")]
    said.append(require_head(role, stored | {"dtype": "bfloat16"}, "run"))
    assert role.engine is not None
    with torch.no_grad():
        role.engine.chunks[-1].output_layer.weight[0, 3] += 1e-7  # one bit of one weight
    with pytest.raises(RewardHeadError, match="not the one that run was trained to"):
        require_head(role, stored, "run")
    return said


def test_one_changed_bit_is_found() -> None:
    [[same, unknown, other]] = run_ranks(1, _compare)
    assert same.endswith("the very head that was trained")
    assert "no checksum" in unknown
    assert "trained in bfloat16, so not compared" in other
