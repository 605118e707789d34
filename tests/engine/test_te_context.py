"""``model.kernels=te`` under context parallelism, with a stand-in that knows of a pack what Transformer Engine knows.

By its documentation and its ``AttnFuncWithCPAndKVP2P``: ``cu_seqlens`` are the whole pack's, each rank holds blocks r
and 2 cp - 1 - r of every sequence, and lengths are multiples of 2 cp.  Our own ``PackedLayout.context`` it never sees.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine_spec_provider as te_provider
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_zj.config.parallel import ParallelConfig
from tests.engine.test_fp8 import WITH_TE, transformer_engine
from tests.engine.training import Case, reference, train
from tests.helpers.ranks import run_ranks

CASES = [
    Case(ParallelConfig(cp=2), ranks=2, model=WITH_TE),
    Case(ParallelConfig(cp=2, tp=2, sequence_parallel=True), ranks=4, model=WITH_TE),
    Case(ParallelConfig(cp=4), ranks=4, model=WITH_TE),
]


class ContextAttention(MegatronModule):  # type: ignore[misc]
    """TEDotProductAttention's signatures; no argument beside those it takes."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = "p2p",
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        assert pg_collection is not None
        assert cp_comm_type in (None, "p2p")  # it takes None for p2p
        assert config.context_parallel_size == pg_collection.cp.size()
        self.cp_group, self.tp_group, self.softmax_scale = pg_collection.cp, pg_collection.tp, softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        assert packed_seq_params is not None
        assert attn_mask_type == AttnMaskType.causal
        pack = {field.name: getattr(packed_seq_params, field.name) for field in dataclasses.fields(PackedSeqParams)}
        assert pack["cp_group"] is pack["local_cp_size"] is None  # these would regroup it
        assert pack["qkv_format"] == "thd"
        ends = pack["cu_seqlens_q"].tolist()
        assert pack["cu_seqlens_q"].dtype == torch.int32
        assert ends == pack["cu_seqlens_kv"].tolist()
        for padded in (pack["cu_seqlens_q_padded"], pack["cu_seqlens_kv_padded"]):
            assert padded is None or padded.tolist() == ends
        longest = max(end - start for start, end in pairwise(ends))
        assert pack["max_seqlen_q"] == pack["max_seqlen_kv"] == longest
        return self._attend(query, key, value, ends).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, ends: list[int]) -> Tensor:
        ranks, rank = self.cp_group.size(), self.cp_group.rank()
        assert query.shape[0] * ranks == ends[-1]
        whole = [gather_from_sequence_parallel_region(part, group=self.cp_group) for part in (key, value)]
        keys, values = ([*part.split(query.shape[0])] for part in whole)  # of each rank
        share, found = query.shape[1] // key.shape[1], []
        for start, end in pairwise(ends):
            assert (end - start) % (2 * ranks) == 0
            mine, block = slice(start // ranks, end // ranks), (end - start) // (2 * ranks)
            held = [_positions(one, ranks, block) for one in range(ranks)]
            places = torch.cat(held)
            seen = places[None] <= held[rank][:, None]
            k, v = (torch.cat([part[mine] for part in parts]).repeat_interleave(share, 1) for parts in (keys, values))
            q, k, v = (part.transpose(0, 1) for part in (query[mine], k, v))
            found.append(F.scaled_dot_product_attention(q, k, v, seen, scale=self.softmax_scale).transpose(0, 1))
        return torch.cat(found)


def _positions(rank: int, ranks: int, block: int) -> Tensor:
    """In the sequence, of what a rank holds of it."""
    first, second = rank * block, (2 * ranks - 1 - rank) * block
    return torch.cat([torch.arange(first, first + block), torch.arange(second, second + block)])


def _train(case: Case) -> tuple[int, dict[str, Any]]:
    calls = mock.Mock()

    class Counted(ContextAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            calls()
            return super().forward(*args, **kwargs)

    with transformer_engine(), mock.patch.object(te_provider, "TEDotProductAttention", Counted):
        found = train(case)
    assert dist.get_world_size() == case.ranks
    return calls.call_count, found


@pytest.mark.parametrize("case", CASES, ids=["cp2", "cp2-tp2-sp", "cp4"])
def test_training_with_te_under_context_parallelism_is_exact_by_what_te_is_told_of_a_pack(case: Case) -> None:
    reference(case.head, case.model)  # once, here: the ranks inherit it
    for calls, found in run_ranks(case.ranks, _train, case):
        assert calls > 0
        assert found["loss"] <= 1e-6
        assert found["grad_norm"] <= 1e-5
        assert found["gradient"][0] <= 2e-7
        assert found["weights"][0] <= 5e-5
