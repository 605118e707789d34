"""Hugging Face's LlamaForCausalLM with our shape and weights: the outside opinion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_zj.config.model import ModelConfig


def hf_llama(model: ModelConfig, state: Mapping[str, Tensor], dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """The network with the padded vocabulary's rows; eager attention."""
    rope: dict[str, Any] = {"rope_theta": model.rope_theta, "rope_type": "default"}
    scaling = model.rope_scaling
    if scaling is not None:
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        rope |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    config = LlamaConfig(
        vocab_size=model.padded_vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_size,
        rms_norm_eps=model.norm_eps,
        max_position_embeddings=model.max_position_embeddings,
        rope_parameters=rope,
        tie_word_embeddings=model.tie_embeddings,
        attn_implementation="eager",
    )
    network = LlamaForCausalLM(config).to(dtype)
    result = network.load_state_dict(dict(state), strict=False)
    missing = set(result.missing_keys) - ({"lm_head.weight"} if model.tie_embeddings else set())
    if missing or result.unexpected_keys:
        raise ValueError(f"state does not fit: missing {missing}, unexpected {result.unexpected_keys}")
    return network.eval()
