"""Attention over packed sequences, and its decoding form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import arguments, dispatch
from kernels.attention import reference
from kernels.guards import once_differentiable


def attention(
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    window: int | None = None,
    q_slots: Tensor | None = None,
    cu_seqlens_q_list: Sequence[int] | None = None,
    cu_seqlens_k_list: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v within each sequence of a pack.

    Args:
        q_THD: [T, H, D] queries, fp16, bf16, fp32 (CPU also fp64); any stride (but on D, 1 saves a copy).
        k_SKD, v_SKD: [S, K, D] keys and values; K divides H, query head h reads key head h // (H / K).
        cu_seqlens_q: [sequences + 1] int32 or int64, where each sequence starts in T, and T.  None: dense input, q is
            [B, T, H, D] and k, v are [B, S, K, D].
        cu_seqlens_k: the same for S; None: cu_seqlens_q.
        causal: a query sees the keys up to its own position.  By default the last query of a sequence stands at the
            last key (bottom-right aligned); queries before the first key see nothing.
        softmax_scale: multiplies q k^T; None: D ** -0.5.
        window: with causal only: a query sees this many keys, its own included (sliding window), 1 or more; None: all.
        q_slots: [T] int32 or int64, with causal only: the index in S of each query's own token, rising within each
            sequence and inside it.  This is what context parallelism gives: local queries, gathered keys, and
            ``PackedBatch.slots``.  The Triton form does not look (it would wait for the device): others give wrong
            numbers there, never a read outside the keys.
        cu_seqlens_q_list, cu_seqlens_k_list: the same numbers on the host; without them, the device is waited for.

    Returns:
        out, shaped and typed as q_THD, and lse [H, T] fp32 (dense: [B, H, T]): the natural log of the sum of
        exponentials of the scaled scores.  A query that sees no key gets 0 and -inf.  lse carries no gradient.

    Raises:
        ValueError: shapes, dtypes, devices or sequence ends that do not fit together.
        NotImplementedError: a head size or dtype the Triton kernels do not take.

    Formula: Dao et al. 2022 (FlashAttention) and Dao 2023 (FlashAttention-2).  The backward pass is deterministic.
    """
    if cu_seqlens_q is None:
        return _dense(q_THD, k_SKD, v_SKD, cu_seqlens_k, causal, softmax_scale, window, q_slots)
    if cu_seqlens_k is None:
        cu_seqlens_k, cu_seqlens_k_list = cu_seqlens_q, cu_seqlens_q_list
    _check(q_THD, k_SKD, v_SKD, cu_seqlens_q, cu_seqlens_k, causal, window, q_slots)
    ends_q = arguments.host_ends(cu_seqlens_q, cu_seqlens_q_list, q_THD.shape[0], "cu_seqlens_q")
    ends_k = arguments.host_ends(cu_seqlens_k, cu_seqlens_k_list, k_SKD.shape[0], "cu_seqlens_k")
    scale = q_THD.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    backend = dispatch.backend_of(q_THD)
    if dispatch.eager(q_THD, backend):
        host = _host(cu_seqlens_q, cu_seqlens_k, q_slots, ends_q, ends_k)
        return _Eager.apply(q_THD, k_SKD, v_SKD, (*host, scale, causal, window or 0))
    return _attention(
        q_THD, k_SKD, v_SKD, cu_seqlens_q, cu_seqlens_k, q_slots, ends_q, ends_k, scale, causal, window or 0, backend
    )


