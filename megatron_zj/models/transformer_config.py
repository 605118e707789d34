"""Our configuration into megatron-core's ``TransformerConfig``, with every layout checked in our own words."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from kernels import dispatch
from megatron_zj.config.derived import fp8_misfits, misfits
from megatron_zj.config.model import ModelConfig
from megatron_zj.config.optim import EngineConfig
from megatron_zj.config.parallel import ParallelConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class LlamaConfig(TransformerConfig):  # type: ignore[misc]
    """megatron-core's configuration and ours.  The engine hangs callbacks on it, so two models never share one."""

    kernels: Literal["auto", "triton", "torch", "te"] = "auto"

    def kernel_backend(self) -> AbstractContextManager[None]:
        """Where an operator of ``kernels`` runs.

        Entered in the modules themselves, not around the model: a recomputed module runs in the backward pass.
        """
        return kernel_backend(self.kernels)


def kernel_backend(kernels: Literal["auto", "triton", "torch", "te"]) -> AbstractContextManager[None]:
    """Where operators of ``kernels`` run inside, by ``model.kernels``; auto and te leave it to the device."""
    if kernels in ("auto", "te"):
        return nullcontext()
    return dispatch.use("triton" if kernels == "triton" else "torch")


def check_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raise ValueError, naming what to change, when this layout cannot hold this model."""
    problems = [message for _, message in misfits(model, parallel)]
    problems += [f"{setting}: {message}" for setting, message in fp8_misfits(model, parallel)]
    if problems:
        raise ValueError("\n".join(problems))


def transformer_config(model: ModelConfig, parallel: ParallelConfig, engine: EngineConfig) -> LlamaConfig:
    """A fresh configuration.  Raises ValueError for a layout the model does not fit."""
    check_layout(model, parallel)
    layers = model.num_layers // (parallel.pp * parallel.vpp)
    if engine.recompute == "full" and layers % engine.recompute_num_layers:
        raise ValueError(
            f"recompute_num_layers {engine.recompute_num_layers} does not divide the {layers} layers of a pipeline "
            "chunk; change it or the layout"
        )
    dtype = DTYPES[engine.precision]
    return LlamaConfig(
        kernels=model.kernels,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=True,  # megatron-core's hook for an activation module in the spec; ours (kernels.swiglu)
        add_bias_linear=False,
        hidden_dropout=model.dropout,
        attention_dropout=0.0,
        perform_initialization=False,  # init_stage writes every parameter
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=engine.precision == "bf16",
        fp16=engine.precision == "fp16",
        # A loss is a sum with a weight, divided once by the global weight.
        calculate_per_token_loss=True,
        # Interleaved stages with batched point-to-point pair the wrong messages at pp=2, silently.
        overlap_p2p_comm=parallel.vpp > 1,
        batch_p2p_comm=parallel.vpp == 1,
        moe_token_dispatcher_type="alltoall",  # no experts here; the other value forbids variable_seq_lengths
        # Fusions that need CUDA extensions, or that our own layer replaces.
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        cross_entropy_loss_fusion=False,
        transformer_impl="transformer_engine" if model.kernels == "te" else "local",
        fp8=None if model.fp8 == "none" else model.fp8,
        # Scales of each tensor as it is.  The default, delayed scaling, agrees on a history of scales over all ranks
        # after each micro-batch, and ours are not equally many on all ranks: it would hang.
        fp8_recipe="tensorwise",
        recompute_granularity=None if engine.recompute == "none" else engine.recompute,
        recompute_method="uniform" if engine.recompute == "full" else None,
        recompute_num_layers=engine.recompute_num_layers if engine.recompute == "full" else None,
        recompute_modules=list(engine.recompute_modules) if engine.recompute == "selective" else None,
    )
