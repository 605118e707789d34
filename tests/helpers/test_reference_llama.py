"""The reference itself is checked against Hugging Face's LLaMA."""

from __future__ import annotations

import pytest
import torch

from megatron_zj.config.model import ModelConfig, RopeScalingConfig
from tests.helpers.hf_llama import hf_llama
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
