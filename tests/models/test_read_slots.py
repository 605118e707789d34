"""The layer before the head computes for the slots that are read alone, and they come out as if for all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_zj.config.optim import EngineConfig
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.data.packing import PackedBatch, pack
from megatron_zj.models.canonical import write_stage
from megatron_zj.models.llama import LlamaStage, build_stages
from megatron_zj.parallel.groups import ParallelGroups
from tests.helpers.reference_llama import ReferenceLlama
from tests.models.layouts import TINY, make_rows


def build(groups: ParallelGroups, head: Any, **engine: Any) -> LlamaStage:
    (stage,) = build_stages(TINY, head, groups, EngineConfig(**engine), "cpu", 0)
    state = ReferenceLlama(TINY, head, seed=3, spread=5.0).state_dict()
    write_stage([stage], groups, lambda name: state[name])
    return stage


def packed_rows() -> PackedBatch:
    return pack(Batch(Rows.of(make_rows(TINY))), range(3))


def every(packed: PackedBatch, step: int) -> Tensor:
    """Every ``step``-th slot that has a target."""
    return packed.targets.nonzero().squeeze(1)[::step]


def widths(stage: LlamaStage) -> list[int]:
    """Filled at each forward pass: the slots that each layer's MLP was given."""
    seen: list[int] = []
    for layer in stage.decoder.layers:
        layer.mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[0]))
    return seen


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("head", ["lm", "value", "score"])
def test_what_is_read_and_its_gradients_do_not_change(groups: ParallelGroups, head: Any, recompute: Any) -> None:
    whole = packed_rows()
    modules = {"recompute_modules": ("layernorm", "core_attn", "mlp")} if recompute == "selective" else {}
    stage = build(groups, head, recompute=recompute, **modules)
    want = {"lm": "logprobs", "value": "values", "score": "scores"}[head]
    read = whole.last if head == "score" else every(whole, 3)
    found = []
    for packed in (whole, replace(whole, read=read)):
        output = stage(packed, (want,))[want]
        picked = output if head == "score" else output[read]
        slope = torch.linspace(-1, 2, len(picked))
        stage.zero_grad()
        (picked * slope).sum().backward()
        found.append((picked.detach(), {name: one.grad.clone() for name, one in stage.named_parameters()}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-6)
    for name, gradient in found[0][1].items():  # sums over tokens, in another order
        torch.testing.assert_close(gradient, found[1][1][name], rtol=1e-5, atol=2e-6 * float(gradient.abs().max()))
    assert all(float(gradient.abs().max()) > 0 for gradient in found[1][1].values())


def test_the_last_layer_alone_is_narrow(groups: ParallelGroups) -> None:
    whole, stage = packed_rows(), build(groups, "lm")
    seen, slots = widths(stage), len(whole.tokens)
    narrow = stage(replace(whole, read=every(whole, 4)), ("logprobs",))["logprobs"]
    assert seen == [slots] * (TINY.num_layers - 1) + [len(every(whole, 4))]
    others = torch.ones(slots, dtype=torch.bool).index_fill(0, every(whole, 4), False)
    assert not narrow[others].any()
    assert narrow[~others].all()


def test_all_slots_are_computed_where_nearly_all_are_read_and_one_where_none_is(groups: ParallelGroups) -> None:
    whole, stage = packed_rows(), build(groups, "lm")
    seen, slots = widths(stage), len(whole.tokens)
    for read in (every(whole, 1), every(whole, 1)[:0]):
        outputs = stage(replace(whole, read=read), ("logprobs",))["logprobs"]
        assert int(outputs.count_nonzero()) == len(read)
    assert seen == [slots] * (TINY.num_layers * 2 - 1) + [1]