class _Eager(torch.autograd.Function):
    """The torch form."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, settings: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        out, lse = reference.forward(q, k, v, *settings)
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = settings
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Any, ...]:
        return *reference.backward(dout.contiguous(), *ctx.saved_tensors, *ctx.settings), None


def decode_attention(
    q_RHD: Tensor,
    k_cache_RSKD: Tensor,
    v_cache_RSKD: Tensor,
    lengths_R: Tensor,
    *,
    softmax_scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of one new token a row against that row's key/value cache; no gradient.

    Args:
        q_RHD: [R, H, D] the query of each row's newest token.
        k_cache_RSKD, v_cache_RSKD: [R, S, K, D], any stride (but on D, 1 saves a copy); slots at and after a row's
            length may hold anything finite.
        lengths_R: [R] int32 or int64 on the tensors' device: keys of each row, the newest token's included.
            A row of length 0 gets 0.  At most S: the Triton form does not look (it would wait for the device) and
            takes a longer row for one of S keys.
        softmax_scale: multiplies q k^T; None: D ** -0.5.
        window: only the last ``window`` keys of a row are seen; None: all.

    Returns:
        [R, H, D] in q's dtype.

    Raises:
        ValueError: shapes, dtypes, devices or (torch form) lengths that do not fit together.
    """
    arguments.require_float(q_RHD=q_RHD, k_cache_RSKD=k_cache_RSKD, v_cache_RSKD=v_cache_RSKD)
    arguments.require_integer(lengths_R=lengths_R)
    arguments.require_same_device(q=q_RHD, k_cache=k_cache_RSKD, v_cache=v_cache_RSKD, lengths=lengths_R)
    arguments.require_shape(q_RHD, (None, None, None), "q_RHD")
    num_rows, num_heads, dim = q_RHD.shape
    arguments.require_shape(k_cache_RSKD, (num_rows, None, None, dim), "k_cache_RSKD")
    arguments.require_shape(v_cache_RSKD, k_cache_RSKD.shape, "v_cache_RSKD")
    arguments.require_shape(lengths_R, (num_rows,), "lengths_R")
    _check_heads(num_heads, k_cache_RSKD.shape[2], dim)
    dtypes = q_RHD.dtype, k_cache_RSKD.dtype, v_cache_RSKD.dtype
    if len(set(dtypes)) != 1:
        raise ValueError(f"q and the caches must share a dtype, got {dtypes}")
    arguments.require_window(window)
    scale = dim**-0.5 if softmax_scale is None else float(softmax_scale)
    backend = dispatch.backend_of(q_RHD)
    with torch.no_grad():
        if dispatch.eager(q_RHD, backend):
            return reference.decode(q_RHD, k_cache_RSKD, v_cache_RSKD, lengths_R, scale, window or 0)
        return _decode(q_RHD, k_cache_RSKD, v_cache_RSKD, lengths_R, scale, window or 0, backend)


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float | None,
    window: int | None,
    q_slots: Tensor | None,
) -> tuple[Tensor, Tensor]:
    arguments.require_shape(q, (None, None, None, None), "q, without cu_seqlens,")
    arguments.require(cu_seqlens_k is None and q_slots is None, "cu_seqlens_k and q_slots need cu_seqlens_q")
    arguments.require_shape(k, (q.shape[0], None, None, q.shape[3]), "k")
    arguments.require_shape(v, k.shape, "v")
    rows = q.shape[0]
    ends_q, ends_k = ([row * x.shape[1] for row in range(rows + 1)] for x in (q, k))
    out, lse = attention(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        torch.arange(rows + 1, dtype=torch.int32, device=q.device) * q.shape[1],
        torch.arange(rows + 1, dtype=torch.int32, device=q.device) * k.shape[1],
        causal=causal,
        softmax_scale=scale,
        window=window,
        cu_seqlens_q_list=ends_q,
        cu_seqlens_k_list=ends_k,
    )
    return out.view(q.shape), lse.view(q.shape[2], rows, q.shape[1]).transpose(0, 1)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    window: int | None,
    q_slots: Tensor | None,
) -> None:
    arguments.require_float(q_THD=q, k_SKD=k, v_SKD=v)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    arguments.require_integer(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **arguments.given(q_slots=q_slots))
    arguments.require_same_device(q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, q_slots=q_slots)
    arguments.require_shape(q, (None, None, None), "q_THD")
    arguments.require_shape(k, (None, None, q.shape[2]), "k_SKD")
    arguments.require_shape(v, k.shape, "v_SKD")
    _check_heads(q.shape[1], k.shape[1], q.shape[2])
    arguments.require_shape(cu_seqlens_q, (None,), "cu_seqlens_q")
    arguments.require_shape(cu_seqlens_k, cu_seqlens_q.shape, "cu_seqlens_k")
    arguments.require_window(window)
    arguments.require(window is None or causal, "a window must be causal")
    if q_slots is not None:
        arguments.require(causal, "q_slots is for causal attention")
        arguments.require_shape(q_slots, (q.shape[0],), "q_slots")


def _check_heads(num_heads: int, num_kv: int, dim: int) -> None:
    arguments.require(dim > 0, "the head size must be 1 or more")
    fits = num_kv > 0 and num_heads % num_kv == 0
    arguments.require(fits, f"{num_heads} query heads are not a multiple of {num_kv} key heads")


@torch.library.custom_op("zj::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    q_slots: Tensor | None,
    ends_q: Sequence[int] | None,
    ends_k: Sequence[int] | None,
    scale: float,
    causal: bool,
    window: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        return dispatch.triton_form("attention").forward(
            q, k, v, cu_q, cu_k, q_slots, ends_q, ends_k, scale, causal, window
        )
    return reference.forward(q, k, v, *_host(cu_q, cu_k, q_slots, ends_q, ends_k), scale, causal, window)


@torch.library.custom_op("zj::attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    q_slots: Tensor | None,
    ends_q: Sequence[int] | None,
    ends_k: Sequence[int] | None,
    scale: float,
    causal: bool,
    window: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "triton":
        return dispatch.triton_form("attention").backward(
            dout, q, k, v, out, lse, cu_q, cu_k, q_slots, ends_q, ends_k, scale, causal, window
        )
    host = _host(cu_q, cu_k, q_slots, ends_q, ends_k)
    return reference.backward(dout, q, k, v, out, lse, *host, scale, causal, window)


def _host(
    cu_q: Tensor, cu_k: Tensor, q_slots: Tensor | None, ends_q: Sequence[int] | None, ends_k: Sequence[int] | None
) -> tuple[Sequence[int], Sequence[int], Sequence[int] | None]:
    slots = None if q_slots is None else q_slots.tolist()
    return ends_q or cu_q.tolist(), ends_k or cu_k.tolist(), slots


@_attention.register_fake
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=dtype)


@_attention_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, q_slots, *settings = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k, q_slots)
    ctx.settings = settings


def _gradients(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Any, ...]:
    grads = _attention_backward(dout.contiguous(), *ctx.saved_tensors, *ctx.settings)
    return (*grads, *[None] * 9)


_attention.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("zj::decode_attention", mutates_args=())
def _decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float, window: int, backend: str
) -> Tensor:
    form = dispatch.triton_form("attention") if backend == "triton" else reference
    return form.decode(q, k_cache, v_cache, lengths, scale, window)


@_decode.register_fake
def _(q: Tensor, *args: Any) -> Tensor:
    return q.new_empty(q.shape)
