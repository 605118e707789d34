"""Forward passes: the head's answers, in row order, against the reference; evaluation; frozen engines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_zj.config.optim import EngineConfig
from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.data.batch import GROUP, Batch, Rows
from tests.engine.training import (
    MODEL,
    Case,
    Squares,
    global_batch,
    initial_weights,
    make_engine,
    make_groups,
    reference,
    shard_of,
)
from tests.helpers.ranks import run_ranks
from tests.helpers.reference_llama import ReferenceLlama


def _case(head: str, tokens: int = 40, **axes: Any) -> Case:
    return Case(ParallelConfig(**axes), EngineConfig(micro_batch_tokens=tokens), head)  # type: ignore[arg-type]


def _infer(case: Case, empty: bool) -> dict[str, Any]:
    groups = make_groups(case)
    engine = make_engine(case, groups, optim=None)
    batch = shard_of(global_batch(0).select([2, 1, 4, 0, 3][: 1 if empty else 5]), groups)
    # Rows 0 and 2 of a shard belong together, so packs do not hold the rows in order.
    batch = batch.with_fields(per_row={GROUP: torch.tensor([5, 6, 5, 6, 7][: batch.num_rows])})
    wants: Any = {"lm": ("logprobs", "entropy"), "value": ("values",), "score": ("scores",)}[case.head]
    found = engine.infer(wants, batch, temperature=0.7)
    objective = Squares(case.head)
    metrics = engine.evaluate(objective, batch) if not empty else {}
    with pytest.raises(ValueError, match="frozen"):
        engine.update(objective, batch)
    assert not any(parameter.requires_grad for chunk in engine.chunks for parameter in chunk.parameters())
    _compare(case, groups.is_last_stage, found, batch)
    return {"rows": batch.num_rows, "metrics": metrics}


def _several(cases: list[Case], empty: bool = False) -> list[dict[str, Any]]:
    return [_infer(case, empty) for case in cases]


@torch.no_grad()
def _compare(case: Case, last: bool, answers: Any, batch: Batch) -> None:
    if not last:
        assert answers is None
        return
    network = ReferenceLlama(MODEL, case.head, dtype=torch.float64, state=initial_weights(MODEL, case.head))
    for want, found in answers.items():
        if want == "scores":
            values, truth = found, network.outputs(batch.tokens.split(), want) if batch.num_rows else found[:0]
        else:
            assert found.lengths.tolist() == batch.tokens.lengths.tolist()
            values = found.values
            truth = network.outputs(batch.tokens.split(), want, 0.7) if batch.num_rows else values[:0]
        torch.testing.assert_close(values, truth.to(values.dtype), rtol=0, atol=2e-6)


def test_answers_of_one_and_two_ranks_are_the_references() -> None:
    single = [_case("lm"), _case("value"), _case("score"), _case("lm", 1)]
    alone = run_ranks(1, _several, single)[0]
    assert all(result["metrics"]["weight"] > 0 for result in alone)
    double = [
        _case("lm", tp=2, sequence_parallel=True),
        _case("lm", pp=2, vpp=2),
        _case("lm", cp=2),
        _case("value", cp=2),
        _case("score", cp=2),
        _case("score", pp=2),
        _case("lm"),
    ]
    by_rank = run_ranks(2, _several, double)
    same = {"lm": alone[0], "value": alone[1], "score": alone[2]}
    for index, case in enumerate(double):  # the batch's averages are the same everywhere, and on one rank
        assert by_rank[0][index]["metrics"] == by_rank[1][index]["metrics"]
        assert by_rank[0][index]["metrics"] == pytest.approx(same[case.head]["metrics"], abs=2e-6)


def test_a_shard_without_rows_answers_with_none() -> None:
    cases = [_case("lm"), _case("score"), _case("value")]
    by_rank = run_ranks(2, _several, cases, True)
    assert [[result["rows"] for result in results] for results in by_rank] == [[1, 1, 1], [0, 0, 0]]


def test_evaluation_is_the_loss_of_the_update_that_follows() -> None:
    result = run_ranks(1, _evaluate_then_update)[0]
    assert result[0]["loss"] == result[1]["loss"] == pytest.approx(reference().losses[0], abs=1e-6)


def _evaluate_then_update() -> tuple[Any, Any]:
    engine = make_engine(Case())
    return engine.evaluate(Squares("lm"), global_batch(0)), engine.update(Squares("lm"), global_batch(0))


def _at_some(case: Case) -> float:
    groups = make_groups(case)
    engine = make_engine(case, groups, optim=None)
    batch = shard_of(global_batch(0), groups)
    want: Any = {"lm": "logprobs", "value": "values"}[case.head]
    whole, some = engine.infer((want,), batch), engine.infer((want,), batch, at="loss_mask")
    if not groups.is_last_stage:
        return 0.0
    assert whole is not None
    assert some is not None
    asked = batch.per_token["loss_mask"].values.bool()
    assert 0 < int(asked.sum()) < len(asked)
    there, here = whole[want], some[want]
    assert isinstance(there, Rows)
    assert isinstance(here, Rows)
    assert case.head == "value" or not here.values[~asked].any()
    return float((there.values - here.values)[asked].abs().max())


def test_answers_at_some_tokens_are_those_of_all() -> None:
    for case in (_case("lm"), _case("value")):
        assert run_ranks(1, _at_some, case)[0] <= 1e-6
    for case in (_case("lm", tp=2), _case("lm", tp=2, sequence_parallel=True), _case("lm", pp=2), _case("value", cp=2)):
        assert max(run_ranks(2, _at_some, case)) <= 1e-6
    with pytest.raises(AssertionError, match=r"no per-token field 'loss_masc'; theirs: goal, loss_mask"):
        run_ranks(1, _at_nothing)


def _slots_of_scores() -> tuple[int, int]:
    """Of the last layer's MLP, for scores alone; and the rows."""
    engine, seen = make_engine(_case("score"), optim=None), []
    mlp = engine.chunks[-1].decoder.layers[-1].mlp
    mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[0]))
    engine.infer(("scores",), global_batch(0))
    return sum(seen), global_batch(0).num_rows


def test_scores_cost_the_last_layer_one_slot_a_row() -> None:
    slots, rows = run_ranks(1, _slots_of_scores)[0]
    assert slots == rows


def _scores_beside_values() -> list[Tensor]:
    engine = make_engine(_case("score"), optim=None)
    asked = [
        engine.infer(wants, global_batch(0), at=at)
        for wants, at in ((("scores",), None), (("scores", "values"), "loss_mask"), (("values", "scores"), None))
    ]
    return [found["scores"] for found in asked if found is not None]


def test_scores_are_read_at_the_last_tokens_whatever_else_is_asked_for() -> None:
    alone, some, beside = run_ranks(1, _scores_beside_values)[0]
    torch.testing.assert_close(some, alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(beside, alone, rtol=0, atol=1e-6)


def _at_nothing() -> None:
    make_engine(Case(), optim=None).infer(("logprobs",), global_batch(0), at="loss_masc")
