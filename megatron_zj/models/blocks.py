"""The layer: megatron-core's parallel linears, our attention, norm, activation and residual path around them.

Legend: T slots of this context-parallel rank, H query heads and G key/value heads of this tensor-parallel rank,
E head size, D hidden size, F SwiGLU width of this rank.  Hidden states are [T (/ tp under SP), 1, D].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput, checkpoint
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from kernels.attention import attention
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import split_rope
from kernels.swiglu import swiglu
from megatron_zj.models.packed import PackedLayout
from megatron_zj.models.transformer_config import LlamaConfig


class RmsNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467) through ``kernels.rms_norm``."""

    def __init__(self, config: LlamaConfig, hidden_size: int, eps: float, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.config = config
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        # Under SP each rank sees part of the tokens: megatron-core sums such gradients over tp.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """Normalised over the last dim, same shape and dtype; with a residual (x + residual normalised, the sum)."""
        with self.config.kernel_backend():
            if residual is None:
                return rms_norm(x, self.weight, self.eps)
            return add_rms_norm(x, residual, self.weight, self.eps)


class DeferredRmsNorm(RmsNorm):
    """The final norm of a model whose head applies it by itself, to the few tokens it reads."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """``x`` as it is."""
        return x


class Swiglu(nn.Module):
    """silu(gate) * up of linear_fc1's output [.., 2 F] (gate first), through ``kernels.swiglu``."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        """[.., F]."""
        with self.config.kernel_backend():
            return swiglu(x)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing to save; megatron-core's MLP asks each of its modules."""
        return {}


class PackedAttention(MegatronModule):  # type: ignore[misc]
    """Causal attention inside each sequence of a pack; with context parallelism over keys gathered from all ranks."""

    def __init__(
        self,
        config: LlamaConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        *,
        pg_collection: ProcessGroupCollection,
        **unused: Any,
    ) -> None:
        super().__init__(config)
        self.cp_group = pg_collection.cp
        self.tp_group = pg_collection.tp  # sharded_state_dict looks for it

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedLayout,
        **unused: Any,
    ) -> Tensor:
        """[T, H, E], [T, G, E], [T, G, E] -> [T, H * E]."""
        with self.config.kernel_backend():
            out_THE = self._attend(query, key, value, packed_seq_params)
        return out_THE.reshape(out_THE.shape[0], -1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, pack: PackedLayout) -> Tensor:
        if pack.context is None:
            ends = pack.ends
            return attention(query, key, value, pack.cu_seqlens_q, cu_seqlens_q_list=ends)[0]
        groups = key.shape[1]
        # The backward pass of this gather sums over the ranks and keeps the own slice.
        both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=1), group=self.cp_group)
        both_SGE = both.index_select(0, pack.context.gathered_S)
        return attention(
            query,
            both_SGE[:, :groups],
            both_SGE[:, groups:],
            pack.context.cu_queries,
            pack.cu_seqlens_kv,
            q_slots=pack.context.slots_T,
            cu_seqlens_q_list=pack.context.queries,
            cu_seqlens_k_list=pack.ends,
        )[0]


class LlamaAttention(SelfAttention):  # type: ignore[misc]
    """Self-attention whose rotary embedding goes by each token's position and never synchronises with the host."""

    def forward(self, hidden_states: Tensor, pack: PackedLayout, read: Tensor | None = None) -> Tensor:
        """[T (/ tp), 1, D] -> the same, or of the slots ``read`` alone [N, 1, D]; the residual not added."""
        fused, _ = self.linear_qkv(hidden_states)
        slots, groups, size = fused.shape[0], self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        share = self.num_attention_heads_per_partition // groups
        # linear_qkv's rows: for each key/value head its query heads, its key, its value.
        fused_TGSE = fused.view(slots, groups, share + 2, size)
        with self.config.kernel_backend():
            query, key, value = split_rope(fused_TGSE, pack.cos_PE, pack.sin_PE, pack.positions)
        if self.checkpoint_core_attention and self.training:
            out = checkpoint(self._core(pack), False, query, key, value)
        else:
            out = self._core(pack)(query, key, value)
        out = out.reshape(slots, 1, -1)
        output: Tensor = self.linear_proj(out if read is None else out.index_select(0, read))[0]
        return output

    def _core(self, pack: PackedLayout) -> Any:
        def run(query: Tensor, key: Tensor, value: Tensor) -> Any:
            return self.core_attention(
                query, key, value, None, attn_mask_type=self.attn_mask_type, packed_seq_params=pack
            )

        return run


class LlamaLayer(TransformerLayer):  # type: ignore[misc]
    """Pre-norm residual layer without the branches a LLaMA never takes.

    The layer before the head computes its output projection and MLP for the slots that are read alone: no other slot
    looks at them any more.
    """

    feeds_head = False

    def forward(self, hidden_states: Tensor, packed_seq_params: PackedLayout, **unused: Any) -> tuple[Tensor, None]:
        """[T (/ tp), 1, D] -> the same; the second item is megatron-core's cross-attention context, always None.

        The layer that feeds the head leaves 0 in slots that ``packed_seq_params.read`` does not name.
        """
        slots, read = hidden_states.shape[0], packed_seq_params.read if self.feeds_head else None
        normed, norm = self._normed(self.input_layernorm, self.recompute_input_layernorm, hidden_states)
        out = self.self_attention(normed, packed_seq_params, read)
        if norm is not None:
            norm.discard_output_and_register_recompute(out)
        out = self._dropped(out)
        if read is not None:
            hidden_states = hidden_states.index_select(0, read)

        norm = None
        if isinstance(self.pre_mlp_layernorm, RmsNorm) and not self.recompute_pre_mlp_layernorm:
            normed, hidden_states = self.pre_mlp_layernorm(out, hidden_states)
        else:
            hidden_states = hidden_states + out
            normed, norm = self._normed(self.pre_mlp_layernorm, self.recompute_pre_mlp_layernorm, hidden_states)
        out = checkpoint(self._mlp, False, normed) if self.recompute_mlp and self.training else self._mlp(normed)
        if norm is not None:
            norm.discard_output_and_register_recompute(out)
        out = hidden_states + self._dropped(out)
        if read is not None:
            out = out.new_zeros((slots, *out.shape[1:])).index_copy(0, read, out)
        return out, None

    def _mlp(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(x)[0]
        return out

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.hidden_dropout, self.training) if self.hidden_dropout > 0.0 else x

    def _normed(self, norm: nn.Module, recompute: bool, x: Tensor) -> tuple[Tensor, CheckpointWithoutOutput | None]:
        """The norm of ``x``; with ``recompute`` also the object that drops it and computes it again.

        ``fp8=None`` is said aloud because megatron-core takes its own default, False, for "with FP8", and then fails
        where Transformer Engine is missing.
        """
        if not recompute or not self.training or not torch.is_grad_enabled():
            return norm(x), None
        kept = CheckpointWithoutOutput(fp8=True if self.config.fp8 else None)
        return kept.checkpoint(norm, x), kept
