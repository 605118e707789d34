"""The model on one rank: Hugging Face's logits, precision, decoding, recompute, clear errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_zj.config.model import ModelConfig, RopeScalingConfig
from megatron_zj.config.optim import EngineConfig
from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.data.packing import pack, unpack
from megatron_zj.models import blocks
from megatron_zj.models.canonical import write_stage
from megatron_zj.models.llama import LlamaStage, build_stages
from megatron_zj.models.packed import context_layout
from megatron_zj.models.transformer_config import check_layout, transformer_config
from megatron_zj.parallel.groups import ParallelGroups
from tests.helpers.hf_llama import hf_llama
from tests.helpers.reference_llama import ReferenceLlama
from tests.models.layouts import TINY, make_rows

LLAMA3 = RopeScalingConfig(kind="llama3", factor=8.0, original_max_position_embeddings=16)
SHAPES = {
    "mha": replace(TINY, num_query_groups=None),
    "gqa": TINY,
    "tied": replace(TINY, tie_embeddings=True),
    "linear": replace(TINY, rope_scaling=RopeScalingConfig(kind="linear", factor=4.0)),
    "llama3": replace(TINY, rope_theta=5e5, rope_scaling=LLAMA3),
}


def build(groups: ParallelGroups, model: ModelConfig, head: Any = "lm", **engine: Any) -> LlamaStage:
    """One stage with the reference's weights (spread wide, so that logits differ)."""
    (stage,) = build_stages(model, head, groups, EngineConfig(**engine), "cpu", 0)
    state = ReferenceLlama(model, head, seed=3, spread=5.0).state_dict()
    write_stage([stage], groups, lambda name: state[name])
    return stage


@pytest.mark.parametrize("shape", SHAPES)
def test_logprobs_of_a_pack_equal_hugging_face_row_by_row(groups: ParallelGroups, shape: str) -> None:
    model = SHAPES[shape]
    stage = build(groups, model)
    network = hf_llama(model, ReferenceLlama(model, seed=3, spread=5.0).state_dict(), torch.float32)
    rows = make_rows(model)
    packed = pack(Batch(Rows.of(rows)), range(len(rows)))
    with torch.no_grad():
        found = unpack(stage(packed, ("logprobs",))["logprobs"], packed).split()
        for row, given in zip(rows, found, strict=True):
            logits = network(row[None]).logits[0, :, : model.vocab_size]
            expected = torch.log_softmax(logits, -1)[:-1].gather(1, row[1:, None])[:, 0]
            torch.testing.assert_close(given[1:], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(("head", "want"), [("lm", "logprobs"), ("value", "values"), ("score", "scores")])
def test_half_precision_is_close_and_gives_fp32_outputs(
    groups: ParallelGroups, precision: str, head: Any, want: Any
) -> None:
    rows = make_rows(TINY)
    packed = pack(Batch(Rows.of(rows)), range(len(rows)))
    stage = build(groups, TINY, head, precision=precision)
    assert {parameter.dtype for parameter in stage.parameters()} == {
        torch.bfloat16 if precision == "bf16" else torch.float16
    }
    output = stage(packed, (want,))[want]
    assert output.dtype == torch.float32
    exact = build(groups, TINY, head)(packed, (want,))[want]
    torch.testing.assert_close(output, exact, rtol=0.1, atol=0.1)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in stage.parameters())


@pytest.mark.parametrize(
    ("engine", "calls"),
    [
        ({}, 4),
        ({"recompute": "selective", "recompute_modules": ("core_attn",)}, 8),
        ({"recompute": "selective", "recompute_modules": ("mlp", "layernorm")}, 4),
        ({"recompute": "full", "recompute_num_layers": 2}, 8),
    ],
)
def test_recompute_runs_attention_again_in_the_backward_pass(
    groups: ParallelGroups, monkeypatch: pytest.MonkeyPatch, engine: Any, calls: int
) -> None:
    count = []
    attention = blocks.attention
    monkeypatch.setattr(blocks, "attention", lambda *args, **kwargs: count.append(1) or attention(*args, **kwargs))
    stage = build(groups, TINY, **engine)
    packed = pack(Batch(Rows.of(make_rows(TINY))), range(3))
    stage(packed, ("logprobs",))["logprobs"].sum().backward()
    assert len(count) == calls


