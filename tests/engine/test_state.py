"""Checkpoint state: loads under any layout, with or without the distributed optimizer, and resumes exactly.

The traps of megatron-core's distributed optimizer each have a test that is red without what handles them.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_zj.config.optim import EngineConfig, LossScaleConfig
from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.engine import optimizer_state
from megatron_zj.engine.engine import Engine
from megatron_zj.models.canonical import read_stage
from megatron_zj.parallel.groups import placement_world
from tests.engine.training import MODEL, Case, Squares, global_batch, make_engine, make_groups, shard_of
from tests.engine.whole_state import load_whole, save_whole
from tests.helpers.ranks import run_ranks

PLAIN = EngineConfig(micro_batch_tokens=40)
SHARDED = replace(PLAIN, distributed_optimizer=True)
OVERLAPPED = replace(SHARDED, overlap_grad_reduce=True, overlap_param_gather=True)


def _steps(engine: Engine, first: int, count: int) -> list[dict[str, float]]:
    return [
        engine.update(Squares("lm"), shard_of(global_batch(step), engine.groups))
        for step in range(first, first + count)
    ]


def _resume(source: Case, targets: list[Case]) -> list[float]:
    """Largest difference, over three steps, between going on and resuming under each target."""
    groups = make_groups(source)
    engine = make_engine(source, groups)
    _steps(engine, 0, 3)
    saved = save_whole(engine)
    went_on = _steps(engine, 3, 3)
    differences = []
    for case in targets:
        same = groups if case.parallel == source.parallel else None
        resumed = make_engine(replace(case, model=source.model), same, awaits_weights=True)  # NaN until it is loaded
        load_whole(resumed, copy.deepcopy(saved))
        assert resumed.num_updates == 3
        again = _steps(resumed, 3, 3)
        assert [one["lr"] for one in again] == [one["lr"] for one in went_on]
        differences.append(
            max(
                max(abs(a["loss"] - b["loss"]), abs(a["grad_norm"] - b["grad_norm"]))
                for a, b in zip(went_on, again, strict=True)
            )
        )
    return differences


def _leave_one_out() -> list[str]:
    case = Case(ParallelConfig(), PLAIN)
    source = make_engine(case, optim=None)
    names = [name for name, _ in source.chunks[0].named_parameters()]
    for left_out in names:
        target = make_engine(case, source.groups, None, awaits_weights=True)
        weights = source.chunks[0].state_dict() | {left_out: target.chunks[0].get_parameter(left_out)}
        with pytest.raises(ValueError, match=f"no weights were loaded for {left_out}$"):
            target.load_sharded_state({"model": weights})
    return names


def test_a_parameter_that_got_no_weights_is_an_error_that_names_it() -> None:
    (named,) = run_ranks(1, _leave_one_out)
    assert len(named) > 10


def _case(engine: EngineConfig, **axes: Any) -> Case:
    return Case(ParallelConfig(**axes), engine)


def _run_resume(ranks: int, source: Case, targets: list[Case]) -> list[list[float]]:
    return run_ranks(ranks, _resume, source, targets, timeout=180.0)


@pytest.mark.parametrize("source", [_case(OVERLAPPED), _case(PLAIN, tp=2)], ids=["dp2-distopt", "tp2"])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(source: Case) -> None:
    targets = [source, _case(PLAIN), _case(SHARDED), _case(PLAIN, pp=2, vpp=2), _case(SHARDED, cp=2)]
    for differences in _run_resume(2, source, targets):
        assert differences[0] == 0.0, "the same layout resumes to the bit"
        assert max(differences) <= 2e-6, differences


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_main_weights_travel_between_optimizers(precision: Any) -> None:
    plain, sharded = (_case(replace(config, precision=precision)) for config in (PLAIN, SHARDED))
    for source, other in ((plain, sharded), (sharded, plain)):
        for differences in _run_resume(2, source, [source, other]):
            assert differences[0] == 0.0
            assert differences[1] <= 1e-5  # the sum over ranks in another order


def _loss_scale() -> tuple[float, float, int, int]:
    scale = LossScaleConfig(initial=2.0**30, hysteresis=1, window=3)
    case = _case(replace(SHARDED, precision="fp16", loss_scale=scale))
    groups = make_groups(case)
    engine, other = make_engine(case, groups), make_engine(case, groups)
    _steps(engine, 0, 4)
    load_whole(other, save_whole(engine))
    assert engine.optimizer is not None
    assert other.optimizer is not None
    return engine.optimizer.loss_scale, other.optimizer.loss_scale, engine.optimizer.steps, other.optimizer.steps


def test_the_loss_scale_resumes() -> None:
    scale, resumed, steps, resumed_steps = run_ranks(1, _loss_scale)[0]
    assert scale == resumed < 2.0**30
    assert steps == resumed_steps


def _traps() -> dict[str, Any]:
    groups = make_groups(_case(SHARDED))
    engine = make_engine(_case(SHARDED), groups)
    # An optimizer that never stepped has no state: megatron-core's state_dict dies on len(steps) == 1.
    load_whole(make_engine(_case(SHARDED), groups), save_whole(engine))
    _steps(engine, 0, 2)
    saved = save_whole(engine)
    resumed = make_engine(_case(SHARDED), groups)  # fresh: no "step" to copy into
    load_whole(resumed, saved)
    assert resumed.optimizer is not None
    counts = [state["step"] for state in resumed.optimizer.adam.state.values()]
    found = {"values": {float(count) for count in counts}, "distinct": len({id(count) for count in counts})}
    _steps(resumed, 2, 1)
    found["after"] = {float(state["step"]) for state in resumed.optimizer.adam.state.values()}
    return {**found, "parameters": len(counts)}


def test_every_parameter_counts_its_own_steps_after_a_load() -> None:
    for found in run_ranks(2, _traps):
        assert found["values"] == {2.0}
        assert found["distinct"] == found["parameters"] > 1
        assert found["after"] == {3.0}, "a shared count advances once a parameter: wrong bias correction"


def _weights_only() -> tuple[list[float], list[float]]:
    groups = make_groups(_case(PLAIN))
    trained = make_engine(_case(PLAIN), groups)
    _steps(trained, 0, 2)
    saved = save_whole(trained, optimizer=False)
    frozen = make_engine(_case(PLAIN), groups, optim=None)
    load_whole(frozen, saved, optimizer=False)
    batch = shard_of(global_batch(9), groups)
    same = frozen.evaluate(Squares("lm"), batch)["loss"], trained.evaluate(Squares("lm"), batch)["loss"]
    # The main weights of a low-precision engine must follow, or its first step undoes the load.
    low = make_engine(_case(replace(SHARDED, precision="bf16")), groups)
    load_whole(low, saved, optimizer=False)
    before = {name: value.clone() for name, value in read_stage(low.chunks, groups).items()}
    assert low.optimizer is not None
    assert low.optimizer.steps == 0
    object.__setattr__(low.optimizer.learning_rate, "lr", 0.0)
    _steps(low, 2, 1)
    moved = [float((value - before[name]).abs().max()) for name, value in read_stage(low.chunks, groups).items()]
    return list(same), moved


def test_weights_alone_start_a_new_run() -> None:
    for (frozen, trained), moved in run_ranks(2, _weights_only):
        assert frozen == trained
        assert max(moved) == 0.0


def _late_weights() -> tuple[float, list[list[float]]]:
    """The largest distance between weights, and the losses of reads between updates."""
    groups = make_groups(_case(OVERLAPPED))
    late, plain = make_engine(_case(OVERLAPPED), groups), make_engine(_case(PLAIN), groups)
    batch, losses = shard_of(global_batch(9), groups), []
    for engine in (late, plain):
        objective, found = Squares("lm"), []
        for step in range(3):
            found.append(_steps(engine, step, 1)[0]["loss"])
            found.append(engine.evaluate(objective, batch)["loss"])
        found.append(_steps(engine, 3, 1)[0]["loss"])
        losses.append(found)
    late.gather_weights()
    truth = read_stage(plain.chunks, groups)
    apart = [float((value - truth[name]).abs().max()) for name, value in read_stage(late.chunks, groups).items()]
    return max(apart), losses


def test_gathered_weights_are_the_updated_ones() -> None:
    for apart, (late, plain) in run_ranks(2, _late_weights):
        assert apart < 1e-4
        assert late == pytest.approx(plain, abs=2e-6)


def _dropout() -> tuple[list[float], list[float]]:
    case = replace(_case(PLAIN), model=replace(MODEL, dropout=0.2))
    groups = make_groups(case)
    engine = make_engine(case, groups)
    _steps(engine, 0, 2)
    saved = save_whole(engine)
    went_on = [one["loss"] for one in _steps(engine, 2, 2)]
    torch.manual_seed(99)
    resumed = make_engine(case, groups)
    load_whole(resumed, saved)
    return went_on, [one["loss"] for one in _steps(resumed, 2, 2)]


def _beside(other: bool) -> list[float]:
    """Losses under dropout, where another model with dropout is built and learns in between, or not."""
    case = replace(_case(PLAIN), model=replace(MODEL, dropout=0.2))
    groups = make_groups(case)
    engine, found = make_engine(case, groups), list[float]()
    for step in range(3):
        found.append(engine.update(Squares("lm"), shard_of(global_batch(step), groups))["loss"])
        if other:
            make_engine(case, groups).update(Squares("lm"), shard_of(global_batch(step), groups))
    return found


def test_the_dropout_of_one_model_is_not_moved_by_another() -> None:
    """Megatron-core has one random tracker a process: docs/upstream/one-rng-tracker.md."""
    assert run_ranks(2, _beside, True) == run_ranks(2, _beside, False)


def test_dropout_resumes_to_the_bit() -> None:
    for went_on, again in run_ranks(2, _dropout):
        assert went_on == again


def test_priming_is_what_adamw_does_at_its_first_step() -> None:
    weights = [torch.nn.Parameter(torch.randn(3)) for _ in range(2)]
    lazy, primed = (torch.optim.AdamW([{"params": weights, "fused": True}], lr=0.0) for _ in range(2))

    class _Holder:
        adam = primed

    optimizer_state.prime(_Holder())  # type: ignore[arg-type]
    for parameter in weights:
        parameter.grad = torch.ones(3)
    for adam in (lazy, primed):
        adam.step()
    for parameter in weights:
        for key, value in lazy.state[parameter].items():
            assert torch.equal(value, primed.state[parameter][key]), key


def _on_disk(folder: str) -> list[float]:
    groups = make_groups(_case(SHARDED))
    engine, resumed = make_engine(_case(SHARDED), groups), make_engine(_case(PLAIN), groups)
    _steps(engine, 0, 2)
    with placement_world(groups):
        dist_checkpointing.save(engine.sharded_state(optimizer=True, loading=False), folder)
        state = dist_checkpointing.load(resumed.sharded_state(optimizer=True, loading=True), folder)
    resumed.load_sharded_state(state)
    return [abs(a["loss"] - b["loss"]) for a, b in zip(_steps(engine, 2, 2), _steps(resumed, 2, 2), strict=True)]


@pytest.mark.slow
def test_megatron_cores_own_files_hold_the_state() -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert max(max(found) for found in run_ranks(2, _on_disk, folder)) <= 1e-6
