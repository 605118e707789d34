"""A score for each sequence, and the loss that learns it from ranked lists."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import arguments, dispatch
from kernels.reward_head import reference


class RankingTerms(NamedTuple):
    """[R] each; a row speaks for the pairs in which it is the better one."""

    loss: Tensor  # fp32; the sum over the rows is the batch's loss, summed over groups
    pairs: Tensor  # int64: pairs in which the row is the better one
    correct: Tensor  # int64: those in which its score is higher too


def reward_head(
    hidden_TD: Tensor,
    last_R: Tensor,
    weight_D: Tensor,
    bias_1: Tensor | None = None,
    *,
    norm_weight_D: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """weight . norm(hidden[last]) + bias: one score a sequence.

    Args:
        hidden_TD: [T, D] packed hidden states, fp16, bf16, fp32 (CPU also fp64).
        last_R: [R] int64: where each row's last token is in T; -1: not here (another context-parallel rank has it),
            the score is then 0 and carries no gradient, so that a sum over the ranks is the score.
            Two rows may name one token.
        weight_D: [D] or [1, D].
        bias_1: [1]; None: no bias.
        norm_weight_D: [D]: an RMSNorm before the dot product; None: hidden is normalised already.
        eps: of that norm.

    Returns:
        [R] fp32.  Gradients flow to hidden_TD, weight_D, bias_1 and norm_weight_D.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a negative eps, or a last token beyond T (to
            look, it waits for the device).
    """
    optional = arguments.given(bias_1=bias_1, norm_weight_D=norm_weight_D)
    arguments.require_float(hidden_TD=hidden_TD, weight_D=weight_D, **optional)
    arguments.require_integer(last_R=last_R)
    arguments.require_same_device(
        hidden=hidden_TD, last=last_R, weight=weight_D, bias=bias_1, norm_weight=norm_weight_D
    )
    arguments.require_shape(hidden_TD, (None, None), "hidden_TD")
    arguments.require_shape(last_R, (None,), "last_R")
    arguments.require(weight_D.numel() == hidden_TD.shape[1], f"weight_D must hold {hidden_TD.shape[1]} numbers")
    if bias_1 is not None:
        arguments.require_shape(bias_1, (1,), "bias_1")
    if norm_weight_D is not None:
        arguments.require_shape(norm_weight_D, (hidden_TD.shape[1],), "norm_weight_D")
    arguments.require(eps >= 0, f"eps must not be negative, got {eps}")
    arguments.require_below(last_R, hidden_TD.shape[0], "last_R")
    backend = dispatch.backend_of(hidden_TD)
    return _reward_head(hidden_TD, last_R, weight_D.reshape(-1), bias_1, norm_weight_D, float(eps), backend)[0]


def ranking_loss(
    scores_R: Tensor,
    groups_R: Tensor,
    ranks_R: Tensor,
    *,
    margin: float = 0.0,
    centering: float = 0.0,
    mean_of_pairs: bool = True,
) -> RankingTerms:
    """All-pairs logistic loss over ranked lists of any sizes (Ouyang et al. 2022, eq. 1).

    For rows i, j of one group with rank_i < rank_j:
    loss_ij = softplus(margin (rank_j - rank_i) - (score_i - score_j)) = -log sigmoid(score_i - score_j - margin ...).
    Rows of equal rank form no pair.

    Args:
        scores_R: [R] float.
        groups_R: [R] int: rows with one number are one list; the rows need not be neighbours.
        ranks_R: [R] int: 0 is best, ties are equal numbers.
        margin: by how much (in score) a rank step is asked to be won.
        centering: adds centering x (mean score of the group)^2 for each group (Eisenstein et al. 2023), spread
            evenly over its rows; keeps scores near 0.
        mean_of_pairs: each group's pair losses are divided by its number of pairs, as in the paper; False: summed.

    Returns:
        RankingTerms.  Gradients flow to scores_R through ``loss``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a negative margin or centering.
    """
    arguments.require_float(scores_R=scores_R)
    arguments.require_integer(groups_R=groups_R, ranks_R=ranks_R)
    arguments.require_same_device(scores=scores_R, groups=groups_R, ranks=ranks_R)
    arguments.require_shape(scores_R, (None,), "scores_R")
    arguments.require_shape(groups_R, scores_R.shape, "groups_R")
    arguments.require_shape(ranks_R, scores_R.shape, "ranks_R")
    arguments.require(margin >= 0 and centering >= 0, f"margin and centering must be >= 0, got {margin}, {centering}")
    terms = _ranking(
        scores_R, groups_R, ranks_R, float(margin), float(centering), mean_of_pairs, dispatch.backend_of(scores_R)
    )
    return RankingTerms(*terms[:3])


@torch.library.custom_op("zj::reward_head", mutates_args=())
def _reward_head(
    hidden: Tensor, last: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    form = dispatch.triton_form("reward_head") if backend == "triton" else reference
    return form.forward(hidden, last, weight, bias, norm, eps)


@torch.library.custom_op("zj::reward_head_backward", mutates_args=())
def _reward_head_backward(
    dscores: Tensor,
    hidden: Tensor,
    last: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    scores: Tensor,
    rstd: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    form = dispatch.triton_form("reward_head") if backend == "triton" else reference
    return form.backward(dscores, hidden, last, weight, bias, norm, scores, rstd)


@torch.library.custom_op("zj::ranking", mutates_args=())
def _ranking(
    scores: Tensor,
    groups: Tensor,
    ranks: Tensor,
    margin: float,
    centering: float,
    mean_of_pairs: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    form = dispatch.triton_form("reward_head") if backend == "triton" else reference
    return form.ranking(scores, groups, ranks, margin, centering, mean_of_pairs)


@torch.library.custom_op("zj::ranking_backward", mutates_args=())
def _ranking_backward(
    dloss: Tensor,
    scores: Tensor,
    groups: Tensor,
    ranks: Tensor,
    share: Tensor,
    pull: Tensor,
    margin: float,
    backend: str,
) -> Tensor:
    form = dispatch.triton_form("reward_head") if backend == "triton" else reference
    return form.ranking_gradient(dloss, scores, groups, ranks, share, pull, margin)


@_reward_head.register_fake
def _(hidden: Tensor, last: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(last.shape, dtype=dtype), hidden.new_empty(last.shape, dtype=dtype)


@_reward_head_backward.register_fake
def _(dscores: Tensor, hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width = hidden.shape[1]
    dweight, dbias, dnorm = (dscores.new_empty(size) for size in (width, 1, width))
    return hidden.new_empty(hidden.shape), dweight, dbias, dnorm


@_ranking.register_fake
def _(scores: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(scores.dtype, torch.float32)
    loss, share, pull = (scores.new_empty(scores.shape, dtype=dtype) for _ in range(3))
    pairs, correct = (scores.new_empty(scores.shape, dtype=torch.int64) for _ in range(2))
    return loss, pairs, correct, share, pull


@_ranking_backward.register_fake
def _(dloss: Tensor, scores: Tensor, *args: Any) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.promote_types(scores.dtype, torch.float32))


def _save_head(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, last, weight, bias, norm, _, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(hidden, last, weight, bias, norm, *output)


def _gradients_head(ctx: Any, dscores: Tensor, _drstd: Tensor) -> tuple[Any, ...]:
    _, _, weight, bias, norm, _, _ = ctx.saved_tensors
    dhidden, dweight, dbias, dnorm = _reward_head_backward(dscores, *ctx.saved_tensors, ctx.backend)
    given_bias = None if bias is None else dbias.to(bias.dtype)
    given_norm = None if norm is None else dnorm.to(norm.dtype)
    return dhidden, None, dweight.to(weight.dtype), given_bias, given_norm, None, None


def _save_ranking(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    scores, groups, ranks, ctx.margin, _, _, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(scores, groups, ranks, *output[3:])


def _gradients_ranking(ctx: Any, dloss: Tensor, *_others: Tensor) -> tuple[Any, ...]:
    dscores = _ranking_backward(dloss, *ctx.saved_tensors, ctx.margin, ctx.backend)
    return dscores.to(ctx.saved_tensors[0].dtype), *[None] * 6


_reward_head.register_autograd(_gradients_head, setup_context=_save_head)
_ranking.register_autograd(_gradients_ranking, setup_context=_save_ranking)
