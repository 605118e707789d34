"""Which modules a layer is made of: our kernels, or Transformer Engine's.

``model.kernels``: ``auto`` and ``triton`` and ``torch`` are our modules, whose operators ``kernels.dispatch`` sends to
Triton or to the references; ``te`` is megatron-core's Transformer Engine provider.
"""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec
from typing import Any

from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_zj.config.model import HeadKind, ModelConfig
from megatron_zj.models.blocks import DeferredRmsNorm, LlamaAttention, LlamaLayer, PackedAttention, RmsNorm, Swiglu

# megatron-core's checkpoint keys when norm and linear are one module; the same keys without, so that a checkpoint
# can be read under any ``kernels``.
_KEYS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


class KernelSpecProvider(LocalSpecProvider):  # type: ignore[misc]
    """megatron-core's parallel linears with our norm, attention and activation."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        """RMSNorm, whatever is asked: a LLaMA has no other."""
        return RmsNorm

    def core_attention(self) -> type:
        """Attention over packs."""
        return PackedAttention

    def activation_func(self) -> type:
        """SwiGLU."""
        return Swiglu


def require_transformer_engine() -> None:
    """Raise ValueError, saying what to install or change, where Transformer Engine is missing."""
    if find_spec("transformer_engine") is None:
        raise ValueError(
            "model.kernels=te needs Transformer Engine, which is not installed; "
            "install it (pip install 'transformer-engine[pytorch]', on a machine with CUDA) or set model.kernels=auto"
        )
    from megatron.core.extensions.transformer_engine import HAVE_TE  # optional accelerator

    if not HAVE_TE:
        raise ValueError(
            f"model.kernels=te: transformer_engine {_version('transformer-engine')} is installed but megatron-core "
            f"{_version('megatron-core')} cannot use it; install a version it supports or set model.kernels=auto"
        )


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "(version unknown)"


def spec_provider(model: ModelConfig) -> BackendSpecProvider:
    """The provider that ``model.kernels`` asks for."""
    if model.kernels != "te":
        return KernelSpecProvider()
    require_transformer_engine()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider  # optional accelerator

    return TESpecProvider()


def block_spec(model: ModelConfig, head: HeadKind, num_layers: int) -> TransformerBlockSubmodules:
    """The layers of one pipeline chunk, and the final norm.

    The score head reads one token a row and norms that token itself, so its final norm passes through.
    """
    provider = spec_provider(model)
    final: Any = provider.layer_norm(rms_norm=True)
    if head == "score":
        final = DeferredRmsNorm
    return TransformerBlockSubmodules(layer_specs=[layer_spec(provider)] * num_layers, layer_norm=final)


def layer_spec(provider: BackendSpecProvider) -> ModuleSpec:
    """One layer of the provider's modules."""
    fused = provider.fuse_layernorm_and_linear()
    column = provider.column_parallel_layer_norm_linear() if fused else provider.column_parallel_linear()
    norm = IdentityOp if fused else provider.layer_norm(rms_norm=True)
    return ModuleSpec(
        module=LlamaLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=LlamaAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column,
                    core_attention=provider.core_attention(),
                    linear_proj=provider.row_parallel_linear(),
                ),
            ),
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=column, linear_fc2=provider.row_parallel_linear(), activation_func=Swiglu
                ),
            ),
            sharded_state_dict_keys_map={} if fused else _KEYS,
        ),
    )
