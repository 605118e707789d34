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

_MAX_OVERFLOWS = 10  # in a row, at a loss scale that cannot fall


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did."""

    lr: float
    grad_norm: float  # before the clip; 0 where fp16 overflowed
    skipped: bool  # some gradient overflowed (fp16: the loss scale may fall) or is no number; the weights stay


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
        # a constant scale is as low as it gets
        self._lowest_scale = engine.loss_scale.minimum if engine.loss_scale.window else math.inf
        self._overflows = 0  # in a row, at that scale
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
        """Clip and step; collective over the placement.  A gradient that is no number never reaches a weight.

        ``check_finite``: raises FloatingPointError on a NaN or Inf gradient norm, and after 10 overflows in a row at
        a loss scale that cannot fall any more (on all ranks alike).  Without it such steps are skipped.
        """
        lr = self.learning_rate.at(self.steps)
        for group in self.adam.param_groups:
            group["lr"] = lr
            # Megatron-core leaves the multiplier (0 for norms and biases) to whoever drives the schedule.
            group["weight_decay"] = self.optim.weight_decay * group["wd_mult"]
        stuck = self.loss_scale <= self._lowest_scale
        if self.chained.prepare_grads():
            self._overflows = self._overflows + 1 if stuck else 0
            if check_finite and self._overflows >= _MAX_OVERFLOWS:
                raise FloatingPointError(
                    f"the last {self._overflows} gradients in a row overflowed at a loss scale of {self.loss_scale:g}, "
                    "which cannot fall: no scale makes numbers of them"
                )
            return StepReport(lr, 0.0, skipped=True)
        self._overflows = 0
        grad_norm = float(self.chained.get_grad_norm())
        if not math.isfinite(grad_norm):
            if check_finite:
                raise FloatingPointError(f"the gradient norm is {grad_norm}")
            return StepReport(lr, grad_norm, skipped=True)
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
