"""``model.kernels=te``: a clear error without Transformer Engine, its modules with stand-ins for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_zj.config.optim import EngineConfig
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.data.packing import pack, unpack
from megatron_zj.models import providers
from megatron_zj.models.blocks import PackedAttention, RmsNorm
from megatron_zj.models.canonical import read_stage, write_stage
from megatron_zj.models.llama import build_stages
from megatron_zj.parallel.groups import ParallelGroups
from tests.helpers.reference_llama import ReferenceLlama
from tests.models.layouts import TINY, make_rows

from megatron.core.extensions import transformer_engine as te_extension  # isort: skip
from megatron.core.extensions import transformer_engine_spec_provider as te_provider  # isort: skip
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear  # isort: skip

WITH_TE = replace(TINY, kernels="te")


class NormColumn(ColumnParallelLinear):
    """Stands in for TELayerNormColumnParallelLinear: the norm's weight is the linear's."""

    def __init__(self, *args: Any, config: Any, **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)
        self.layer_norm_weight = nn.Parameter(torch.empty(config.hidden_size))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = config.layernorm_epsilon

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        normed = nn.functional.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps)
        return super().forward(normed, *args, **kwargs)


class Row(RowParallelLinear):
    """Stands in for TERowParallelLinear."""


class Attention(PackedAttention):
    """Stands in for TEDotProductAttention; refuses what that one does not take."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Tensor:
        assert set(kwargs) == {"attn_mask_type", "packed_seq_params"}
        assert attention_mask is None
        assert kwargs["packed_seq_params"].qkv_format == "thd"
        return super().forward(query, key, value, packed_seq_params=kwargs["packed_seq_params"])


class Norm(RmsNorm):
    """Stands in for TENorm."""


def test_te_without_transformer_engine_says_what_to_do(groups: ParallelGroups) -> None:
    with pytest.raises(ValueError, match=r"(?s)needs Transformer Engine.*not installed.*model.kernels=auto"):
        build_stages(WITH_TE, "lm", groups, EngineConfig(), "cpu", 0)


def test_te_that_megatron_core_cannot_use_says_so(groups: ParallelGroups, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match=r"megatron-core .* cannot use it"):
        build_stages(WITH_TE, "lm", groups, EngineConfig(), "cpu", 0)


def test_te_builds_megatron_core_s_transformer_engine_modules(
    groups: ParallelGroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers, "find_spec", lambda name: object())
    monkeypatch.setattr(te_extension, "HAVE_TE", True)
    monkeypatch.setattr(te_provider, "TELayerNormColumnParallelLinear", NormColumn)
    monkeypatch.setattr(te_provider, "TERowParallelLinear", Row)
    monkeypatch.setattr(te_provider, "TEDotProductAttention", Attention)
    monkeypatch.setattr(te_provider, "TENorm", Norm)
    (stage,) = build_stages(WITH_TE, "lm", groups, EngineConfig(), "cpu", 0)
    layer = stage.decoder.layers[0]
    assert type(layer.self_attention.linear_qkv) is type(layer.mlp.linear_fc1) is NormColumn
    assert type(layer.self_attention.linear_proj) is type(layer.mlp.linear_fc2) is Row
    assert type(layer.self_attention.core_attention) is Attention
    assert type(stage.decoder.final_layernorm) is Norm
    reference = ReferenceLlama(TINY, seed=3, spread=5.0)
    state = reference.state_dict()
    write_stage([stage], groups, lambda name: state[name])
    assert set(read_stage([stage], groups)) == set(state)
    rows = make_rows(TINY)
    packed = pack(Batch(Rows.of(rows)), range(len(rows)))
    found = unpack(stage(packed, ("logprobs",))["logprobs"], packed).values
    torch.testing.assert_close(found, reference.outputs(rows, "logprobs"), rtol=0, atol=1e-5)


def test_norms_are_saved_under_the_keys_that_transformer_engine_s_fused_modules_use(groups: ParallelGroups) -> None:
    ours = build_stages(TINY, "lm", groups, EngineConfig(), "cpu", 0)[0].sharded_state_dict()
    keys = {entry.key for name, entry in ours.items() if "norm" in name}
    assert keys == {
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.mlp.linear_fc1.layer_norm_weight",
        "decoder.final_layernorm.weight",
    }
