"""Named shapes.  ``conf/model/`` holds the same numbers; a test keeps the two together.

Sources: Touvron et al. 2023 (LLaMA, arXiv:2302.13971; Llama 2, arXiv:2307.09288), Grattafiori et al. 2024 (Llama 3,
arXiv:2407.21783) and the released configurations.  Ziya-LLaMA-13B-v1 is LLaMA-13B with a vocabulary of 39,424 rows,
which needs no padding; Ziya2-13B has 4,096 positions.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_zj.config.model import ModelConfig

_LLAMA_7B = ModelConfig(
    preset="llama_7b",
    vocab_size=32000,
    hidden_size=4096,
    ffn_hidden_size=11008,
    num_layers=32,
    num_attention_heads=32,
    max_position_embeddings=2048,
    norm_eps=1e-6,
)
_LLAMA_13B = replace(
    _LLAMA_7B, preset="llama_13b", hidden_size=5120, ffn_hidden_size=13824, num_layers=40, num_attention_heads=40
)
_LLAMA_65B = replace(
    _LLAMA_7B,
    preset="llama_65b",
    hidden_size=8192,
    ffn_hidden_size=22016,
    num_layers=80,
    num_attention_heads=64,
    norm_eps=1e-5,
)

PRESETS: dict[str, ModelConfig] = {
    model.preset: model
    for model in (
        # about 2M: learns the demo's clinic in a minute on a CPU; a small model wants a large init_std
        ModelConfig(preset="tiny", vocab_size=2048, hidden_size=160, ffn_hidden_size=440, init_std=0.04),
        ModelConfig(  # about 10M
            preset="small", hidden_size=256, ffn_hidden_size=688, num_layers=10, max_position_embeddings=1024
        ),
        _LLAMA_7B,
        _LLAMA_13B,
        _LLAMA_65B,
        replace(_LLAMA_7B, preset="llama2_7b", max_position_embeddings=4096, norm_eps=1e-5),
        replace(_LLAMA_13B, preset="llama2_13b", max_position_embeddings=4096, norm_eps=1e-5),
        replace(
            _LLAMA_65B,
            preset="llama2_70b",
            ffn_hidden_size=28672,
            num_query_groups=8,
            max_position_embeddings=4096,
        ),
        replace(
            _LLAMA_7B,
            preset="llama3_8b",
            vocab_size=128256,
            ffn_hidden_size=14336,
            num_query_groups=8,
            max_position_embeddings=8192,
            rope_theta=500000.0,
            norm_eps=1e-5,
        ),
        replace(_LLAMA_13B, preset="ziya_13b", vocab_size=39424),
        replace(_LLAMA_13B, preset="ziya2_13b", vocab_size=39424, max_position_embeddings=4096),
    )
    if model.preset is not None
}


def preset(name: str) -> ModelConfig:
    """The shape of this name; ``llama-2-7b`` and ``llama2_7b`` are one.  Raises ValueError with the names there are."""
    wanted = _plain(name)
    for known, model in PRESETS.items():
        if _plain(known) == wanted:
            return model
    raise ValueError(f"unknown model preset {name!r}; there are {', '.join(PRESETS)}")


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
