"""config.json of a Hugging Face LLaMA, and our ModelConfig."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_zj.checkpoint.errors import CheckpointError
from megatron_zj.checkpoint.files import read_json
from megatron_zj.config.model import HeadKind, ModelConfig, RopeScalingConfig

OWN = "megatron_zj"  # our key in config.json: what Hugging Face has no word for
ARCHITECTURES: dict[HeadKind, str] = {
    "lm": "LlamaForCausalLM",
    "score": "LlamaForSequenceClassification",
    "value": "LlamaForTokenClassification",
}
_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}  # what a LLaMA here must be
_KEPT = ("preset", "vocab_multiple", "dropout", "kernels")  # of ModelConfig, kept under OWN


def read_config(folder: Path) -> tuple[ModelConfig, HeadKind, dict[str, Any]]:
    """The model, its head, and config.json as it stands.  CheckpointError for anything but a LLaMA."""
    path = folder / "config.json"
    raw = read_json(path, "give a Hugging Face model folder")
    if raw.get("model_type") != "llama":
        raise CheckpointError(f"{path}: model_type is {raw.get('model_type')!r}; only 'llama' models can be imported")
    for name, value in _FIXED.items():
        if raw.get(name, value) != value:
            raise CheckpointError(f"{path}: {name} is {raw[name]!r}; only {value!r} is supported")
    own = raw.get(OWN, {})
    try:
        model = ModelConfig(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            ffn_hidden_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_attention_heads=raw["num_attention_heads"],
            num_query_groups=_unless(raw.get("num_key_value_heads"), raw["num_attention_heads"]),
            head_dim=_unless(raw.get("head_dim"), raw["hidden_size"] / raw["num_attention_heads"]),
            max_position_embeddings=raw.get("max_position_embeddings", 2048),
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            init_std=raw.get("initializer_range", 0.02),
            **_read_rope(path, raw),
            **{name: own[name] for name in _KEPT if name in own},
        )
    except KeyError as error:
        raise CheckpointError(f"{path} has no {error.args[0]!r}; it is not the config of a whole model") from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    return model, _read_head(path, raw), raw


def _unless(value: int | None, default: float) -> int | None:
    """None where ``value`` says what our default says: one model, one spelling."""
    return None if value == default else value


def _read_head(path: Path, raw: Mapping[str, Any]) -> HeadKind:
    architectures = raw.get("architectures") or [ARCHITECTURES["lm"]]
    for head, name in ARCHITECTURES.items():
        if name in architectures:
            return head
    raise CheckpointError(f"{path}: architectures is {architectures}; known are {sorted(ARCHITECTURES.values())}")


def _read_rope(path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling, in the spelling of transformers 4 or 5 (``rope_parameters``)."""
    found = dict(raw.get("rope_scaling") or {}) | dict(raw.get("rope_parameters") or {})
    theta = found.get("rope_theta", raw.get("rope_theta", 10000.0))
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta}
    if kind == "linear":
        return {"rope_theta": theta, "rope_scaling": RopeScalingConfig(kind="linear", factor=found["factor"])}
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return {"rope_theta": theta, "rope_scaling": RopeScalingConfig(kind="llama3", **{n: found[n] for n in names})}
    raise CheckpointError(f"{path}: rope_type {kind!r} is not supported; known are default, linear and llama3")


def write_config(model: ModelConfig, head: HeadKind, dtype: str, original: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of ``model``.  ``original`` is the one it was imported with, if any: its other keys are kept."""
    rope: dict[str, Any] | None = None
    if model.rope_scaling is not None:
        rope = dataclasses.asdict(model.rope_scaling)
        rope["rope_type"] = rope.pop("kind")
        if rope["rope_type"] == "linear":
            rope = {"rope_type": "linear", "factor": rope["factor"]}
    kept = {key: value for key, value in original.items() if key not in ("rope_parameters", "dtype")}
    config = {
        **kept,
        "architectures": [ARCHITECTURES[head]],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rope_theta": model.rope_theta,
        "rope_scaling": rope,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        **_FIXED,
        "torch_dtype": dtype,
        OWN: {name: getattr(model, name) for name in _KEPT},
    }
    if head != "lm":
        config["num_labels"] = 1
        config["id2label"], config["label2id"] = {"0": head}, {head: 0}
    return config
