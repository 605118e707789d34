"""A LLaMA as megatron-core's ``GPTModel``, on packs of sequences.

Legend: T slots of this context-parallel rank, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from kernels import dispatch
from kernels.rope import rope_tables
from megatron_zj.config.model import HeadKind, ModelConfig, Want
from megatron_zj.config.optim import EngineConfig
from megatron_zj.models.canonical import init_stage
from megatron_zj.models.heads import LmHead, ScoreHead, ValueHead, check_wants
from megatron_zj.models.packed import PackedLayout, packed_layout
from megatron_zj.models.providers import block_spec
from megatron_zj.models.rotary import rotary_frequencies
from megatron_zj.models.transformer_config import LlamaConfig, transformer_config
from megatron_zj.parallel.groups import ParallelGroups
from megatron_zj.runtime.seed import keyed_seed

if TYPE_CHECKING:
    from megatron_zj.data.packing import PackedBatch

_WORTH_PICKING = 0.875  # of a pack's slots: beyond, copying them costs what the last layer would save
_TRACKER = "model-parallel-rng"  # megatron-core's name for the stream of what differs between tp ranks


class LlamaStage(GPTModel):  # type: ignore[misc]
    """One pipeline chunk: the embedding on the first, some layers, norm and head on the last."""

    def __init__(
        self, model: ModelConfig, head: HeadKind, config: LlamaConfig, groups: ParallelGroups, vp_stage: int | None
    ) -> None:
        first = groups.is_first_stage and vp_stage in (None, 0)
        last = groups.is_last_stage and vp_stage in (None, groups.vpp_size - 1)
        layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=groups.pp_rank)
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(model, head, layers),
            vocab_size=model.padded_vocab_size,
            max_sequence_length=model.max_position_embeddings,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=model.tie_embeddings and head == "lm",
            position_embedding_type="none",  # positions are turned inside our attention
            pg_collection=groups.pgc,
            vp_stage=vp_stage,
        )
        self.model, self.head, self.groups = model, head, groups
        cos, sin = rope_tables(rotary_frequencies(model), model.max_position_embeddings)
        self.register_buffer("rotary_cos", cos, persistent=False)
        self.register_buffer("rotary_sin", sin, persistent=False)
        if last:
            self.output_layer = self._build_head(config, groups)
            self.decoder.layers[-1].feeds_head = True

    def _build_head(self, config: LlamaConfig, groups: ParallelGroups) -> Any:
        if self.head == "value":
            return ValueHead(config, groups.pgc)
        if self.head == "score":
            return ScoreHead(config, groups.pgc)
        # The weight (and its marks: shared between stages, and so on) is the one GPTModel made.
        weight = self.output_layer.weight
        return LmHead(config, weight, self.model.padded_vocab_size, self.model.vocab_size, groups.pgc.tp)

    def forward(
        self, packed: PackedBatch, wants: Sequence[Want] = (), temperature: float = 1.0
    ) -> Tensor | dict[Want, Tensor]:
        """Hidden states [T (/ tp under SP), 1, D] on an inner stage; on the last stage what is wanted.

        ``logprobs``, ``entropy`` (nats) and ``values``: [T] fp32 of this cp rank, whole over tp, prediction-aligned,
        0 in slots without a target (values: anything).  ``scores``: [R] fp32, whole over cp and tp.
        ``temperature`` divides the logits.  With ``packed.read`` only those slots are sure to be computed: the others
        hold 0 (values: anything).

        Raises ValueError for wants the head cannot give, a sequence longer than the model's positions, or a pack
        that sequence parallelism cannot cut.
        """
        check_wants(self.head, wants)
        self._check_pack(packed)
        layout = packed_layout(packed, self.rotary_cos, self.rotary_sin, self.groups.cp_size, self._narrow(packed))
        hidden = self._hidden(packed.tokens, layout)
        if not self.post_process:
            return hidden
        outputs: dict[Want, Tensor] = {}
        if not wants:
            return outputs
        if self.head == "value":
            outputs = self.output_layer(hidden)
        elif self.head == "score":
            outputs = self.output_layer(hidden, packed, self.decoder.final_layernorm.weight, wants)
        else:
            outputs = self.output_layer(hidden, packed, wants, temperature, self._tied_weight())
        return outputs

    def _hidden(self, tokens: Tensor, layout: PackedLayout) -> Tensor:
        hidden = self.embedding(input_ids=tokens[None], position_ids=None) if self.pre_process else None
        out: Tensor = self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=layout)
        return out

    def _tied_weight(self) -> Tensor | None:
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None

    def _narrow(self, packed: PackedBatch) -> Tensor | None:
        """The slots that the last layer computes after its attention, where that saves more than picking them costs.

        Sequence parallelism and FP8 cut and pad the slots of a pack, so there it computes all.  Where none is read it
        computes one: every rank must run the layer's collectives and its backward pass.
        """
        if packed.read is None or not self.post_process or self.config.sequence_parallel or self.config.fp8:
            return None
        read = packed.read if len(packed.read) else packed.read.new_zeros(1)
        return read if len(read) <= _WORTH_PICKING * len(packed.tokens) else None

    def _check_pack(self, packed: PackedBatch) -> None:
        longest = max(packed.lengths, default=0)
        if longest > self.model.max_position_embeddings:
            raise ValueError(
                f"a row of {longest} tokens exceeds model.max_position_embeddings={self.model.max_position_embeddings}"
            )
        slots = packed.tokens.shape[0]
        if self.config.sequence_parallel and slots % self.groups.tp_size:
            raise ValueError(
                f"sequence parallelism cannot cut a pack of {slots} slots over tp={self.groups.tp_size}; "
                "pack with a length that it divides"
            )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """megatron-core's, with strict shapes and a key of its own for a scalar head.

        megatron-core allows another shape under ``output_layer.weight``; a critic would then load row 0 of an
        lm_head without a word.
        """
        metadata = {"dp_cp_group": self.groups.pgc.dp_cp, **(metadata or {})}  # a copy: megatron-core adds to it
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name in ("weight", "bias"):
            entry = state.get(f"{prefix}output_layer.{name}")
            if self.head != "lm" and isinstance(entry, ShardedTensor):
                entry.key = f"{prefix}{self.head}_head.{name}"
        for name in ("embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias"):
            entry = state.get(f"{prefix}{name}")
            if isinstance(entry, ShardedTensor):
                entry.allow_shape_mismatch = False
        return state

    def tie_embeddings_and_output_weights_state_dict(
        self,
        sharded_state_dict: dict[str, Any],
        output_layer_weight_key: str,
        first_stage_word_emb_key: str,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """The last stage's copy of a tied embedding is a replica of the first stage's.

        megatron-core's own method asks ``parallel_state`` for the data-parallel rank, which is not initialised here.
        """
        if not self.post_process or self.pre_process:
            sharded_state_dict.pop(output_layer_weight_key, None)
            return
        dp_cp = self.groups.pgc.dp_cp
        sharded_state_dict[output_layer_weight_key] = make_tp_sharded_tensor_for_checkpoint(
            tensor=self.output_layer.weight,
            key=first_stage_word_emb_key,
            replica_id=(1, 0, dp_cp.rank()),
            allow_shape_mismatch=False,
            tp_group=self.groups.pgc.tp,
            dp_cp_group=dp_cp,
        )


def build_stages(
    model: ModelConfig,
    head: HeadKind,
    groups: ParallelGroups,
    engine: EngineConfig,
    device: torch.device | str,
    seed: int,
    *,
    awaits_weights: bool = False,
) -> list[LlamaStage]:
    """This rank's pipeline chunks (``vpp`` of them), cast to ``engine.precision`` and initialised (``init_stage``).

    Collective over the pipeline when embeddings are tied.  Raises ValueError for a layout the model does not fit, and
    when ``model.kernels`` asks for what is not there.
    """
    if model.kernels == "triton":
        try:
            with dispatch.use("triton"):
                dispatch.backend_of(torch.empty(0, device=device))
        except NotImplementedError as error:
            raise ValueError(f"model.kernels=triton: {error}; or set model.kernels=auto") from error
    config = transformer_config(model, groups.parallel, engine)
    _ensure_tracker(groups, seed)
    virtual = range(groups.vpp_size) if groups.vpp_size > 1 else (None,)
    chunks = [LlamaStage(model, head, config, groups, vp_stage).to(device) for vp_stage in virtual]
    init_stage(chunks, groups, model, head, seed, awaits_weights=awaits_weights)
    return chunks


def _ensure_tracker(groups: ParallelGroups, seed: int) -> None:
    """megatron-core forks this random stream under SP and recompute, whether anything draws from it or not."""
    tracker = get_cuda_rng_tracker()
    if _TRACKER not in tracker.get_states():
        tracker.add(_TRACKER, keyed_seed(seed, "tensor parallel dropout", groups.tp_rank))
