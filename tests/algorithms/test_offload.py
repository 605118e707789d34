"""Offloading idle roles is invisible to PPO: not one bit of a metric changes.  And no more is moved than must be."""

from __future__ import annotations

import dataclasses

from megatron_zj.engine.offload import HostCopy
from megatron_zj.roles.world import WorldBatch
from tests.algorithms import ppo_world
from tests.algorithms.layouts import ENGINE, LATE, OFFLOAD, Layout
from tests.helpers.ranks import run_ranks


def test_offloading_idle_roles_changes_no_bit() -> None:
    plain = Layout(2, engine=LATE)
    idle = dataclasses.replace(plain, engine=dataclasses.replace(LATE, offload_idle=True))
    one, other = (run_ranks(2, ppo_world.run_ppo, layout)[0][0] for layout in (plain, idle))
    assert set(ppo_world.differences(other, one, floor=1e-300).values()) == {0.0}


def _restores_of_steps() -> list[int]:
    """How often something came back from the host, by step."""
    ppo = ppo_world.build_ppo(ppo_world.PPO_CONFIG, Layout(engine=OFFLOAD))
    restored, restore = [0], HostCopy.restore

    def counted(copy: HostCopy) -> None:
        restored[-1] += copy.away
        restore(copy)

    HostCopy.restore = counted  # type: ignore[method-assign]  # this process ends with the test
    for _ in range(2):
        ppo.step()
        restored.append(0)
    return restored[:-1]


def test_an_iteration_brings_back_a_role_only_when_it_is_its_turn() -> None:
    """The actor is there; reference, critic and reward score; critic and actor take turns in two epochs of two."""
    assert run_ranks(1, _restores_of_steps) == [[3 + 8, 3 + 8]]


def _away() -> dict[str, list[str]]:
    """By the role that computed last: who is on the host, where only the critic makes room when it is idle."""
    roles = ppo_world.build_roles(ppo_world.HEADS, Layout(engine=ENGINE))
    engines = {name: role.engine for name, role in roles.items() if role.engine is not None}
    engines["critic"].config = OFFLOAD
    rows = WorldBatch.gather(ppo_world.Prompts().next(4, 0, 1))
    found = {}
    for name, want in (("reward", "scores"), ("critic", "values"), ("actor", "logprobs")):
        roles[name].infer(want, rows).wait()  # type: ignore[arg-type]
        found[name] = [other for other, engine in engines.items() if engine._host.away]
    return found


def test_a_role_makes_room_by_its_own_setting_whoever_computes() -> None:
    assert run_ranks(1, _away) == [{"reward": ["critic"], "critic": [], "actor": ["critic"]}]
