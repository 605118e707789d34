"""A stand-in for the FusedAdam of NVIDIA apex (and Transformer Engine).

What differs from torch's AdamW, by apex/optimizers/fused_adam.py and csrc/multi_tensor_adam.cu: the count of steps is
the group's and there is none in a parameter's state, the decay is part of the update, ``zero_grad`` has no argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):
    """Adam with decoupled weight decay, eagerly."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
    ) -> None:
        assert bias_correction
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.adam_w_mode = 1 if adam_w_mode else 0

    def zero_grad(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group["step"] + 1 if "step" in group else 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter).float()
            state["exp_avg_sq"] = torch.zeros_like(parameter).float()
        gradient, weight = parameter.grad.float(), parameter.float()
        if not self.adam_w_mode:
            gradient = gradient + group["weight_decay"] * weight
        state["exp_avg"].copy_(beta1 * state["exp_avg"] + (1 - beta1) * gradient)
        state["exp_avg_sq"].copy_(beta2 * state["exp_avg_sq"] + (1 - beta2) * gradient * gradient)
        first = state["exp_avg"] / (1 - beta1 ** group["step"])
        second = state["exp_avg_sq"] / (1 - beta2 ** group["step"])
        update = first / (second.sqrt() + group["eps"])
        if self.adam_w_mode:
            update += group["weight_decay"] * weight
        parameter.copy_(weight - group["lr"] * update)
