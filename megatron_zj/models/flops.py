"""Sizes without a model: parameters, arithmetic a token, memory a rank."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from megatron_zj.config.model import HeadKind, ModelConfig
from megatron_zj.config.optim import EngineConfig
from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.models.canonical import canonical_tensors

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_CHUNK_LOGITS = 1 << 22  # logits that kernels.linear_logprob computes at once; its torch form may keep 64 MiB more


def parameters(model: ModelConfig, head: HeadKind = "lm", *, padded: bool = False) -> int:
    """Number of parameters; ``padded`` counts the padding rows of the vocabulary too."""
    total = sum(prod(tensor.shape) for tensor in canonical_tensors(model, head))
    if padded:
        return total
    matrices = 2 if head == "lm" and not model.tie_embeddings else 1
    return total - matrices * (model.padded_vocab_size - model.vocab_size) * model.hidden_size


def forward_flops_per_token(model: ModelConfig, sequence_length: float, head: HeadKind = "lm") -> float:
    """Multiplications and additions of one token's forward pass, matrix products only.

    2 a weight, and 4 a channel and key for attention, where a token of a causal sequence sees
    (sequence_length + 1) / 2 keys on average (for rows of several lengths L, sum L^2 / sum L is the length that gives
    their mean).  Norms, activations and rotations are left out, as is usual.
    """
    width, keys = model.num_attention_heads * model.head_size, model.kv_heads * model.head_size
    layer = model.hidden_size * (2 * width + 2 * keys + 3 * model.ffn_hidden_size)
    attention = 4 * width * (sequence_length + 1) / 2
    rows = model.vocab_size if head == "lm" else 1
    return model.num_layers * (2 * layer + attention) + 2 * rows * model.hidden_size


def training_flops_per_token(model: ModelConfig, sequence_length: float, head: HeadKind = "lm") -> float:
    """Forward and backward: three times the forward pass.  Recomputation is not counted, so this is for MFU."""
    return 3 * forward_flops_per_token(model, sequence_length, head)


def checkpoint_bytes(model: ModelConfig, head: HeadKind, precision: str, *, trainable: bool) -> int:
    """What one model's weights, and Adam's moments and fp32 masters, take on the disk."""
    return parameters(model, head, padded=True) * (_BYTES[precision] + trainable * _optimizer_bytes(precision))


def resume_bytes(model: ModelConfig, head: HeadKind, parallel: ParallelConfig) -> int:
    """Host memory in which each rank puts a distributed optimizer's state together to go on from a checkpoint: fp32
    masters and two moments of its tensor and pipeline shard, not sharded over data-parallel ranks."""
    return 12 * max(_stage_parameters(model, head, parallel, stage) for stage in (0, parallel.pp - 1))


def _optimizer_bytes(precision: str) -> int:
    """A parameter's two moments, and its fp32 master where the weight itself is none."""
    return 8 if precision == "fp32" else 12


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the fullest rank of one model."""

    weights: int
    gradients: int
    optimizer: int  # fp32 masters and Adam's two moments
    activations: int  # kept for the backward pass, and the largest temporary

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def describe(self) -> str:
        """One line in GiB."""
        parts = (
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("activations", self.activations),
        )
        shown = " + ".join(f"{name} {size / 2**30:.2f}" for name, size in parts)
        return f"{self.total / 2**30:.2f} GiB = {shown}"


def memory_estimate(
    model: ModelConfig,
    head: HeadKind,
    parallel: ParallelConfig,
    engine: EngineConfig,
    data_parallel: int,
    *,
    trainable: bool = True,
) -> MemoryEstimate:
    """Memory of the fullest rank: the first stage (most micro-batches in flight) or the last (the head).

    An estimate: allocator slack, communication buffers and what else the process holds come on top.
    ``data_parallel``: replicas, over which a distributed optimizer (with cp) shards its state.
    ``trainable`` False: a frozen model, which keeps weights and one micro-batch's temporaries.
    """
    stages = {0, parallel.pp - 1}
    estimates = [_stage_memory(model, head, parallel, engine, data_parallel, trainable, stage) for stage in stages]
    return max(estimates, key=lambda estimate: estimate.total)


def _stage_memory(
    model: ModelConfig,
    head: HeadKind,
    parallel: ParallelConfig,
    engine: EngineConfig,
    data_parallel: int,
    trainable: bool,
    stage: int,
) -> MemoryEstimate:
    size = _BYTES[engine.precision]
    count = _stage_parameters(model, head, parallel, stage)
    if not trainable:
        working = _layer_activations(model, parallel, engine.precision, ())
        return MemoryEstimate(count * size, 0, 0, int(working * engine.micro_batch_tokens / parallel.cp))
    shards = data_parallel * parallel.cp if engine.distributed_optimizer else 1
    return MemoryEstimate(
        weights=count * size,
        gradients=count * 4,  # reduced in fp32
        optimizer=count * _optimizer_bytes(engine.precision) // shards,
        activations=_stage_activations(model, head, parallel, engine, stage),
    )


def _stage_parameters(model: ModelConfig, head: HeadKind, parallel: ParallelConfig, stage: int) -> int:
    """Parameters of one tensor-parallel rank of a stage."""
    total = 0
    for tensor in canonical_tensors(model, head):
        numbers = prod(tensor.shape) // (1 if tensor.tp_dim is None else parallel.tp)
        if tensor.name.startswith("model.layers."):
            total += numbers / parallel.pp  # type: ignore[assignment]
        elif tensor.name == "model.embed_tokens.weight":
            tied_copy = model.tie_embeddings and head == "lm" and stage == parallel.pp - 1 and parallel.pp > 1
            total += numbers * ((stage == 0) + tied_copy)
        elif stage == parallel.pp - 1:
            total += numbers
    return int(total)


def _layer_activations(
    model: ModelConfig, parallel: ParallelConfig, precision: str, recomputed: tuple[str, ...]
) -> float:
    """Bytes a token that one layer keeps for its backward pass.

    Kept: the residual stream twice, both norms' outputs, linear_qkv's output, rotated queries and keys, attention's
    output with one fp32 number a head, linear_fc1's output (2 F), and the product that enters linear_fc2 (F).
    """
    queries, keys = model.num_attention_heads * model.head_size, model.kv_heads * model.head_size
    stream = 2 * model.hidden_size + (0 if "layernorm" in recomputed else 2 * model.hidden_size)
    attention = (queries + 2 * keys) + (queries + keys) + queries
    mlp = 0 if "mlp" in recomputed else 3 * model.ffn_hidden_size
    lse = 0 if "core_attn" in recomputed else 4 * model.num_attention_heads
    replicated = stream / (parallel.tp if parallel.sequence_parallel else 1)
    return _BYTES[precision] * (replicated + (attention + mlp) / parallel.tp) + lse / parallel.tp


def _stage_activations(
    model: ModelConfig, head: HeadKind, parallel: ParallelConfig, engine: EngineConfig, stage: int
) -> int:
    tokens = engine.micro_batch_tokens / parallel.cp
    layers = model.num_layers / parallel.pp
    whole = _layer_activations(model, parallel, engine.precision, ())
    if engine.recompute == "full":
        boundary = _BYTES[engine.precision] * model.hidden_size / (parallel.tp if parallel.sequence_parallel else 1)
        kept = boundary * layers / engine.recompute_num_layers
        working = whole * engine.recompute_num_layers
    else:
        modules = engine.recompute_modules if engine.recompute == "selective" else ()
        kept = _layer_activations(model, parallel, engine.precision, modules) * layers
        working = 0.0 if not modules else whole
    # 1F1B keeps one micro-batch for every stage from here to the end; interleaving adds the warm-up of its chunks.
    in_flight = float(parallel.pp - stage)
    if parallel.vpp > 1:
        in_flight += (parallel.pp - 1) / parallel.vpp
    total = tokens * (kept * in_flight + working)
    if head == "lm" and stage == parallel.pp - 1:
        total += 3 * 4 * _CHUNK_LOGITS  # logits, probabilities and their gradient, fp32
        total += 4 * model.padded_vocab_size * model.hidden_size / parallel.tp  # the weight's gradient, fp32
    return int(total)
