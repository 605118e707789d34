"""Training from a checkpoint equals training on: to the bit on the same layout, within rounding on any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_zj.checkpoint.errors import CheckpointError
from megatron_zj.checkpoint.load import load
from megatron_zj.checkpoint.manifest import ManifestInfo, read_manifest
from megatron_zj.checkpoint.save import Checkpointer
from megatron_zj.config.checkpoint import CheckpointConfig
from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.engine.engine import Engine
from megatron_zj.models.canonical import read_stage
from tests.engine.training import Case, Squares, global_batch, make_engine, shard_of, with_engine
from tests.helpers.ranks import run_ranks

BEFORE, AFTER = 2, 2  # steps before and after the save
DIST = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
TP, SP = Case(ParallelConfig(tp=2)), Case(ParallelConfig(tp=2, sequence_parallel=True))
PP, VPP, CP = Case(ParallelConfig(pp=2)), Case(ParallelConfig(pp=2, vpp=2)), Case(ParallelConfig(cp=2))
DP, SHARDED = Case(), with_engine(Case(), **DIST)
ALL = {"tp": TP, "sp": SP, "pp": PP, "vpp": VPP, "cp": CP, "dp": DP, "dist": SHARDED}
Curve = list[tuple[float, float]]  # loss and gradient norm a step


def _steps(engine: Engine, case: Case, first: int, count: int) -> Curve:
    found = []
    for step in range(first, first + count):
        batch = shard_of(global_batch(step, case.model), engine.groups)
        metrics = engine.update(Squares(case.head), batch)
        found.append((metrics["loss"], metrics["grad_norm"]))
    return found


def _weights(engine: Engine) -> dict[str, torch.Tensor]:
    engine.gather_weights()
    return {name: value.clone() for name, value in read_stage(engine.chunks, engine.groups).items()}


def _spoiled(case: Case) -> Engine:
    """A fresh engine with none of the right numbers in it."""
    engine = make_engine(case)
    with torch.no_grad():
        for chunk in engine.chunks:
            for parameter in chunk.parameters():
                parameter.fill_(0.1)
    return engine


def write(case: Case, root: Path, **options: Any) -> tuple[Curve, dict[str, torch.Tensor]]:
    """Train, save in the middle, train on: how it went on, and where it ended."""
    engine = make_engine(case)
    _steps(engine, case, 0, BEFORE)
    writer = Checkpointer(root, CheckpointConfig(**options), ManifestInfo(config={}))
    writer.save(BEFORE, {"model": engine}, {"num_steps_done": BEFORE})
    curve = _steps(engine, case, BEFORE, AFTER)
    writer.wait()
    return curve, _weights(engine)


def resume(case: Case, root: Path) -> tuple[Curve, dict[str, torch.Tensor]]:
    """Load and train on."""
    engine = _spoiled(case)
    done = load(root, {"model": engine})["num_steps_done"]
    return _steps(engine, case, done, AFTER), _weights(engine)


def _same_layout(cases: dict[str, Case], root: Path) -> list[str]:
    wrong = []
    for name, case in cases.items():
        curve, weights = write(case, root / name, async_save=True)
        again, loaded = resume(case, root / name)
        if curve != again or any(not torch.equal(weights[key], loaded[key]) for key in weights):
            wrong.append(f"{name}: {curve} then {again}")
    return wrong


def test_resume_on_the_same_layout_is_bit_equal(tmp_path: Path) -> None:
    scalar = {"critic": replace(PP, head="value"), "score": replace(SP, head="score")}
    low = {"bf16": with_engine(SHARDED, precision="bf16"), "fp16": with_engine(TP, precision="fp16")}
    tied = {"tied": replace(PP, model=replace(PP.model, tie_embeddings=True))}
    dropout = {"dropout": replace(SP, model=replace(SP.model, dropout=0.1))}
    assert run_ranks(2, _same_layout, {**ALL, **scalar, **low, **tied, **dropout}, tmp_path) == [[], []]


def _write_all(cases: dict[str, Case], root: Path) -> dict[str, Curve]:
    return {name: write(case, root / name)[0] for name, case in cases.items()}


def _resume_all(pairs: list[tuple[str, Case]], root: Path) -> list[Curve]:
    return [resume(case, root / source)[0] for source, case in pairs]


def _largest(a: Curve, b: Curve) -> float:
    return max(abs(x[0] - y[0]) for x, y in zip(a, b, strict=True))


def _cross(tmp_path: Path, pairs: dict[int, list[tuple[str, str]]], targets: dict[str, Case], limit: float) -> None:
    (written, _) = run_ranks(2, _write_all, ALL, tmp_path)
    for ranks, wanted in pairs.items():
        (curves, *_) = run_ranks(ranks, _resume_all, [(a, targets[b]) for a, b in wanted], tmp_path)
        for (source, target), curve in zip(wanted, curves, strict=True):
            assert _largest(curve, written[source]) <= limit, (ranks, source, target, curve, written[source])


def test_resume_on_another_layout_and_another_number_of_ranks_differs_by_rounding_only(tmp_path: Path) -> None:
    two = [("tp", "dp"), ("pp", "tp"), ("dist", "sp"), ("vpp", "cp"), ("dp", "vpp"), ("cp", "dist"), ("sp", "pp")]
    four = {"tp2pp2": Case(ParallelConfig(tp=2, pp=2)), "tp2dp2": with_engine(Case(ParallelConfig(tp=2)), **DIST)}
    _cross(
        tmp_path,
        {2: two, 1: [("vpp", "dp"), ("dist", "dp")], 4: [("dist", "tp2pp2"), ("vpp", "tp2dp2")]},
        {**ALL, **four},
        1e-6,
    )


@pytest.mark.slow
def test_resume_between_all_pairs_of_layouts(tmp_path: Path) -> None:
    _cross(tmp_path, {2: [(a, b) for a in ALL for b in ALL]}, ALL, 1e-6)


def _two_models(root: Path) -> dict[str, Any]:
    score = make_engine(replace(TP, head="score"))
    lm = make_engine(TP)
    Checkpointer(root, CheckpointConfig(), ManifestInfo(config={})).save(1, {"policy": lm, "reward": score}, {})
    critic = _spoiled(replace(PP, head="value"))
    load(root, {"critic": critic}, roles={"critic": "reward"}, weights_only=True)
    expected, found = make_engine(replace(PP, head="score")), _weights(critic)
    head = {name: value for name, value in found.items() if "head" in name}
    body = all(torch.equal(found[name], value) for name, value in _weights(expected).items() if "head" not in name)
    fresh = all(torch.equal(value, torch.full_like(value, 0.1)) for value in head.values())
    actor = _spoiled(DP)
    with pytest.raises(CheckpointError, match="score head, so there is no language-model head"):
        load(root, {"actor": actor}, roles={"actor": "reward"}, weights_only=True)
    load(root, {"actor": actor}, roles={"actor": "policy"}, weights_only=True)
    first = _steps(actor, DP, 0, 1) == _steps(make_engine(DP), DP, 0, 1)
    return {"body": body, "fresh": fresh, "actor": first}


def test_roles_are_mapped_and_a_scalar_head_stays_fresh(tmp_path: Path) -> None:
    assert run_ranks(2, _two_models, tmp_path) == [{"body": True, "fresh": True, "actor": True}] * 2
    assert read_manifest(tmp_path / "step_00000001").roles["reward"].head == "score"
