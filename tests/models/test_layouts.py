"""Outputs and every parameter's gradient equal the plain-torch reference, whatever the layout and the head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from megatron_zj.config.model import RopeScalingConfig
from megatron_zj.config.optim import EngineConfig
from megatron_zj.config.parallel import ParallelConfig
from tests.helpers.ranks import run_ranks
from tests.models.layouts import TINY, Case, heads_of, run_cases

TIED = replace(TINY, tie_embeddings=True)
FEW_ROWS = replace(TINY, vocab_size=60)  # 64 padded rows: with tp=4 the last rank's shard is mostly padding
LLAMA3 = RopeScalingConfig(kind="llama3", factor=8.0, original_max_position_embeddings=16)


def recompute(kind: str, *modules: str) -> EngineConfig:
    return EngineConfig(recompute=kind, recompute_modules=modules or ("core_attn",))  # type: ignore[arg-type]


ONE = [
    *heads_of(Case("one rank")),
    Case("mha", model=replace(TINY, num_query_groups=None)),
    Case("mqa and wide heads", model=replace(TINY, num_query_groups=1, head_dim=16)),
    Case("tied", model=TIED),
    Case("linear scaling", model=replace(TINY, rope_scaling=RopeScalingConfig(kind="linear", factor=4.0))),
    Case("llama3 scaling", model=replace(TINY, rope_theta=5e5, rope_scaling=LLAMA3)),
    Case("temperature", temperature=0.7),
    Case("full recompute", engine=recompute("full")),
    Case("core_attn recompute", engine=recompute("selective", "core_attn")),
    Case("mlp recompute", engine=recompute("selective", "mlp")),
    Case("layernorm recompute", engine=recompute("selective", "layernorm")),
    Case("all recompute", engine=recompute("selective", "core_attn", "mlp", "layernorm")),
]
SP2 = ParallelConfig(tp=2, sequence_parallel=True)
PP2 = ParallelConfig(pp=2)
TWO = [
    *heads_of(Case("tp2", ParallelConfig(tp=2))),
    *heads_of(Case("tp2 sp", SP2)),
    *heads_of(Case("pp2", PP2)),
    *heads_of(Case("cp2", ParallelConfig(cp=2))),
    Case("dp2", ParallelConfig()),
    Case("tp2 tied", ParallelConfig(tp=2), model=TIED),
    Case("pp2 tied", PP2, model=TIED),
    Case("pp2 vpp2", ParallelConfig(pp=2, vpp=2)),
    Case("pp2 vpp2 tied", ParallelConfig(pp=2, vpp=2), model=TIED),
    Case("tp2 sp all recompute", SP2, engine=recompute("selective", "core_attn", "mlp", "layernorm")),
    Case("tp2 sp full recompute", SP2, engine=recompute("full")),
    Case("pp2 full recompute", PP2, engine=recompute("full")),
    Case("cp2 full recompute", ParallelConfig(cp=2), engine=recompute("full")),
    Case("tp2 temperature", ParallelConfig(tp=2), temperature=0.7),
]
FOUR = [
    *heads_of(Case("tp2 pp2", ParallelConfig(tp=2, pp=2))),
    *heads_of(Case("tp2 cp2 sp", ParallelConfig(tp=2, cp=2, sequence_parallel=True))),
    Case("tp2 pp2 sp", ParallelConfig(tp=2, pp=2, sequence_parallel=True)),
    Case("tp2 pp2 tied", ParallelConfig(tp=2, pp=2), model=TIED),
    Case("pp2 cp2 score", ParallelConfig(pp=2, cp=2), head="score"),
    Case("cp4", ParallelConfig(cp=4)),
    Case("tp4 padding", ParallelConfig(tp=4), model=replace(FEW_ROWS, vocab_size=33, num_query_groups=4)),
]


@pytest.mark.parametrize(("world", "cases"), [(1, ONE), (2, TWO), (4, FOUR)], ids=["world1", "world2", "world4"])
def test_outputs_and_gradients_equal_the_reference(world: int, cases: Sequence[Case]) -> None:
    ranks = run_ranks(world, run_cases, cases, world, timeout=120.0)
    failures = []
    for case in cases:
        seen: set[str] = set()
        for rank, outcomes in enumerate(ranks):
            outcome = outcomes[case.name]
            seen |= set(outcome.gradients)
            if outcome.outputs is not None and not outcome.outputs <= 1e-5:
                failures.append(f"{case.name}, rank {rank}: outputs differ by {outcome.outputs:.1e}")
            for name, difference in outcome.gradients.items():
                if not difference <= 1e-5:  # relative to the largest entry of the tensor's gradient
                    failures.append(f"{case.name}, rank {rank}: gradient of {name} differs by {difference:.1e}")
        expected_layers = {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(case.model.num_layers)}
        assert expected_layers <= seen, f"{case.name}: gradients of {expected_layers - seen} were not compared"
        assert any(outcomes[case.name].outputs is not None for outcomes in ranks), case.name
    assert not failures, "\n".join(failures)
