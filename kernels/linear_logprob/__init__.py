"""Token log-probabilities and entropies straight from hidden states: no large number of logits ever exists.

The vocabulary may be sharded over ranks.  Each rank computes three numbers a token over its own rows of the weight
(``linear_logprob_partials``); ``combine_partials`` makes log-probabilities and entropies of them with two
all-reduces, which the caller brings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import arguments, dispatch
from kernels.guards import once_differentiable
from kernels.linear_logprob import reference


class Partials(NamedTuple):
    """What one vocabulary shard says of each token, [T] fp32: over the logits z of its own rows,"""

    lse: Tensor  # log sum exp z
    target: Tensor  # z of the target; 0 where the target is on another shard
    entropy: Tensor  # -sum p log p of the shard's own softmax p; 0 where it is not asked for


def linear_logprob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    temperature: float = 1.0,
    mask_T: Tensor | None = None,
    valid_rows: int | None = None,
    entropy: bool = True,
    ignore_index: int | None = -100,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each prediction, for an unsharded vocabulary.

    Arguments and errors as in ``linear_logprob_partials``, and besides:

    Args:
        ignore_index: tokens with this target are masked; None: no target says so.

    Returns:
        logprob [T] and entropy [T] in nats, fp32; masked tokens hold 0, and so does entropy where it is not asked
        for.  logprob <= 0 and 0 <= entropy <= log V.

    Raises:
        ValueError: a vocabulary without a row; on a CPU a target that is no row and not masked.  On CUDA, where to
            look would wait for the device, such a token's logprob is that of a logit of 0.
    """
    _check(hidden_TD, weight_VD, targets_T, temperature, mask_T)
    rows = weight_VD.shape[0] if valid_rows is None else valid_rows
    if rows <= 0:
        raise ValueError(f"the vocabulary must have a row, got weight {list(weight_VD.shape)}, {rows} valid")
    if ignore_index is not None:
        counted_T = targets_T != ignore_index
        mask_T = counted_T if mask_T is None else mask_T & counted_T
    arguments.require_within(targets_T, rows, "targets_T", mask_T)
    partials = linear_logprob_partials(
        hidden_TD,
        weight_VD,
        targets_T,
        temperature=temperature,
        mask_T=mask_T,
        valid_rows=valid_rows,
        entropy=entropy,
    )
    return combine_partials(partials)


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    mask_T: Tensor | None = None,
    valid_rows: int | None = None,
    ignore_index: int | None = -100,
) -> Tensor:
    """Cross-entropy of each token in nats, [T] fp32, 0 where masked: what SFT and pre-training minimise.

    Memory: O(T + V D) and a bounded number of logits.  Arguments and errors as in ``linear_logprob``.
    """
    logprob, _ = linear_logprob(
        hidden_TD,
        weight_VD,
        targets_T,
        mask_T=mask_T,
        valid_rows=valid_rows,
        entropy=False,
        ignore_index=ignore_index,
    )
    return -logprob


def linear_logprob_partials(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    temperature: float = 1.0,
    mask_T: Tensor | None = None,
    vocab_start: int = 0,
    valid_rows: int | None = None,
    entropy: bool = True,
) -> Partials:
    """One vocabulary shard's share of log-probability and entropy.

    Args:
        hidden_TD: [T, D] fp16, bf16, fp32 (CPU also fp64); any row stride.
        weight_VD: [V, D] this shard's rows of the output matrix, any of those dtypes.  Products are of operands in
            hidden's dtype (on CPU: of both in fp32), summed in fp32.
        targets_T: [T] int32 or int64, ids over the whole vocabulary.
        temperature: logits are divided by it; > 0.
        mask_T: [T] bool; False: the token is ignored (all three partials 0, no gradient, and its target may be
            anything).  None: no token is.
        vocab_start: the id of the shard's first row.
        valid_rows: rows of the shard that are real; the rest is padding with probability 0.  None: all.
        entropy: whether ``entropy`` is computed.

    Returns:
        Partials, [T] fp32 each.  Gradients flow to hidden_TD and weight_VD.  Over ranks hidden's gradient is a
        partial sum: the caller all-reduces it (its copy-to-tensor-parallel region does).

    Raises:
        ValueError: shapes, dtypes, devices, a temperature or valid_rows that do not fit.
    """
    _check(hidden_TD, weight_VD, targets_T, temperature, mask_T)
    rows = weight_VD.shape[0]
    valid = rows if valid_rows is None else valid_rows
    arguments.require(0 <= valid <= rows, f"valid_rows must be 0 .. {rows}, got {valid}")
    backend = dispatch.backend_of(hidden_TD)
    settings = (vocab_start, valid, float(temperature), entropy)
    if dispatch.eager(hidden_TD, backend):
        return Partials(*_Eager.apply(hidden_TD, weight_VD, targets_T, mask_T, settings, torch.is_grad_enabled()))
    return Partials(*_partials(hidden_TD, weight_VD, targets_T, mask_T, *settings, backend))


