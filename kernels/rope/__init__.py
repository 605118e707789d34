"""Rotary position embedding for packed sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import arguments, dispatch
from kernels.guards import once_differentiable
from kernels.rope import reference


def rope(x_THD: Tensor, cos_PF: Tensor, sin_PF: Tensor, positions_T: Tensor, *, in_place: bool = False) -> Tensor:
    """Rotate each head's pairs (i, i + D/2) by the angle of the token's position (Su et al. 2021).

    The pairing is Hugging Face's half rotation: out = x * cos + rotate_half(x) * sin.

    Args:
        x_THD: [T, H, D] queries or keys, D even; fp16, bf16, fp32 (CPU also fp64).
        cos_PF, sin_PF: [P, D/2] tables for the positions 0 .. P-1, see ``rope_tables``.
        positions_T: [T] int32 or int64, each token's index in its own sequence, < P.  On CUDA the caller answers for
            it: to look would wait for the device, and a position beyond P reads outside the tables.
        in_place: write over x_THD; allowed only where no gradient is recorded.

    Returns:
        [T, H, D] in x's dtype; computed in fp32.  The gradient (to x only) is the opposite rotation.

    Raises:
        ValueError: shapes, dtypes, devices or (on a CPU) positions that do not fit, or in_place where x needs a
            gradient or its tokens share memory.
    """
    arguments.require_shape(x_THD, (None, None, None), "x_THD")
    _check(x_THD, x_THD.shape[2], cos_PF, sin_PF, positions_T)
    if in_place:
        recorded = torch.is_grad_enabled() and x_THD.requires_grad
        arguments.require(not recorded, "in_place rope would overwrite a tensor autograd needs; use it under no_grad")
        shared = any(size > 1 and stride == 0 for size, stride in zip(x_THD.shape, x_THD.stride(), strict=True))
        arguments.require(not shared, "in_place rope must have a place for each number of x_THD: it is expanded")
        return _rotate_in_place(x_THD, cos_PF, sin_PF, positions_T)
    backend = dispatch.backend_of(x_THD)
    if dispatch.eager(x_THD, backend) and not (torch.is_grad_enabled() and x_THD.requires_grad):
        return reference.rotate(x_THD, cos_PF, sin_PF, positions_T, 1.0)
    return _rope(x_THD, cos_PF, sin_PF, positions_T, 1.0, backend)


def split_rope(qkv_TGSD: Tensor, cos_PF: Tensor, sin_PF: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys rotated as ``rope`` does, and values, out of one projection.

    Args:
        qkv_TGSD: [T, G, H / G + 2, D]: for each of G key heads its query heads, its key, its value.
        cos_PF, sin_PF, positions_T: see ``rope``.

    Returns:
        q [T, H, D], k [T, G, D], v [T, G, D] (a view of qkv).

    Raises:
        ValueError: as ``rope``.
    """
    arguments.require_shape(qkv_TGSD, (None, None, None, None), "qkv_TGSD")
    if qkv_TGSD.shape[2] < 3:
        raise ValueError(f"qkv_TGSD must be [T, G, H / G + 2, D], got {list(qkv_TGSD.shape)}")
    tokens, _, slots, dim = qkv_TGSD.shape
    _check(qkv_TGSD, dim, cos_PF, sin_PF, positions_T)
    if dispatch.eager(qkv_TGSD, dispatch.backend_of(qkv_TGSD)):
        return _EagerSplit.apply(qkv_TGSD, cos_PF, sin_PF, positions_T)
    query, key, value = torch.split(qkv_TGSD, [slots - 2, 1, 1], dim=2)
    query = rope(query.reshape(tokens, -1, dim), cos_PF, sin_PF, positions_T)
    return query, rope(key.squeeze(2), cos_PF, sin_PF, positions_T), value.squeeze(2)


class _EagerSplit(torch.autograd.Function):
    """The torch form of ``split_rope``: each pass reads its input once and writes its outputs once."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos_PF: Tensor, sin_PF: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, groups, slots, dim = qkv.shape
        cos, sin = cos_PF[positions][:, None, None], sin_PF[positions][:, None, None]
        ctx.save_for_backward(cos, sin)
        query, key = qkv.new_empty(tokens, groups, slots - 2, dim), qkv.new_empty(tokens, groups, 1, dim)
        reference.rotate_into(qkv[:, :, :-2], cos, sin, 1.0, query)
        reference.rotate_into(qkv[:, :, -2:-1], cos, sin, 1.0, key)
        return query.view(tokens, -1, dim), key.squeeze(2), qkv[:, :, -1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dquery: Tensor, dkey: Tensor, dvalue: Tensor) -> tuple[Tensor, None, None, None]:
        tokens, groups, dim = dkey.shape
        dquery = dquery.reshape(tokens, groups, -1, dim)
        dqkv = dquery.new_empty(tokens, groups, dquery.shape[2] + 2, dim)
        cos, sin = ctx.saved_tensors
        reference.rotate_into(dquery, cos, sin, -1.0, dqkv[:, :, :-2])
        reference.rotate_into(dkey[:, :, None], cos, sin, -1.0, dqkv[:, :, -2:-1])
        dqkv[:, :, -1] = dvalue
        return dqkv, None, None, None


def _check(x: Tensor, dim: int, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    arguments.require_float(x=x, cos_PF=cos, sin_PF=sin)
    arguments.require_integer(positions_T=positions)
    arguments.require_same_device(x=x, cos=cos, sin=sin, positions=positions)
    arguments.require(dim % 2 == 0, f"the head size must be even, got {dim}")
    arguments.require_shape(cos, (None, dim // 2), "cos_PF")
    arguments.require_shape(sin, cos.shape, "sin_PF")
    arguments.require_shape(positions, (x.shape[0],), "positions_T")
    arguments.require_within(positions, cos.shape[0], "positions_T")


def rope_tables(inverse_frequencies_F: Tensor, num_positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin of position x inverse frequency, [P, D/2] fp32, for the positions 0 .. P-1.

    ``inverse_frequencies_F``: [D/2] radians a token, scaling (linear, llama3) already applied.
    """
    positions_P = torch.arange(num_positions, dtype=torch.float64, device=inverse_frequencies_F.device)
    angles_PF = positions_P[:, None] * inverse_frequencies_F.to(torch.float64)[None, :]
    return angles_PF.cos().to(torch.float32), angles_PF.sin().to(torch.float32)


def _rotate_in_place(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    if dispatch.backend_of(x) == "triton" and x.stride(2) == 1:
        dispatch.triton_form("rope").rotate_into(x, cos, sin, positions, 1.0, x)
        torch.autograd.graph.increment_version(x)  # who kept x for a backward pass hears of it
        return x
    return x.copy_(reference.rotate(x, cos, sin, positions, 1.0))


@torch.library.custom_op("zj::rope", mutates_args=())
def _rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, sign: float, backend: str) -> Tensor:
    form = dispatch.triton_form("rope") if backend == "triton" else reference
    return form.rotate(x, cos, sin, positions, sign)


@_rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, sign: float, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, positions, ctx.sign, ctx.backend = inputs
    ctx.save_for_backward(cos, sin, positions)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return _rope(dy, *ctx.saved_tensors, -ctx.sign, ctx.backend), None, None, None, None, None


_rope.register_autograd(_gradient, setup_context=_save)
