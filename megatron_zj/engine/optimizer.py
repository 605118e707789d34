"""AdamW by megatron-core: built on one placement, stepped with a clip, a schedule and a loss scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from megatron_zj.config.optim import EngineConfig, OptimConfig
from megatron_zj.engine.schedule import LearningRate
from megatron_zj.models.transformer_config import DTYPES
from megatron_zj.parallel.groups import ParallelGroups, placement_world


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did."""

    lr: float
    grad_norm: float  # before the clip; 0 where the step was skipped
    skipped: bool  # fp16: some gradient overflowed, the weights stay and the loss scale may fall


class Optimizer:
    """Megatron-core's optimizer of all the chunks of a rank, with the schedule that drives it."""

    def __init__(
        self,
        chunks: list[DistributedDataParallel],
        groups: ParallelGroups,
        engine: EngineConfig,
        optim: OptimConfig,
        learning_rate: LearningRate,
    ) -> None:
        self.optim = optim
        self.learning_rate = learning_rate
        self.steps = 0  # optimizer steps taken, skipped ones not counted
        self._sum_to_mean = _sum_to_mean(engine)
        with placement_world(groups):  # construction gathers the parameter groups over the default group
            chained = get_megatron_optimizer(
                _config(engine, optim), chunks, use_gloo_process_groups=False, pg_collection=groups.pgc
            )
        self.chained = chained
        self.inner = chained.chained_optimizers[0]  # no experts: there is exactly one
        self.adam: torch.optim.Optimizer = self.inner.optimizer
        if isinstance(self.adam, torch.optim.AdamW):
            for group in self.adam.param_groups:
                group["fused"], group["foreach"] = True, False  # one kernel a group, on CPU and CUDA alike

    @property
    def loss_scale(self) -> float:
        """What a full micro-batch's mean loss is multiplied with before the backward pass (1 except in fp16)."""
        return float(self.chained.get_loss_scale().item()) * self._sum_to_mean

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The summed loss times its scale."""
        scaled: Tensor = self.chained.scale_loss(loss)
        return scaled

    def zero_grad(self) -> None:
        """Forget the gradients of the last step (the buffers are DDP's)."""
        self.chained.zero_grad(set_to_none=True)

    def tensors(self) -> list[Tensor]:
        """Everything it holds: main weights (or the model's own, in fp32) and moments."""
        weights = [parameter for group in self.adam.param_groups for parameter in group["params"]]
        moments = [value for state in self.adam.state.values() for value in state.values() if torch.is_tensor(value)]
        return [*weights, *moments]

    def reload_main_weights(self) -> None:
        """Main (fp32) weights anew from the model's: call it after weights were written into the model."""
        self.chained.reload_model_params()

    @torch.no_grad()
    def step(self, check_finite: bool) -> StepReport:
        """Clip and step; collective over the placement.

        Raises FloatingPointError on a NaN or Inf gradient norm, where there is no loss scale to lower, before any
        weight is touched (on all ranks alike).
        """
        lr = self.learning_rate.at(self.steps)
        for group in self.adam.param_groups:
            group["lr"] = lr
            # Megatron-core leaves the multiplier (0 for norms and biases) to whoever drives the schedule.
            group["weight_decay"] = self.optim.weight_decay * group["wd_mult"]
        if self.chained.prepare_grads():
            return StepReport(lr, 0.0, skipped=True)
        grad_norm = float(self.chained.get_grad_norm())
        if check_finite and not math.isfinite(grad_norm):
            raise FloatingPointError(f"the gradient norm is {grad_norm}")
        parameters = self.inner.get_parameters()
        if self.optim.clip_grad > 0 and parameters:
            clip_grad_by_total_norm_fp32(parameters, self.optim.clip_grad, grad_norm)
        self.chained.step_with_ready_grads()
        self.steps += 1
        return StepReport(lr, grad_norm, skipped=False)


def _sum_to_mean(engine: EngineConfig) -> float:
    """Loss scales are meant for means, but our losses are sums over a micro-batch, thousands of times as large.

    The scale of the sum is the configured one by the budget of a micro-batch, rounded up to a power of two.  Without
    it, fp16's first gradients (65536 times a token's) overflow at once.
    """
    if engine.precision != "fp16":
        return 1.0
    return float(2 ** math.ceil(math.log2(engine.micro_batch_tokens)))


def _config(engine: EngineConfig, optim: OptimConfig) -> Any:
    scale, divisor = engine.loss_scale, _sum_to_mean(engine)
    return OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        fp16=engine.precision == "fp16",
        bf16=engine.precision == "bf16",
        params_dtype=DTYPES[engine.precision],
        use_distributed_optimizer=engine.distributed_optimizer,
        overlap_param_gather=engine.overlap_param_gather,
        loss_scale=scale.initial / divisor if engine.precision == "fp16" and scale.window == 0 else None,
        initial_loss_scale=scale.initial / divisor,
        min_loss_scale=scale.minimum / divisor,
        loss_scale_window=max(1, scale.window),
        hysteresis=scale.hysteresis,
    )
