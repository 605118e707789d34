"""fp32 training on every layout equals an independent plain-torch LLaMA: losses, norms, every gradient, weights."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from megatron_zj.config.optim import EngineConfig
from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.models.canonical import canonical_tensors
from tests.engine.training import Case, reference, train_all, with_engine
from tests.helpers.ranks import Start, run_ranks

BASE = Case()
DIST = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}


def _layout(ranks: int, head: str = "lm", sp: bool = False, **axes: int) -> Case:
    parallel = ParallelConfig(**axes, sequence_parallel=sp)
    return Case(parallel, EngineConfig(micro_batch_tokens=32), head, ranks)  # type: ignore[arg-type]


def check(cases: list[Case], timeout: float = 240.0, start: Start = "fork") -> None:
    """Train all the cases, which need equally many ranks and one device, and compare each rank's numbers."""
    for head, model in {(case.head, case.model) for case in cases}:
        reference(head, model)  # once, here: forked ranks inherit it
    ranks, device = cases[0].ranks, cases[0].device
    by_rank = run_ranks(ranks, train_all, cases, timeout=timeout, device=device, start=start)
    for index, case in enumerate(cases):
        results: list[dict[str, Any]] = [results[index] for results in by_rank]
        covered: set[str] = set()
        for rank, result in enumerate(results):
            where = f"{case.name()} on rank {rank}: { ({key: result[key] for key in result if key != 'names'}) }"
            assert result["history"] == results[0]["history"], f"ranks disagree: {where}"
            assert result["loss"] <= 1e-6, where
            assert result["output"] <= 2e-6, where
            assert result["grad_norm"] <= 1e-5, where
            assert result["gradient"][0] <= 2e-7, where
            assert result["weights"][0] <= (1e-5 if case.head == "score" else 5e-5), where
            covered |= set(result["names"])
        assert covered == {tensor.name for tensor in canonical_tensors(case.model, case.head)}, case.name()


def test_one_rank_whatever_the_micro_batches_and_recompute() -> None:
    check(
        [
            with_engine(BASE, micro_batch_tokens=tokens, recompute=recompute)
            for tokens, recompute in ((1, "none"), (20, "full"), (32, "selective"), (4096, "none"))
        ]
    )


def _some(*cases: Case) -> list[Case]:
    return [replace(case, reads_some=True) for case in cases]


def test_an_objective_that_reads_some_slots_only() -> None:
    selective = {"recompute": "selective", "recompute_modules": ("layernorm", "core_attn", "mlp")}
    check(_some(BASE, with_engine(BASE, recompute="full", micro_batch_tokens=20), with_engine(BASE, **selective)))
    check(_some(_layout(2, tp=2), _layout(2, tp=2, sp=True), _layout(2, pp=2), _layout(2, pp=2, vpp=2)))
    check(
        _some(_layout(2, cp=2), with_engine(_layout(2), **DIST), _layout(2, "value", tp=2), _layout(2, "value", cp=2))
    )


@pytest.mark.parametrize("head", ["value", "score"])
def test_scalar_heads_on_two_ranks(head: str) -> None:
    check([_layout(2, head, tp=2, sp=True), _layout(2, head, pp=2), _layout(2, head, cp=2), _layout(2, head)])


def test_two_ranks() -> None:
    check(
        [
            _layout(2, tp=2),
            _layout(2, tp=2, sp=True),
            _layout(2, pp=2),
            _layout(2, pp=2, vpp=2),
            _layout(2, cp=2),
            _layout(2),
            with_engine(_layout(2), **DIST),
        ]
    )


def test_four_ranks() -> None:
    check(
        [
            _layout(4, tp=4, sp=True),
            _layout(4, pp=4),
            with_engine(_layout(4, pp=2, vpp=2, tp=2), recompute="full"),
            with_engine(_layout(4, tp=2, sp=True), **DIST),
            with_engine(_layout(4, cp=2), distributed_optimizer=True),
        ]
    )


def _matrix() -> dict[int, list[Case]]:
    cases: dict[int, list[Case]] = defaultdict(list)
    layouts = [
        (tp, pp, vpp, cp, dp)
        for tp, pp, vpp, cp, dp in product((1, 2, 4), (1, 2, 4), (1, 2), (1, 2), (1, 2))
        if tp * pp * cp * dp in (1, 2, 4, 8) and not (vpp == 2 and pp != 2)
    ]
    for tp, pp, vpp, cp, dp in layouts:
        ranks = tp * pp * cp * dp
        for sp in (False, True) if tp > 1 else (False,):
            plain = _layout(ranks, sp=sp, tp=tp, pp=pp, vpp=vpp, cp=cp)
            cases[ranks].append(plain)
            if dp > 1 or cp > 1:
                cases[ranks] += [with_engine(plain, distributed_optimizer=True), with_engine(plain, **DIST)]
                cases[ranks].append(with_engine(plain, overlap_grad_reduce=True))
            if ranks <= 4:
                for recompute, tokens in (("full", 24), ("selective", 48)):
                    cases[ranks].append(with_engine(plain, recompute=recompute, micro_batch_tokens=tokens))
                cases[ranks] += [_layout(ranks, head, sp, tp=tp, pp=pp, vpp=vpp, cp=cp) for head in ("value", "score")]
            cases[ranks] += _some(plain, _layout(ranks, "value", sp, tp=tp, pp=pp, vpp=vpp, cp=cp))
    return cases


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_whole_matrix(ranks: int) -> None:
    cases = _matrix()[ranks]
    for start in range(0, len(cases), 8):
        check(cases[start : start + 8], timeout=900.0)
