"""config.json of a Hugging Face LLaMA, and our ModelConfig."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_zj.checkpoint.errors import CheckpointError
from megatron_zj.checkpoint.files import read_json
from megatron_zj.config.loader import ConfigError, load
from megatron_zj.config.model import HeadKind, ModelConfig, RopeScalingConfig
from megatron_zj.config.ranges import check_ranges

OWN = "megatron_zj"  # our key in config.json: what Hugging Face has no word for
ARCHITECTURES: dict[HeadKind, str] = {
    "lm": "LlamaForCausalLM",
    "score": "LlamaForSequenceClassification",
    "value": "LlamaForTokenClassification",
}
_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}  # what a LLaMA here must be
_ROPE: dict[str, tuple[str, ...]] = {  # kinds of rotary scaling, with their numbers
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_KEPT = ("preset", "vocab_multiple", "dropout", "kernels")  # of ModelConfig, kept under OWN


@dataclass(frozen=True, kw_only=True)
class _Llama:
    """The keys of config.json that are read, with the defaults of transformers."""

    architectures: tuple[str, ...] | None = None
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScalingConfig | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        """What ModelConfig would complain of under another name, and what is divided by before."""
        check_ranges(
            self,
            intermediate_size="[1, inf)",
            num_hidden_layers="[1, inf)",
            num_attention_heads="[1, inf)",
            num_key_value_heads="[1, inf)",
            rms_norm_eps="(0, inf)",
            initializer_range="[0, inf)",
        )


def read_config(folder: Path) -> tuple[ModelConfig, HeadKind, dict[str, Any]]:
    """The model, its head, and config.json as it stands.  CheckpointError for anything but a LLaMA."""
    path = folder / "config.json"
    raw = read_json(path, "give a Hugging Face model folder")
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(raw).__name__}")
    if raw.get("model_type") != "llama":
        raise CheckpointError(f"{path}: model_type is {raw.get('model_type')!r}; only 'llama' models can be imported")
    for name, value in _FIXED.items():
        if raw.get(name, value) != value:
            raise CheckpointError(f"{path}: {name} is {raw[name]!r}; only {value!r} is supported")
    try:
        names = [field.name for field in dataclasses.fields(_Llama) if field.name in raw]
        llama = load(_Llama, {name: raw[name] for name in names} | _read_rope(raw))
        own = load(ModelConfig, raw.get(OWN, {}), OWN)
        model = ModelConfig(
            vocab_size=llama.vocab_size,
            hidden_size=llama.hidden_size,
            ffn_hidden_size=llama.intermediate_size,
            num_layers=llama.num_hidden_layers,
            num_attention_heads=llama.num_attention_heads,
            num_query_groups=_unless(llama.num_key_value_heads, llama.num_attention_heads),
            head_dim=_unless(llama.head_dim, llama.hidden_size / llama.num_attention_heads),
            max_position_embeddings=llama.max_position_embeddings,
            rope_theta=llama.rope_theta,
            rope_scaling=llama.rope_scaling,
            norm_eps=llama.rms_norm_eps,
            tie_embeddings=llama.tie_word_embeddings,
            init_std=llama.initializer_range,
            **{name: getattr(own, name) for name in _KEPT},
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return model, _read_head(path, llama.architectures), raw


def _unless(value: int | None, default: float) -> int | None:
    """None where ``value`` says what our default says: one model, one spelling."""
    return None if value == default else value


def _read_head(path: Path, architectures: Sequence[str] | None) -> HeadKind:
    for head, name in ARCHITECTURES.items():
        if name in (architectures or [ARCHITECTURES["lm"]]):
            return head
    known = sorted(ARCHITECTURES.values())
    raise CheckpointError(f"{path}: architectures is {list(architectures or ())}; known are {known}")


def _read_rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling, in the spelling of transformers 4 or 5 (``rope_parameters``)."""
    found: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        part = raw.get(key) or {}
        if not isinstance(part, dict):
            raise ConfigError([f"{key}: expected a mapping, got {part!r}"])
        found |= part
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in tuple(_ROPE):  # it may be a list
        raise ConfigError([f"rope_type {kind!r} is not supported; known are {', '.join(_ROPE)}"])
    if missing := [name for name in _ROPE[kind] if name not in found]:
        raise ConfigError([f"rope_scaling.{missing[0]}: missing"])
    scaling = {"kind": kind, **{name: found[name] for name in _ROPE[kind]}} if _ROPE[kind] else None
    return {"rope_theta": found.get("rope_theta", raw.get("rope_theta", 10000.0)), "rope_scaling": scaling}


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