def kept_bytes(stage: LlamaStage, packed: Any) -> int:
    """Bytes that one forward pass keeps for its backward pass, which is then run."""
    storages: list[Any] = []

    def note(tensor: Tensor) -> Tensor:
        storages.append(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = stage(packed, ("logprobs",))["logprobs"].sum()
    size = sum(storage.nbytes() for storage in {storage.data_ptr(): storage for storage in storages}.values())
    loss.backward()
    return size


def test_recomputed_norms_keep_no_output_for_the_backward_pass(groups: ParallelGroups) -> None:
    packed = pack(Batch(Rows.of(make_rows(TINY))), range(3))
    without, with_norm = (
        kept_bytes(build(groups, TINY, recompute="selective", recompute_modules=modules), packed)
        for modules in (("core_attn",), ("core_attn", "layernorm"))
    )
    two_norms_a_layer = 2 * TINY.num_layers * packed.tokens.shape[0] * TINY.hidden_size * 4
    assert without - with_norm >= two_norms_a_layer


def test_dropout_acts_in_training_only(groups: ParallelGroups) -> None:
    stage = build(groups, replace(TINY, dropout=0.3))
    packed = pack(Batch(Rows.of(make_rows(TINY))), range(3))
    plain = build(groups, TINY)(packed, ("logprobs",))["logprobs"]
    assert not torch.allclose(stage(packed, ("logprobs",))["logprobs"], plain)
    assert torch.equal(stage.eval()(packed, ("logprobs",))["logprobs"], plain)


def test_forced_backend_reaches_the_operators(groups: ParallelGroups) -> None:
    with pytest.raises(ValueError, match=r"model.kernels=triton: .*or set model.kernels=auto"):
        build_stages(replace(TINY, kernels="triton"), "lm", groups, EngineConfig(), "cpu", 0)
    packed = pack(Batch(Rows.of(make_rows(TINY))), range(3))
    torch.testing.assert_close(
        build(groups, replace(TINY, kernels="torch"))(packed, ("logprobs",))["logprobs"],
        build(groups, TINY)(packed, ("logprobs",))["logprobs"],
    )


def test_a_head_refuses_what_it_cannot_give(groups: ParallelGroups) -> None:
    packed = pack(Batch(Rows.of(make_rows(TINY))), range(3))
    with pytest.raises(ValueError, match=r"'value' head gives \('values',\), not \['logprobs'\]"):
        build(groups, TINY, "value")(packed, ("logprobs",))
    with pytest.raises(ValueError, match="'score' head"):
        build(groups, TINY, "score")(packed, ("scores", "entropy"))


def test_a_row_longer_than_the_positions_is_refused(groups: ParallelGroups) -> None:
    packed = pack(Batch(Rows.of(make_rows(TINY, (65,)))), range(1))
    with pytest.raises(ValueError, match=r"65 tokens exceeds model\.max_position_embeddings=64"):
        build(groups, TINY)(packed, ("logprobs",))


@pytest.mark.parametrize(
    ("model", "parallel", "message"),
    [
        ({}, {"tp": 4}, "num_query_groups = 2 is not divisible by tp = 4; use a tp of 1, 2"),
        ({"num_query_groups": 3, "num_attention_heads": 3, "head_dim": 8}, {"tp": 2}, "heads = 3 .*tp = 2"),
        ({"ffn_hidden_size": 49}, {"tp": 2}, "ffn_hidden_size = 49 is not divisible by tp = 2"),
        (
            {"vocab_multiple": 1, "vocab_size": 91},
            {"tp": 2},
            "padded_vocab_size = 91 .*vocab_multiple a multiple of 2",
        ),
        ({"num_layers": 6}, {"pp": 2, "vpp": 2}, "num_layers = 6 is not divisible by pp x vpp = 4"),
    ],
)
def test_a_layout_that_does_not_fit_is_named(model: Any, parallel: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_layout(replace(TINY, **model), ParallelConfig(**parallel))


def test_a_recompute_block_that_does_not_divide_the_layers_is_named() -> None:
    with pytest.raises(ValueError, match="recompute_num_layers 3 does not divide the 4 layers"):
        transformer_config(TINY, ParallelConfig(), EngineConfig(recompute="full", recompute_num_layers=3))


def test_a_sequence_that_context_parallelism_cannot_cut_is_named() -> None:
    with pytest.raises(ValueError, match="6 slots cannot be cut over cp=2"):
        context_layout((0, 8, 14), torch.arange(7), 2)


def test_checkpoint_keys_are_strict_and_a_scalar_head_has_its_own(groups: ParallelGroups) -> None:
    for head, key in (("lm", "output_layer"), ("value", "value_head"), ("score", "score_head")):
        state = build(groups, TINY, head).sharded_state_dict()
        assert state["output_layer.weight"].key == f"{key}.weight"
        assert not state["output_layer.weight"].allow_shape_mismatch
        assert not state["embedding.word_embeddings.weight"].allow_shape_mismatch
    assert state["output_layer.bias"].key == "score_head.bias"


def test_the_callers_metadata_stays_as_it_was(groups: ParallelGroups) -> None:
    """megatron-core writes process groups into it, which a later call on other groups would meet."""
    metadata: dict[str, Any] = {}
    build(groups, TINY, "lm").sharded_state_dict(metadata=metadata)
    assert metadata == {}


def test_a_critic_never_loads_a_row_of_an_lm_head(groups: ParallelGroups, tmp_path: Path) -> None:
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

    metadata = {"dp_cp_group": groups.pgc.dp_cp}
    dist_checkpointing.save(build(groups, TINY).sharded_state_dict(metadata=metadata), str(tmp_path))
    assert set(metadata) == {"dp_cp_group"}
    critic = build(groups, TINY, "value")
    with pytest.raises(CheckpointException, match=r"value_head\.weight from model not in state dict"):
        dist_checkpointing.load(critic.sharded_state_dict(metadata=metadata), str(tmp_path))
