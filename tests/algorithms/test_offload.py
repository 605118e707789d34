"""Offloading idle roles is invisible to PPO: not one bit of a metric changes."""

from __future__ import annotations

import dataclasses

from tests.algorithms import ppo_world
from tests.algorithms.layouts import LATE, Layout
from tests.helpers.ranks import run_ranks


def test_offloading_idle_roles_changes_no_bit() -> None:
    plain = Layout(2, engine=LATE)
    idle = dataclasses.replace(plain, engine=dataclasses.replace(LATE, offload_idle=True))
    one, other = (run_ranks(2, ppo_world.run_ppo, layout)[0][0] for layout in (plain, idle))
    assert set(ppo_world.differences(other, one, floor=1e-300).values()) == {0.0}
