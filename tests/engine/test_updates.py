"""Optimizer steps at the edges: precision, overflow, NaN, nothing to learn, shards without rows, weight decay."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_zj.algorithms.pretrain import NextToken
from megatron_zj.config.optim import EngineConfig, LossScaleConfig, OptimConfig
from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.data.packing import PackedBatch
from megatron_zj.engine.build import _set_schedule
from megatron_zj.engine.objective import LossTerms
from megatron_zj.engine.totals import NonFiniteError
from megatron_zj.models import heads
from megatron_zj.models.canonical import read_stage
from tests.engine.training import (
    MODEL,
    OPTIM,
    Case,
    Squares,
    global_batch,
    make_engine,
    make_groups,
    reference,
    shard_of,
)
from tests.helpers.ranks import run_ranks

LOW = EngineConfig(micro_batch_tokens=40)


def _weights(engine: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in read_stage(engine.chunks, engine.groups).items()}


def _changed(engine: Any, before: dict[str, Tensor]) -> bool:
    return any(not torch.equal(value, before[name]) for name, value in _weights(engine).items())


def _low_precision(dist_opt: bool) -> dict[str, Any]:
    groups = make_groups(Case())
    found: dict[str, Any] = {}
    for precision in ("bf16", "fp16"):
        engine = make_engine(Case(engine=replace(LOW, precision=precision, distributed_optimizer=dist_opt)), groups)
        found[precision] = [engine.update(Squares("lm"), shard_of(global_batch(step), groups)) for step in range(5)]
    # 2 ** 30 times a mean loss overflows fp16: skipped until the scale has halved often enough.
    scale = LossScaleConfig(initial=2.0**30, hysteresis=1)
    engine = make_engine(Case(engine=replace(LOW, precision="fp16", loss_scale=scale)), groups)
    before, steps = _weights(engine), []
    for _ in range(30):
        steps.append(engine.update(Squares("lm"), shard_of(global_batch(0), groups)))
        if steps[-1]["skipped"]:
            steps[-1]["touched"] = _changed(engine, before)
    found["forced"] = steps
    constant = LossScaleConfig(initial=1024.0, window=0)
    engine = make_engine(Case(engine=replace(LOW, precision="fp16", loss_scale=constant)), groups)
    found["constant"] = [engine.update(Squares("lm"), shard_of(global_batch(0), groups)) for _ in range(2)]
    return found


@pytest.mark.parametrize("dist_opt", [False, True])
def test_bf16_is_near_fp32_and_fp16_survives_overflow(dist_opt: bool) -> None:
    truth = reference()
    for found in run_ranks(2, _low_precision, dist_opt):
        # The loss of the same weights is within 5e-4, absolutely (2.0e-4 measured).  Later weights are the precision's
        # own: relative to a loss of 4.4, bf16 is then up to 7.0e-4 away and fp16 1.0e-4.
        for precision, drift in (("bf16", 1e-3), ("fp16", 2e-4)):
            assert abs(found[precision][0]["loss"] - truth.losses[0]) < 5e-4
            for step, (metrics, loss) in enumerate(zip(found[precision], truth.losses, strict=True)):
                assert metrics["loss"] == pytest.approx(loss, rel=drift), (precision, step)
                assert metrics["skipped"] == 0
        assert {metrics["loss_scale"] for metrics in found["fp16"]} == {65536.0}
        assert {metrics["loss_scale"] for metrics in found["bf16"]} == {1.0}
        assert [metrics["loss_scale"] for metrics in found["constant"]] == [1024.0, 1024.0]
        skipped = [metrics for metrics in found["forced"] if metrics["skipped"]]
        taken = [metrics for metrics in found["forced"] if not metrics["skipped"]]
        assert 3 <= len(skipped) <= 20
        assert found["forced"][: len(skipped)] == skipped
        assert not any(metrics["touched"] for metrics in skipped)
        scales = [metrics["loss_scale"] for metrics in skipped]
        assert scales == [2.0 ** (30 - index) for index in range(len(scales))]
        assert len({metrics["lr"] for metrics in skipped}) == 1  # the schedule waits too
        assert taken[-1]["loss"] < taken[0]["loss"] - 0.05


# Where megatron-core's own bf16 was measured to stay within 2.4e-4: init_std as by default, 8 rows of 65 tokens.
USUAL = replace(
    MODEL, vocab_size=128, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, num_query_groups=2,
    max_position_embeddings=65, init_std=0.02,
)  # fmt: skip
USUAL_OPTIM = OptimConfig(lr=1e-3, weight_decay=0.1, clip_grad=1.0, schedule="constant", warmup_steps=0)


def _usual_losses() -> dict[str, list[float]]:
    groups, found = make_groups(Case()), {}
    for name, changes in {
        "fp32": {},
        "bf16": {"precision": "bf16"},
        "bf16 distributed": {"precision": "bf16", "distributed_optimizer": True},
        "fp16": {"precision": "fp16"},
    }.items():
        engine = make_engine(Case(engine=replace(LOW, **changes), model=USUAL), groups, USUAL_OPTIM)
        found[name] = []
        for step in range(5):
            tokens = Rows.of(list(torch.randint(0, 128, (8, 65), generator=torch.Generator().manual_seed(1000 + step))))
            batch = Batch(tokens, {"loss_mask": tokens.replace(torch.ones_like(tokens.values))})
            found[name].append(engine.update(Squares("lm"), shard_of(batch, groups))["loss"])
    return found


def test_from_weights_of_the_usual_size_bf16_stays_within_5e_4_of_fp32_for_five_steps() -> None:
    """Absolutely; fp32 itself is within 1e-6 of plain torch (test_exactness.py).  docs/engine.md has the numbers."""
    for found in run_ranks(2, _usual_losses):
        exact = found.pop("fp32")
        for name, losses in found.items():
            apart = [abs(loss - truth) for loss, truth in zip(losses, exact, strict=True)]
            assert max(apart) < (1.5e-4 if name == "fp16" else 5e-4), (name, apart)


class Poisoned(Squares):
    """NaN (or a NaN gradient) in the pack that holds this row of this goal."""

    def __init__(self, goal: float, where: str) -> None:
        super().__init__("lm")
        self.goal, self.where = goal, where

    def __call__(self, outputs: dict[str, Tensor], batch: PackedBatch) -> LossTerms:
        terms = super().__call__(outputs, batch)
        if not (batch.per_row["goal"] == self.goal).any():
            return terms
        if self.where == "loss":
            return LossTerms(terms.loss * float("nan"), terms.metrics)
        return LossTerms(terms.loss + torch.sqrt((outputs["logprobs"] * 0).sum()), terms.metrics)


def _poisoned(parallel: ParallelConfig) -> dict[str, Any]:
    case = Case(parallel, EngineConfig(micro_batch_tokens=20))
    groups = make_groups(case)
    engine = make_engine(case, groups)
    batch = global_batch(0)
    engine.update(Squares("lm"), shard_of(batch, groups))
    before = _weights(engine)
    found: dict[str, Any] = {}
    for where in ("loss", "gradient"):
        with pytest.raises(NonFiniteError) as error:
            engine.update(Poisoned(float(batch.per_row["goal"][5]), where), shard_of(batch, groups))
        found[where] = str(error.value)
        assert not _changed(engine, before)
    masked = batch.with_fields({"loss_mask": batch.tokens.replace(torch.zeros_like(batch.tokens.values))})
    with pytest.raises(ValueError, match="weight 0"):
        engine.update(Squares("lm"), shard_of(masked, groups))
    assert not _changed(engine, before)
    assert engine.update(Squares("lm"), shard_of(batch, groups))["loss"] < 6  # and it goes on
    return found


@pytest.mark.parametrize("parallel", [ParallelConfig(), ParallelConfig(pp=2)], ids=["dp2", "pp2"])
def test_nan_and_nothing_to_learn_stop_every_rank_before_a_weight_is_touched(parallel: ParallelConfig) -> None:
    results = run_ranks(2, _poisoned, parallel)
    assert results[0] == results[1]
    shard, row = (1, 1) if parallel.pp == 1 else (0, 5)  # row 5 of 8
    assert "the loss is nan (data-parallel shard" in results[0]["loss"]
    assert f"data-parallel shard {shard}, micro-batch" in results[0]["loss"]
    assert f"{row}" in results[0]["loss"].split("rows [")[1].split("]")[0].split(", ")
    assert "the gradient norm is nan although the loss is" in results[0]["gradient"]


def _unchecked(parallel: ParallelConfig) -> list[dict[str, float]]:
    case = Case(parallel, EngineConfig(micro_batch_tokens=20, distributed_optimizer=True, check_for_nan=False))
    groups = make_groups(case)
    engine = make_engine(case, groups)
    batch = global_batch(0)
    before, found = _weights(engine), []
    for where in ("gradient", "loss"):
        found.append(engine.update(Poisoned(float(batch.per_row["goal"][5]), where), shard_of(batch, groups)))
        assert not _changed(engine, before)
    found.append(engine.update(Squares("lm"), shard_of(batch, groups)))
    assert all(value.isfinite().all() for value in _weights(engine).values())
    assert _changed(engine, before)
    return found


@pytest.mark.parametrize("parallel", [ParallelConfig(), ParallelConfig(pp=2)], ids=["dp2", "pp2"])
def test_unchecked_a_nan_is_skipped_and_reaches_no_weight(parallel: ParallelConfig) -> None:
    for found in run_ranks(2, _unchecked, parallel):
        assert [one["skipped"] for one in found] == [1.0, 1.0, 0.0]
        assert [math.isfinite(one["grad_norm"]) for one in found] == [False, False, True]
        assert len({one["lr"] for one in found}) == 1  # the schedule waits too


def _never_finite(scale: LossScaleConfig) -> tuple[int, str]:
    """Steps that a NaN gradient of a finite loss is taken for an overflow, and the error that ends it."""
    groups = make_groups(Case())
    engine = make_engine(Case(engine=replace(LOW, precision="fp16", loss_scale=scale)), groups)
    batch, before = global_batch(0), _weights(engine)
    poisoned = Poisoned(float(batch.per_row["goal"][5]), "gradient")
    for skipped in range(50):
        try:
            assert engine.update(poisoned, shard_of(batch, groups))["skipped"] == 1.0
        except NonFiniteError as error:
            assert not _changed(engine, before)
            return skipped, str(error)
    return 50, ""


@pytest.mark.parametrize(
    ("scale", "halvings"),
    [(LossScaleConfig(initial=4.0, minimum=1.0, hysteresis=1), 2), (LossScaleConfig(initial=64.0, window=0), 0)],
    ids=["dynamic", "constant"],
)
def test_fp16_gradients_that_are_no_numbers_at_any_scale_end_the_run(scale: LossScaleConfig, halvings: int) -> None:
    for skipped, said in run_ranks(2, _never_finite, scale):
        assert skipped == halvings + 9
        assert "the last 10 gradients in a row overflowed" in said
        assert "although the loss is" in said


class Skips(Squares):
    """An objective that has nothing to do with a pack without rows."""

    def __call__(self, outputs: dict[str, Tensor], batch: PackedBatch) -> LossTerms:
        if batch.num_rows == 0:
            return LossTerms(torch.zeros(()), {"output": torch.zeros(())})
        return super().__call__(outputs, batch)


def _few_rows(engines: list[EngineConfig], parallel: ParallelConfig) -> list[list[dict[str, float]]]:
    found = []
    for engine_config in engines:
        case = Case(parallel, engine_config)
        groups = make_groups(case)
        engine = make_engine(case, groups)
        found.append([engine.update(Skips("lm"), shard_of(global_batch(0).select([1]), groups)) for _ in range(3)])
    return found


def test_shards_without_rows_take_part() -> None:
    (truth,) = run_ranks(1, _few_rows, [LOW], ParallelConfig())[0]
    overlapped = replace(LOW, distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
    for world, parallel in ((2, ParallelConfig()), (4, ParallelConfig(pp=2, vpp=2))):
        for found in run_ranks(world, _few_rows, [LOW, overlapped], parallel):
            for steps in found:
                assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in truth], abs=2e-6)
                assert [step["grad_norm"] for step in steps] == pytest.approx(
                    [step["grad_norm"] for step in truth], rel=1e-5
                )


def _decay() -> dict[str, float]:
    """Weights after one step whose gradient is clipped to nothing: what is left is weight decay."""
    optim = OptimConfig(lr=0.1, weight_decay=0.5, clip_grad=1e-30, schedule="constant", eps=1.0)
    engine = make_engine(Case(), optim=optim)
    before = _weights(engine)
    engine.update(Squares("lm"), global_batch(0))
    return {name: float((value / before[name]).mean()) for name, value in _weights(engine).items()}


def test_weight_decay_is_for_matrices_only() -> None:
    (ratios,) = run_ranks(1, _decay)
    for name, ratio in ratios.items():
        assert ratio == pytest.approx(1.0 if "norm" in name else 0.95, abs=1e-6), name


def _unclipped() -> dict[str, float]:
    return make_engine(Case(), optim=replace(OPTIM, clip_grad=0.0)).update(Squares("lm"), global_batch(0))


def test_without_a_clip_the_norm_is_still_reported() -> None:
    assert run_ranks(1, _unclipped)[0]["grad_norm"] == pytest.approx(reference().grad_norms[0], rel=1e-5)


def _tied(parallel: ParallelConfig) -> list[dict[str, float]]:
    case = Case(parallel, LOW, model=replace(MODEL, tie_embeddings=True))
    groups = make_groups(case)
    engine = make_engine(case, groups)
    return [engine.update(Squares("lm"), shard_of(global_batch(step), groups)) for step in range(5)]


def test_tied_embeddings_train_alike_on_every_layout() -> None:
    truth = reference("lm", replace(MODEL, tie_embeddings=True))
    for parallel in (ParallelConfig(), ParallelConfig(pp=2), ParallelConfig(pp=2, vpp=2)):
        for steps in run_ranks(parallel.model_size, _tied, parallel):
            assert [step["loss"] for step in steps] == pytest.approx(truth.losses, abs=1e-6)
            assert [step["grad_norm"] for step in steps] == pytest.approx(truth.grad_norms, rel=1e-5)


class _Config:
    cross_entropy_loss_fusion = False
    gradient_accumulation_fusion = False


@pytest.mark.parametrize("name", ["cross_entropy_loss_fusion", "gradient_accumulation_fusion"])
def test_fusions_that_round_or_do_not_exist_are_refused(name: str) -> None:
    config = _Config()
    setattr(config, name, True)
    with pytest.raises(ValueError, match=name):
        _set_schedule(config, None)  # type: ignore[arg-type]


class Everywhere:
    """An objective that does not say which slots it reads."""

    def __init__(self, inner: Any) -> None:
        self.wants, self.temperature, self.weight, self.inner = inner.wants, 1.0, inner.weight, inner

    def __call__(self, outputs: dict[str, Tensor], batch: PackedBatch) -> LossTerms:
        return self.inner(outputs, batch)


def _selected() -> dict[str, Any]:
    groups = make_groups(Case())
    batch = shard_of(global_batch(0), groups)
    generator = torch.Generator().manual_seed(3)
    mask = (torch.rand(batch.num_tokens, generator=generator) < 0.4).long()
    batch = batch.with_fields({"loss_mask": batch.tokens.replace(mask)})
    engines = [make_engine(Case(engine=LOW), groups) for _ in range(2)]
    asked: list[int] = []
    real = heads.linear_logprob_partials

    def counted(*given: Any, mask_T: Tensor, **more: Any) -> Any:
        asked.append(int(mask_T.sum()))
        return real(*given, mask_T=mask_T, **more)

    heads.linear_logprob_partials = counted  # this process ends with the test
    metrics = [
        engine.update(objective, batch)
        for engine, objective in zip(engines, (NextToken(), Everywhere(NextToken())), strict=True)
    ]
    one, other = (_weights(engine) for engine in engines)
    far = max(float((one[name] - other[name]).abs().max()) for name in one)
    half, every = len(asked) // 2, batch.num_tokens - batch.num_rows
    carrying = sum(int(row[1:].sum()) for row in batch.per_token["loss_mask"].split())
    return {
        "metrics": metrics,
        "far": far,
        "asked": [sum(asked[:half]), sum(asked[half:])],
        "expected": [carrying, every],
    }


def test_the_head_computes_what_the_objective_reads_and_the_step_is_the_same() -> None:
    for found in run_ranks(2, _selected):
        few, all_of_them = found["metrics"]
        assert found["asked"] == found["expected"]
        for name in ("loss", "grad_norm", "weight"):
            assert few[name] == pytest.approx(all_of_them[name], rel=1e-6)
        assert found["far"] < 1e-6