def combine_partials(
    partials: Partials,
    all_reduce_max: Callable[[Tensor], Tensor] | None = None,
    all_reduce_sum: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy, [T], from every shard's partials: two all-reduces.

    Args:
        partials: this rank's.
        all_reduce_max: element-wise maximum over the tensor-parallel group of a [T] tensor without gradient.
        all_reduce_sum: sum over the group of a [3, T] tensor; differentiable, with the identity as its backward pass
            (every rank computes the same loss).  None for both: one shard.

    Returns:
        logprob <= 0 and entropy >= 0 in nats, the same on every rank.

    With lse = log sum_i exp lse_i and w_i = exp(lse_i - lse): logprob = sum_i target_i - lse,
    entropy = sum_i w_i (entropy_i - log w_i): no difference of large numbers.
    """
    lse, target, entropy = partials
    if all_reduce_max is not None and all_reduce_sum is not None:
        highest = all_reduce_max(lse.detach())
        log_share = (lse - highest).clamp(min=-200.0)  # a shard of padding has -inf, and 0 * -inf is not 0
        share = torch.exp(log_share)
        terms = torch.stack((share, share * (entropy - log_share), target))
        total, weighted, target = all_reduce_sum(terms).unbind(0)
        lse = highest + torch.log(total)
        entropy = weighted / total + torch.log(total)
    # A sum of rounded terms can step over the bound by an ulp; the gradient passes unchanged.
    logprob = target - lse
    logprob = logprob - logprob.detach().clamp(min=0.0)
    entropy = entropy - entropy.detach().clamp(max=0.0)
    return logprob, entropy


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, mask: Tensor | None) -> None:
    arguments.require_float(hidden_TD=hidden, weight_VD=weight)
    arguments.require_integer(targets_T=targets)
    arguments.require_same_device(hidden=hidden, weight=weight, targets=targets, mask=mask)
    arguments.require_shape(hidden, (None, None), "hidden_TD")
    arguments.require_shape(weight, (None, hidden.shape[1]), "weight_VD")
    arguments.require_shape(targets, (hidden.shape[0],), "targets_T")
    arguments.require(temperature > 0, f"temperature must be > 0, got {temperature}")
    if mask is not None:
        arguments.require_shape(mask, (hidden.shape[0],), "mask_T")
        arguments.require(mask.dtype == torch.bool, f"mask_T must be bool, got {mask.dtype}")


class _Eager(torch.autograd.Function):
    """The torch form; where the logits are few, their exponentials wait for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        mask: Tensor | None,
        settings: tuple[int, int, float, bool],
        recorded: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kept: list[reference.Kept] | None = [] if recorded and any(ctx.needs_input_grad) else None
        lse, target, spread = reference.forward(hidden, weight, targets, mask, *settings, kept)
        ctx.save_for_backward(hidden, weight, targets, mask, lse, spread, *(kept[0] if kept else ()))
        ctx.settings = settings
        return lse, target, spread

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlse: Tensor, dtarget: Tensor, dspread: Tensor) -> tuple[Any, ...]:
        kept = ctx.saved_tensors[6:]
        given = (*ctx.saved_tensors[:6], *ctx.settings, reference.Kept(*kept) if kept else None)
        return *reference.backward(dlse, dtarget, dspread, *given), None, None, None, None


@torch.library.custom_op("zj::linear_logprob", mutates_args=())
def _partials(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    vocab_start: int,
    valid_rows: int,
    temperature: float,
    entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    form = dispatch.triton_form("linear_logprob") if backend == "triton" else reference
    return form.forward(hidden, weight, targets, mask, vocab_start, valid_rows, temperature, entropy)


@torch.library.custom_op("zj::linear_logprob_backward", mutates_args=())
def _partials_backward(
    dlse: Tensor,
    dtarget: Tensor,
    dspread: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    spread: Tensor,
    vocab_start: int,
    valid_rows: int,
    temperature: float,
    entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    form = dispatch.triton_form("linear_logprob") if backend == "triton" else reference
    return form.backward(
        dlse,
        dtarget,
        dspread,
        hidden,
        weight,
        targets,
        mask,
        lse,
        spread,
        vocab_start,
        valid_rows,
        temperature,
        entropy,
    )


@_partials.register_fake
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return tuple(hidden.new_empty((hidden.shape[0],), dtype=dtype) for _ in range(3))  # type: ignore[return-value]


@_partials_backward.register_fake
def _(
    dlse: Tensor, dtarget: Tensor, dspread: Tensor, hidden: Tensor, weight: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, mask, *settings = inputs
    ctx.save_for_backward(hidden, weight, targets, mask, output[0], output[2])
    ctx.settings = settings


def _gradients(ctx: Any, dlse: Tensor, dtarget: Tensor, dspread: Tensor) -> tuple[Any, ...]:
    grads = (grad.contiguous() for grad in (dlse, dtarget, dspread))
    dhidden, dweight = _partials_backward(*grads, *ctx.saved_tensors, *ctx.settings)
    return dhidden, dweight, *[None] * 7


_partials.register_autograd(_gradients, setup_context=_save)
