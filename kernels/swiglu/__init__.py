"""The gated activation of LLaMA's MLP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import arguments, dispatch
from kernels.guards import once_differentiable
from kernels.swiglu import reference


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, with gate and up the two halves of the last dimension (Shazeer 2020).

    Args:
        gate_up: [..., 2F], fp16, bf16, fp32 (CPU also fp64); the gate comes first.  With tensor parallelism a rank's
            2F are its own gate columns, then its own up columns.

    Returns:
        [..., F] in the same dtype.

    Raises:
        ValueError: not a float tensor, or an odd last dimension.
    """
    arguments.require_float(gate_up=gate_up)
    if gate_up.dim() < 1 or gate_up.shape[-1] % 2:
        raise ValueError(f"the last dimension must hold gate and up, got {list(gate_up.shape)}")
    backend = dispatch.backend_of(gate_up)
    return _Eager.apply(gate_up) if dispatch.eager(gate_up, backend) else _swiglu(gate_up, backend)


class _Eager(torch.autograd.Function):
    """The torch form; silu(gate) is kept rather than computed twice."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        if not ctx.needs_input_grad[0]:
            return reference.forward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        activated = torch.nn.functional.silu(gate)
        ctx.save_for_backward(gate_up, activated)
        return activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return reference.backward(dy, *ctx.saved_tensors)


@torch.library.custom_op("zj::swiglu", mutates_args=())
def _swiglu(gate_up: Tensor, backend: str) -> Tensor:
    form = dispatch.triton_form("swiglu") if backend == "triton" else reference
    return form.forward(gate_up)


@torch.library.custom_op("zj::swiglu_backward", mutates_args=())
def _swiglu_backward(dy: Tensor, gate_up: Tensor, backend: str) -> Tensor:
    form = dispatch.triton_form("swiglu") if backend == "triton" else reference
    return form.backward(dy, gate_up)


@_swiglu.register_fake
def _(gate_up: Tensor, backend: str) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@_swiglu_backward.register_fake
def _(dy: Tensor, gate_up: Tensor, backend: str) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.backend = inputs[1]


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return _swiglu_backward(dy, ctx.saved_tensors[0], ctx.backend), None


_swiglu.register_autograd(_gradient, setup_context=_save)
