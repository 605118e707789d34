"""``model.fp8`` with stand-ins for Transformer Engine: who is told, and that every product has sizes it takes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.extensions import transformer_engine as te_extension
from megatron.core.extensions import transformer_engine_spec_provider as te_provider
from megatron.core.transformer import transformer_block
from torch import Tensor

from megatron_zj.config.model import ModelConfig
from megatron_zj.config.optim import EngineConfig
from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.models import providers, transformer_config
from tests.engine.training import MODEL, Case, SomeSquares, global_batch, make_engine, make_groups, shard_of
from tests.helpers.ranks import run_ranks
from tests.models.test_providers import Attention, Norm, NormColumn, Row

WITH_TE = replace(MODEL, kernels="te", ffn_hidden_size=64)  # a multiple of 16 on each of two tensor ranks


class Autocast:
    """Stands in for Transformer Engine's FP8 context: what it was asked for, and the shapes of the products inside."""

    def __init__(self) -> None:
        self.active = False
        self.asked: set[tuple[Any, ...]] = set()
        self.shapes: list[tuple[int, ...]] = []

    @contextlib.contextmanager
    def __call__(self, config: Any, layer: int = -1, is_init: bool = False) -> Iterator[None]:
        self.asked.add((config.fp8, config.fp8_recipe, config.bf16))
        self.active = True
        yield
        self.active = False

    def check(self, *operands: Tensor) -> None:
        """What Transformer Engine demands of both operands of an FP8 product, and of their transposes."""
        if not self.active:
            return
        for operand in operands:
            self.shapes.append(tuple(operand.shape))
            rows, columns = math.prod(operand.shape[:-1]), operand.shape[-1]
            assert rows % 16 == columns % 16 == 0, f"an FP8 product of {tuple(operand.shape)}"


def _checked(linear: type, autocast: Autocast) -> type:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        autocast.check(x, self.weight)
        return super(checked, self).forward(x, *args, **kwargs)

    checked = type(linear.__name__, (linear,), {"forward": forward})
    return checked


@contextlib.contextmanager
def transformer_engine() -> Iterator[Autocast]:
    """As if it were installed."""
    autocast = Autocast()
    found = {
        (providers, "find_spec"): lambda name: object(),
        (te_extension, "HAVE_TE"): True,
        (te_provider, "TELayerNormColumnParallelLinear"): _checked(NormColumn, autocast),
        (te_provider, "TERowParallelLinear"): _checked(Row, autocast),
        (te_provider, "TEDotProductAttention"): Attention,
        (te_provider, "TENorm"): Norm,
        (transformer_block, "get_fp8_context"): autocast,
    }
    with contextlib.ExitStack() as stack:
        for (module, name), value in found.items():
            stack.enter_context(mock.patch.object(module, name, value))
        yield autocast


def _train(model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    with transformer_engine() as autocast:
        case = Case(parallel, EngineConfig(micro_batch_tokens=40, precision="bf16"), model=model)
        groups = make_groups(case)
        engine = make_engine(case, groups)
        objective, batches = SomeSquares("lm"), [shard_of(global_batch(step), groups) for step in range(3)]
        found: dict[str, Any] = {"losses": [engine.update(objective, batch)["loss"] for batch in batches]}
        found["evaluated"] = engine.evaluate(objective, batches[0])["loss"]
        outputs = engine.infer(("logprobs",), batches[0], at="loss_mask")
        found["finite"] = outputs is None or bool(torch.isfinite(outputs["logprobs"].values).all())
        found["config"] = [(chunk.config.fp8, chunk.config.fp8_recipe) for chunk in engine.chunks]
    return {**found, "asked": autocast.asked, "products": len(autocast.shapes)}


def _both(fp8: Any, parallel: ParallelConfig) -> list[dict[str, Any]]:
    return [_train(model, parallel) for model in (replace(WITH_TE, fp8=fp8), WITH_TE)]


@pytest.mark.parametrize(
    ("fp8", "parallel"),
    [
        ("e4m3", ParallelConfig()),
        ("hybrid", ParallelConfig(tp=2, sequence_parallel=True)),
        ("hybrid", ParallelConfig(cp=2)),
    ],
    ids=["dp2", "tp2-sp", "cp2"],
)
def test_fp8_reaches_every_layer_with_sizes_it_takes(fp8: str, parallel: ParallelConfig) -> None:
    """Rows of 1 to 24 tokens: without padding, the first product of ragged rows would stop the run."""
    for found, without in run_ranks(2, _both, fp8, parallel):
        assert found["config"] == [(fp8, "tensorwise")]
        assert found["asked"] == {(fp8, "tensorwise", True)}
        assert found["products"] > 0
        assert without["config"] == [(None, "tensorwise")]
        assert without["products"] == 0
        # The stand-in rounds nothing, so the dummy rows alone could change a result.
        assert found["losses"] == pytest.approx(without["losses"], rel=2e-3)
        assert found["evaluated"] == pytest.approx(without["evaluated"], rel=2e-3)
        assert found["finite"]


def _refusal(model: ModelConfig, parallel: ParallelConfig, *, checked: bool) -> str:
    """What building and training says; empty: it trains."""
    unchecked = contextlib.nullcontext() if checked else mock.patch.object(transformer_config, "fp8_misfits", _none)
    try:
        with unchecked:
            _train(model, parallel)
    except (AssertionError, ValueError) as error:
        return str(error)
    return ""


def _none(*_: Any) -> tuple[()]:
    return ()


def _with_and_without_the_check(model: ModelConfig, parallel: ParallelConfig) -> tuple[str, str]:
    return _refusal(model, parallel, checked=True), _refusal(model, parallel, checked=False)


@pytest.mark.parametrize(
    ("changes", "tp", "setting"),
    [
        ({"hidden_size": 40, "head_dim": 4}, 1, "model.hidden_size"),
        ({"ffn_hidden_size": 56}, 1, "model.ffn_hidden_size"),
        ({"ffn_hidden_size": 48}, 2, "model.ffn_hidden_size"),
        ({"ffn_hidden_size": 48}, 1, None),
        ({"num_attention_heads": 4, "head_dim": 2}, 1, "model.head_dim"),
        ({"num_attention_heads": 4, "num_query_groups": 1, "head_dim": 4}, 1, "model.head_dim"),
        ({"num_query_groups": 2, "head_dim": 4}, 2, "model.head_dim"),
        ({"vocab_multiple": 1}, 1, None),  # 61 rows
    ],
)
def test_the_sizes_that_are_refused_are_those_no_fp8_product_takes(
    changes: dict[str, Any], tp: int, setting: str | None
) -> None:
    """Without the check a product meets the size; with it nothing is built."""
    model = replace(WITH_TE, fp8="hybrid", **changes)
    for told, met in run_ranks(tp, _with_and_without_the_check, model, ParallelConfig(tp=tp)):
        if setting is None:
            assert told == met == ""
        else:
            assert told.startswith(f"{setting}: "), told
            assert met.startswith("an FP8 product of"), met
