"""The reference itself is checked against Hugging Face's LLaMA."""

from __future__ import annotations

import pytest
import torch

from megatron_zj.config.model import ModelConfig, RopeScalingConfig
from tests.helpers.reference_llama import ReferenceLlama

SHAPE = {"vocab_size": 96, "hidden_size": 32, "ffn_hidden_size": 48, "num_layers": 2, "num_attention_heads": 4}
LLAMA3 = RopeScalingConfig(
    kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
CASES = {
    "mha": ModelConfig(**SHAPE),
    "gqa": ModelConfig(**SHAPE, num_query_groups=2),
    "tied": ModelConfig(**SHAPE, tie_embeddings=True),
    "linear": ModelConfig(**SHAPE, rope_scaling=RopeScalingConfig(kind="linear", factor=4.0)),
    "llama3": ModelConfig(**SHAPE, rope_theta=500000.0, rope_scaling=LLAMA3),
}


def hf_llama(model: ModelConfig, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_theta": model.rope_theta, "rope_type": "default"}
    if model.rope_scaling is not None:
        rope |= {"rope_type": model.rope_scaling.kind, "factor": model.rope_scaling.factor}
        if model.rope_scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": model.rope_scaling.low_freq_factor,
                "high_freq_factor": model.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": model.rope_scaling.original_max_position_embeddings,
            }
    config = LlamaConfig(
        vocab_size=model.padded_vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.kv_heads,
        rms_norm_eps=model.norm_eps,
        max_position_embeddings=model.max_position_embeddings,
        rope_parameters=rope,
        tie_word_embeddings=model.tie_embeddings,
        attn_implementation="eager",
    )
    network = LlamaForCausalLM(config).double()
    missing = network.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"lm_head.weight"} if model.tie_embeddings else not missing.missing_keys
    return network


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_hugging_face(case: str) -> None:
    model = CASES[case]
    reference = ReferenceLlama(model, dtype=torch.float64, spread=4.0, seed=1)
    network = hf_llama(model, reference.state_dict())
    tokens = torch.randint(0, model.vocab_size, (37,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = network(tokens[None]).logits[0, :, : model.vocab_size]
        difference = (reference.logits(tokens) - expected).abs().max()
    assert expected.abs().max() > 0.1
    assert difference < 1e-5, difference  # Hugging Face keeps rotary angles and its norms in fp32
