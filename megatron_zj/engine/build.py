"""Puts an engine together: random states, stages, gradient buffers, optimizer, schedule."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch.nn import Module

from megatron_zj.config.model import HeadKind, ModelConfig
from megatron_zj.config.optim import EngineConfig, OptimConfig
from megatron_zj.engine.engine import Engine, seed_tracker
from megatron_zj.engine.optimizer import Optimizer
from megatron_zj.engine.schedule import LearningRate
from megatron_zj.models.canonical import canonical_names, canonical_tensors
from megatron_zj.models.llama import LlamaStage, build_stages
from megatron_zj.parallel.groups import ParallelGroups
from megatron_zj.runtime.seed import keyed_seed


def build_engine(
    model: ModelConfig,
    head: HeadKind,
    groups: ParallelGroups,
    engine_config: EngineConfig,
    optim: OptimConfig | None,
    num_steps: int,
    device: torch.device,
    seed: int,
    *,
    awaits_weights: bool = False,
) -> Engine:
    """An engine with freshly initialised weights; collective over the placement.

    ``optim`` None: a frozen model.  ``num_steps``: optimizer steps of the run, for the learning-rate schedule.
    ``awaits_weights``: the next thing is ``load_sharded_state``; until then the weights are NaN, but for a scalar head.
    """
    seed_tracker(keyed_seed(seed, "tracker"), groups)
    stages = build_stages(model, head, groups, engine_config, device, seed, awaits_weights=awaits_weights)
    chunks: list[Module] = list(stages)
    config: Any = stages[0].config
    _set_schedule(config, groups)
    if optim is None:
        for chunk in chunks:
            chunk.requires_grad_(False)
        return Engine(model, head, groups, engine_config, chunks, [], None, device, seed)
    for stage in stages:
        _mark_sharded(stage)
    wrapped = [_wrap(config, engine_config, groups, chunk, first=index == 0) for index, chunk in enumerate(chunks)]
    optimizer = Optimizer(wrapped, groups, engine_config, optim, LearningRate.from_config(optim, num_steps))
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss if engine_config.precision == "fp16" else None
    if engine_config.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync[0] if len(no_sync) == 1 else no_sync
    return Engine(model, head, groups, engine_config, chunks, wrapped, optimizer, device, seed)


def _mark_sharded(stage: LlamaStage) -> None:
    """Tell megatron-core which parameters tensor parallelism cuts.

    It marks them only when it initialises them itself; unmarked, all but tensor rank 0's share of a parameter counts
    as a duplicate, and the gradient norm, and so the clip, come out too small without a word.
    """
    cut = {tensor.name: tensor.tp_dim for tensor in canonical_tensors(stage.model, stage.head)}
    for name, parameter in stage.named_parameters():
        dim = cut[canonical_names(name, 0, stage.model, stage.head)[0]]
        if not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameter, dim is not None, dim or 0, 1)


def _wrap(
    config: Any, engine_config: EngineConfig, groups: ParallelGroups, chunk: Module, *, first: bool
) -> DistributedDataParallel:
    buffers = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=engine_config.overlap_grad_reduce,
        overlap_param_gather=engine_config.overlap_param_gather,
        use_distributed_optimizer=engine_config.distributed_optimizer,
        # Gradients are sums, divided once by the global weight; and megatron-core's own NaN check dies on the
        # overflows that fp16's loss scaling lives with.  The engine checks the loss and the gradient norm itself.
        average_in_collective=False,
        check_for_nan_in_grad=False,
    )
    # Only the first chunk's communication is on the critical path.
    return DistributedDataParallel(config, buffers, chunk, disable_bucketing=not first, pg_collection=groups.pgc)


def _set_schedule(config: Any, groups: ParallelGroups) -> None:
    """What the engine's results rest on, whoever wrote the rest of the configuration.

    Raises ValueError for fused cross-entropy (its "native" form rounds gradients to bf16 even in fp32) and for
    gradient accumulation fusion (needs a CUDA extension, and there is no fallback).
    """
    for name in ("cross_entropy_loss_fusion", "gradient_accumulation_fusion"):
        if getattr(config, name):
            raise ValueError(f"{name} must be off in the model's megatron-core configuration")
    config.calculate_per_token_loss = True
    config.variable_seq_lengths = False
    interleaved = groups.vpp_size > 1
    # A stage's output is freed once it is sent.  Interleaved stages free it while the message is still on its way:
    # fine in the order of a CUDA stream, a read of freed memory with gloo.
    early = interleaved and dist.get_backend(groups.pgc.pp) == "gloo"
    config.deallocate_pipeline_outputs = groups.pp_size > 1 and not early
    # Interleaved stages with batched messages at pp = 2 pair a forward activation with a backward gradient, silently.
    config.overlap_p2p_comm, config.batch_p2p_comm = interleaved, not interleaved
