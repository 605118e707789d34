"""The map between Hugging Face's names and megatron-core's parameters, and initial weights keyed by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_zj.config.optim import EngineConfig
from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.models import canonical
from megatron_zj.models.canonical import (
    CanonicalTensor,
    canonical_tensors,
    fuse_gate_up,
    fuse_qkv,
    initial_tensor,
    read_stage,
    shard,
    split_gate_up,
    split_qkv,
    write_stage,
)
from megatron_zj.models.llama import build_stages
from tests.helpers.ranks import run_ranks
from tests.helpers.reference_llama import ReferenceLlama
from tests.models.layouts import TINY, make_groups


def test_linear_qkv_holds_each_group_s_queries_then_key_then_value() -> None:
    # 4 query heads, 2 key/value heads, heads of 2 rows; a row is named by 100 * matrix + its index.
    query, key, value = (100.0 * matrix + torch.arange(rows)[:, None] for matrix, rows in ((1, 8), (2, 4), (3, 4)))
    fused = fuse_qkv(query, key, value, num_groups=2)
    expected = [100, 101, 102, 103, 200, 201, 300, 301, 104, 105, 106, 107, 202, 203, 302, 303]
    assert fused[:, 0].tolist() == expected
    for whole, part in zip((query, key, value), split_qkv(fused, 2, 2), strict=True):
        assert torch.equal(whole, part)
    halves = [fuse_qkv(*(part.chunk(2)[rank] for part in (query, key, value)), num_groups=1) for rank in (0, 1)]
    assert torch.equal(torch.cat(halves), fused), "tensor-parallel shards of the whole are the fused shards"


def test_linear_fc1_holds_gate_then_up() -> None:
    gate, up = torch.zeros(3, 1), torch.ones(3, 1)
    assert fuse_gate_up(gate, up)[:, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert all(torch.equal(a, b) for a, b in zip((gate, up), split_gate_up(fuse_gate_up(gate, up)), strict=True))


@pytest.mark.parametrize("head", ["lm", "value", "score"])
@pytest.mark.parametrize("tied", [False, True])
def test_canonical_names_and_shapes_are_the_reference_s(head: Any, tied: bool) -> None:
    model = replace(TINY, tie_embeddings=tied, head_dim=16)
    expected = {name: tuple(tensor.shape) for name, tensor in ReferenceLlama(model, head).state_dict().items()}
    assert {tensor.name: tensor.shape for tensor in canonical_tensors(model, head)} == expected


def test_initial_weights_follow_megatron_and_depend_on_seed_and_name_only() -> None:
    model = replace(TINY, hidden_size=128, ffn_hidden_size=256)
    tensors = {tensor.name: tensor for tensor in canonical_tensors(model, "score")}
    drawn = {name: initial_tensor(tensor, model, 7) for name, tensor in tensors.items()}
    for name, value in drawn.items():
        again, other = initial_tensor(tensors[name], model, 7), initial_tensor(tensors[name], model, 8)
        assert torch.equal(value, again)
        if "norm" in name:
            assert torch.equal(value, torch.ones_like(value))
        elif name.endswith("bias"):
            assert torch.equal(value, torch.zeros_like(value))
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / (2 * model.num_layers) ** 0.5 if residual else 0.02
            assert float(value.std()) == pytest.approx(std, rel=0.3 if value.numel() < 1000 else 0.05)
            assert not torch.equal(value, other)
    assert not torch.equal(drawn["model.layers.0.mlp.gate_proj.weight"], drawn["model.layers.1.mlp.gate_proj.weight"])


LAYOUTS = [
    (1, ParallelConfig()),
    (2, ParallelConfig(pp=2, vpp=2)),
    (4, ParallelConfig(tp=2, pp=2, sequence_parallel=True)),
    (4, ParallelConfig(tp=2, cp=2)),
]


def check_initial_weights(parallel: ParallelConfig, world: int) -> list[str]:
    groups = make_groups(parallel, world)
    checked = []
    for head in ("lm", "value", "score"):
        chunks = build_stages(TINY, head, groups, EngineConfig(), "cpu", 11)  # type: ignore[arg-type]
        tensors = {tensor.name: tensor for tensor in canonical_tensors(TINY, head)}  # type: ignore[arg-type]
        for name, part in read_stage(chunks, groups).items():
            whole = initial_tensor(tensors[name], TINY, 11)
            expected = shard(whole, tensors[name].tp_dim, groups.tp_size, groups.tp_rank)
            assert torch.equal(part, expected), f"{head}: {name}"
            checked.append(f"{head} {name}")
    return checked


@pytest.mark.parametrize(("world", "parallel"), LAYOUTS)
def test_initial_weights_are_the_same_bits_on_every_layout(world: int, parallel: ParallelConfig) -> None:
    checked = {name for names in run_ranks(world, check_initial_weights, parallel, world) for name in names}
    for head in ("lm", "value", "score"):
        names = {f"{head} {tensor.name}" for tensor in canonical_tensors(TINY, head)}  # type: ignore[arg-type]
        assert names <= checked


def check_awaiting(parallel: ParallelConfig, world: int) -> list[str]:
    groups, real = make_groups(parallel, world), canonical.initial_tensor
    drawn: list[str] = []

    def counted(tensor: CanonicalTensor, *args: Any) -> torch.Tensor:
        drawn.append(tensor.name)
        return real(tensor, *args)

    canonical.initial_tensor = counted  # this process ends with the test
    for head in ("lm", "value", "score"):
        chunks = build_stages(TINY, head, groups, EngineConfig(), "cpu", 11, awaits_weights=True)  # type: ignore[arg-type]
        for name, part in read_stage(chunks, groups).items():
            assert part.isnan().all() or name in drawn, name
    return drawn


def test_a_model_whose_weights_come_next_draws_a_scalar_head_alone() -> None:
    drawn = run_ranks(2, check_awaiting, ParallelConfig(tp=2), 2)
    assert drawn == [["value_head.weight", "score_head.weight", "score_head.bias"]] * 2


def check_round_trip(parallel: ParallelConfig, world: int) -> dict[str, Any]:
    groups = make_groups(parallel, world)
    chunks = build_stages(TINY, "lm", groups, EngineConfig(), "cpu", 0)
    state = ReferenceLlama(TINY, seed=9).state_dict()
    write_stage(chunks, groups, lambda name: state[name])
    with pytest.raises(ValueError, match=r"has shape \(3,\), the model needs"):
        write_stage(chunks, groups, lambda name: torch.zeros(3))
    return {name: tensor.numpy().copy() for name, tensor in read_stage(chunks, groups).items()}


def test_what_is_written_is_read_back_in_shards() -> None:
    state = ReferenceLlama(TINY, seed=9).state_dict()
    dims = {tensor.name: tensor.tp_dim for tensor in canonical_tensors(TINY, "lm")}
    parts = run_ranks(2, check_round_trip, ParallelConfig(tp=2), 2)
    for name, whole in state.items():
        dim = dims[name]
        shards = [torch.from_numpy(part[name]) for part in parts]
        rebuilt = shards[0] if dim is None else torch.cat(shards, dim=dim)
        assert torch.equal(rebuilt, whole), name
