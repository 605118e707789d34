"""Two placements compute at the same time, and every role call is a named phase: shown by timestamps, and by a hang."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_zj.runtime import activity as heartbeat
from megatron_zj.runtime.activity import Activity
from megatron_zj.runtime.distributed import RankLostError, session
from tests.algorithms import ppo_world
from tests.algorithms.layouts import MORE_LAYOUTS
from tests.helpers.ranks import run_ranks

SPLIT_1_1 = MORE_LAYOUTS["split 1 + 1"]
CALL_SECONDS = 0.15  # that every model's call takes at least, so that a slow machine cannot hide the order of things
Spans = list[tuple[str, float, float]]  # phase, and its first and last moment (Unix seconds)


def _record(activity: Activity) -> Spans:
    """Collects every phase that ends, innermost name only."""
    begun: list[tuple[str, float]] = []
    ended: Spans = []

    def note() -> None:
        while len(begun) > len(activity.phases):
            ended.append((*begun.pop(), time.time()))
        if len(begun) < len(activity.phases):
            begun.append((activity.phases[-1], time.time()))

    activity.on_change = note
    return ended


def _slow(call: Any) -> Any:
    def slower(*args: Any, **options: Any) -> Any:
        time.sleep(CALL_SECONDS)
        return call(*args, **options)

    return slower


def _phases_of_a_step() -> Spans:
    activity = Activity()
    ppo = ppo_world.build_ppo(ppo_world.PPO_CONFIG, SPLIT_1_1, activity=activity)
    for role in ppo.roles.values():
        if role.engine is not None:
            role.engine.infer, role.engine.update = _slow(role.engine.infer), _slow(role.engine.update)
    spans = _record(activity)
    dist.barrier()
    ppo.step()
    dist.barrier()  # a rank that ends takes along what it has not sent yet
    return spans


def _of(spans: Spans, name: str) -> Spans:
    return [span for span in spans if span[0] == name]


def _overlap(some: Spans, others: Spans) -> float:
    """Seconds in which one of each is under way."""
    return sum(max(0.0, min(a[2], b[2]) - max(a[1], b[1])) for a in some for b in others)


def test_the_pools_of_a_split_compute_at_the_same_time() -> None:
    policy, judges = run_ranks(2, _phases_of_a_step)
    assert not _of(policy, "critic.infer")  # a call is a phase where it is computed
    assert not _of(judges, "actor.update")
    scoring = [_of(policy, "actor.infer") + _of(policy, "reference.infer")]
    scoring.append(_of(judges, "critic.infer") + _of(judges, "reward.infer"))
    assert [len(spans) for spans in scoring] == [2, 2]
    # two calls a pool: both sides are busy nearly all of that time
    assert _overlap(*scoring) > CALL_SECONDS
    learning = _of(policy, "actor.update"), _of(judges, "critic.update")
    updates = ppo_world.PPO_CONFIG.updates_per_step
    assert [len(spans) for spans in learning] == [updates, updates]
    assert _overlap(*learning) > 0.5 * updates * CALL_SECONDS


def _lost_in_a_call(rank: int, port: int, folder: Path, how: str) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})

    def lost(*args: Any, **options: Any) -> None:
        time.sleep(60 if how == "hang" else 1)  # a second, so that a beat with the phase gets out
        os.kill(os.getpid(), signal.SIGKILL)

    try:
        with session("cpu", 5) as process:
            ppo = ppo_world.build_ppo(ppo_world.PPO_CONFIG, SPLIT_1_1, activity=process.activity)
            if rank == 1:
                reward = ppo.models.reward.engine
                assert reward is not None
                reward.infer = lost  # type: ignore[assignment, method-assign]
            with ppo.timers("step 1"):
                ppo.step()
    except RankLostError as error:
        (folder / f"lost-{rank}").write_text(str(error))
        os._exit(3)
    os._exit(0)


@pytest.mark.parametrize("how", ["hang", "kill"])
def test_a_rank_lost_in_a_role_call_is_named_with_the_role_and_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(heartbeat, "SILENCE_SECONDS", 1.5)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_lost_in_a_call, args=(rank, port, tmp_path, how)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    ranks[0].join(40)
    code = ranks[0].exitcode
    for rank in ranks:
        rank.kill()
        rank.join()
    assert code == 3
    said = (tmp_path / "lost-0").read_text()
    assert "rank 1 (" in said
    assert "in phase 'step 1 > collect > reward.infer'" in said
    assert "this rank (0) was in phase 'step 1 > collect" in said
