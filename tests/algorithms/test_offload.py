"""Offloading idle roles is invisible to PPO: not one bit of a metric changes.  And no more is moved than must be."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from megatron_zj.checkpoint.load import load
from megatron_zj.checkpoint.manifest import ManifestInfo, read_manifest
from megatron_zj.checkpoint.save import Checkpointer
from megatron_zj.config.checkpoint import CheckpointConfig
from megatron_zj.engine import offload
from megatron_zj.engine.engine import Engine
from megatron_zj.engine.offload import HostCopy
from megatron_zj.roles.world import WorldBatch
from tests.algorithms import ppo_world
from tests.algorithms.layouts import ENGINE, LATE, OFFLOAD, OVERLAP, Layout
from tests.helpers.ranks import run_ranks


@pytest.mark.parametrize("overlap", [False, True], ids=["waiting", "overlapping"])
def test_offloading_idle_roles_changes_no_bit(overlap: bool) -> None:
    plain = Layout(2, engine=LATE)
    idle = dataclasses.replace(plain, engine=dataclasses.replace(LATE, offload_idle=True, overlap_offload=overlap))
    one, other = (run_ranks(2, ppo_world.run_ppo, layout)[0][0] for layout in (plain, idle))
    assert set(ppo_world.differences(other, one, floor=1e-300).values()) == {0.0}


def _restores_of_steps() -> list[int]:
    """How often something came back from the host, by step."""
    ppo = ppo_world.build_ppo(ppo_world.PPO_CONFIG, Layout(engine=OFFLOAD))
    restored, restore = [0], HostCopy.restore

    def counted(copy: HostCopy, *, beside: bool = False) -> None:
        restored[-1] += copy.away
        restore(copy, beside=beside)

    HostCopy.restore = counted  # type: ignore[method-assign]  # this process ends with the test
    for _ in range(2):
        ppo.step()
        restored.append(0)
    return restored[:-1]


def test_an_iteration_brings_back_a_role_only_when_it_is_its_turn() -> None:
    """The actor samples, and is there in the second iteration; reference, critic and reward score; critic and actor
    take turns in two epochs of two.
    """
    assert run_ranks(1, _restores_of_steps) == [[4 + 8, 3 + 8]]


def _copies_that_wait_for_the_computing() -> list[tuple[str, int, int]]:
    """Two scoring calls and two updates, whose copies end only once the model that computes has begun to.

    By call: who computed, how many were leaving or coming meanwhile, and how many models hold memory at the end.
    """
    roles = ppo_world.build_roles(ppo_world.HEADS, Layout(engine=OVERLAP))
    engines = {name: role.engine for name, role in roles.items() if role.engine is not None}
    begun, seen, copy_all = threading.Event(), [], offload._copy_all

    def late(pairs: list[tuple[Tensor, Tensor]], **how: bool) -> None:
        if threading.current_thread() is not threading.main_thread():
            assert begun.wait(30), "nobody computes while this copy runs"
        copy_all(pairs, **how)

    def watched(name: str, infer: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            states = [engine._host._state for engine in engines.values()]
            begun.set()
            found = infer(*args, **kwargs)
            seen.append((name, states.count("leaving"), states.count("coming")))
            return found

        return call

    offload._copy_all = late  # this process ends with the test
    for name, engine in engines.items():
        engine.infer = watched(name, engine.infer)  # type: ignore[method-assign]
    rows = WorldBatch.gather(ppo_world.Prompts().next(4, 0, 1))
    engines["actor"].reload()
    calls = [("reference", "logprobs"), ("critic", "values"), ("reward", "scores")]
    answers = [roles[name].infer(want, rows) for name, want in calls]  # type: ignore[arg-type]
    answers[-1].wait()
    assert [name for name, size in _held(engines).items() if size] == ["reward"]
    return seen


def test_a_model_computes_while_the_last_one_leaves_and_the_next_one_comes() -> None:
    expected = [("reference", 1, 1), ("critic", 1, 2), ("reward", 1, 1)]
    assert run_ranks(1, _copies_that_wait_for_the_computing) == [expected]


def _held(engines: dict[str, Engine]) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state on the device, by role."""
    found = {}
    for name, engine in engines.items():
        tensors = [*engine.chunks[0].parameters(), *(engine.optimizer.tensors() if engine.optimizer else ())]
        tensors += [buffer.grad_data for chunk in engine._wrapped for buffer in chunk.buffers]
        found[name] = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
    return found


def _through_a_checkpoint(folder: Path, layout: Layout, async_save: bool) -> tuple[Any, ...]:
    """A step, a save, a load into a second world and its step; bytes held after build, save and load; digests."""
    made = []
    for _ in range(2):
        ppo = ppo_world.build_ppo(ppo_world.PPO_CONFIG, layout)
        made.append((ppo, {name: role.engine for name, role in ppo.roles.items() if role.engine is not None}))
    (first, engines), (second, others) = made
    held = [_held(engines)]
    metrics = first.step()
    writer = Checkpointer(folder, CheckpointConfig(async_save=async_save), ManifestInfo({}, None))
    writer.save(1, engines, first.state_dict())
    held.append(_held(engines))
    writer.wait()
    second.load_state_dict(load(folder, others))
    held.append(_held(others))
    files = read_manifest(folder / "step_00000001").files
    digests = {name: record.sha256 for name, record in files.items() if name.endswith(".distcp")}
    return metrics, second.step(), first.step(), digests, held


@pytest.mark.parametrize(("async_save", "overlap"), [(False, False), (True, False), (False, True), (True, True)])
def test_idle_roles_are_away_after_build_save_and_load_and_the_bits_are_the_same(
    tmp_path: Path, async_save: bool, overlap: bool
) -> None:
    plain = run_ranks(2, _through_a_checkpoint, tmp_path / "plain", Layout(2, engine=LATE), async_save)
    idle = Layout(2, engine=dataclasses.replace(LATE, offload_idle=True, overlap_offload=overlap))
    for one, other in zip(run_ranks(2, _through_a_checkpoint, tmp_path / "idle", idle, async_save), plain, strict=True):
        assert one[:4] == other[:4]
        assert one[1] == one[2]  # the loaded one goes on as the saved one
        assert [sum(held.values()) for held in one[4]] == [0, 0, 0]
        assert all(size > 10_000 for held in other[4] for size in held.values())


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
