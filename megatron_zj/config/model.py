"""What a model is: the shape of a LLaMA and the kernels it runs on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_zj.config.ranges import check_ranges

HeadKind = Literal["lm", "value", "score"]
Want = Literal["logprobs", "entropy", "values", "scores"]  # what a head can be asked for


@dataclass(frozen=True, kw_only=True)
class RopeScalingConfig:
    """Rotary frequency scaling: ``linear`` (position interpolation) or ``llama3`` (by-wavelength)."""

    kind: Literal["linear", "llama3"]
    factor: float  # by how much the context is stretched
    low_freq_factor: float = 1.0  # llama3 only: wavelengths above original/low are fully scaled
    high_freq_factor: float = 4.0  # llama3 only: wavelengths below original/high are left alone
    original_max_position_embeddings: int = 8192  # positions of the pre-training, tokens

    def __post_init__(self) -> None:
        check_ranges(
            self,
            factor="(0, inf)",
            low_freq_factor="(0, inf)",
            high_freq_factor="(0, inf)",
            original_max_position_embeddings="[1, inf)",
        )
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"need low_freq_factor < high_freq_factor, got {self.low_freq_factor}, {self.high_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a LLaMA.  Sizes are logical (whole model), never a rank's share."""

    preset: str | None = None  # a name of models/presets.py; for the log, the shape below is what counts
    vocab_size: int = 4096  # rows the tokenizer can produce; padded to a multiple of vocab_multiple
    hidden_size: int = 128  # width of the residual stream
    ffn_hidden_size: int = 352  # width of the SwiGLU product
    num_layers: int = 4  # transformer blocks
    num_attention_heads: int = 4  # query heads
    num_query_groups: int | None = None  # key/value heads; None: as many as heads (MHA)
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 512  # longest sequence, tokens
    rope_theta: float = 10000.0  # base of the rotary frequencies
    rope_scaling: RopeScalingConfig | None = None
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm
    tie_embeddings: bool = False  # the output layer is the embedding
    init_std: float = 0.02  # standard deviation of the initial weights
    dropout: float = 0.0  # of hidden states and embeddings (not of attention); layout invariance is claimed at 0 only
    vocab_multiple: int = 64  # embedding rows are padded to a multiple of this, whatever the layout
    kernels: Literal["auto", "triton", "torch", "te"] = "auto"  # auto: Triton on CUDA, torch elsewhere
    fp8: Literal["none", "hybrid", "e4m3"] = "none"  # FP8 recipe format; te kernels only

    def __post_init__(self) -> None:
        check_ranges(
            self,
            vocab_size="[1, inf)",
            hidden_size="[1, inf)",
            ffn_hidden_size="[1, inf)",
            num_layers="[1, 10000]",
            num_attention_heads="[1, inf)",
            num_query_groups="[1, inf)",
            head_dim="[1, inf)",
            max_position_embeddings="[1, inf)",
            rope_theta="(0, inf)",
            norm_eps="(0, inf)",
            init_std="[0, inf)",
            dropout="[0, 1)",
            vocab_multiple="[1, inf)",
        )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}; set head_dim or change one of them"
            )
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by num_query_groups {self.kv_heads}"
            )
        if self.head_size % 2:
            raise ValueError(f"a head of {self.head_size} cannot be rotated in pairs; set head_dim to an even number")
        if self.fp8 != "none" and self.kernels != "te":
            raise ValueError("fp8 needs kernels=te (Transformer Engine)")

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        """Embedding rows: vocab_size rounded up to a multiple of vocab_multiple, the same on every layout."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple
