"""The reward head and its ranking loss in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.guards import without_autocast


def _picked(hidden: Tensor, last: Tensor) -> Tensor:
    """[R, D] in fp32 (fp64 for fp64): each row's last hidden state; 0 where it is not here."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    picked = torch.zeros((last.shape[0], hidden.shape[1]), dtype=wide, device=hidden.device)
    here = last >= 0
    picked[here] = hidden[last[here]].to(wide)
    return picked


@without_autocast
def forward(
    hidden: Tensor, last: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Scores and reciprocal root mean squares, [R] in fp32 (fp64 for fp64)."""
    picked = _picked(hidden, last)
    wide = picked.dtype
    rstd = torch.ones(last.shape, dtype=wide, device=hidden.device)
    direction = weight.to(wide)
    if norm is not None:
        rstd = torch.rsqrt(picked.square().mean(-1) + eps)
        direction = direction * norm.to(wide)
    scores = (picked @ direction) * rstd
    if bias is not None:
        scores = scores + bias.to(wide)
    return scores.masked_fill(last < 0, 0.0), rstd


@without_autocast
def backward(
    dscores: Tensor,
    hidden: Tensor,
    last: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    scores: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight, bias [1] and the norm's weight (zeros without a norm)."""
    picked = _picked(hidden, last)
    wide = picked.dtype
    here = last >= 0
    dscores = dscores.masked_fill(~here, 0.0)
    weight = weight.to(wide)
    if norm is None:
        dpicked, dweight, dnorm = dscores[:, None] * weight, dscores @ picked, torch.zeros_like(weight)
    else:
        scale = norm.to(wide)
        normed = picked * rstd[:, None]
        mean = (normed @ (scale * weight)) / hidden.shape[1]
        dpicked = (dscores * rstd)[:, None] * (scale * weight - normed * mean[:, None])
        along = dscores @ normed
        dweight, dnorm = along * scale, along * weight
    dhidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    dhidden.index_put_((last[here],), dpicked[here].to(hidden.dtype), accumulate=True)  # rows may share a token
    return dhidden, dweight, dscores.sum(0, keepdim=True), dnorm


def ranking(
    scores: Tensor, groups: Tensor, ranks: Tensor, margin: float, centering: float, mean_of_pairs: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """[R] each: loss share, pairs and correctly ordered pairs of a row as the better one; then, for the backward
    pass, what each pair of the row's group weighs and what centering adds to each score of the group."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    scores = scores.to(wide)
    same = groups[:, None] == groups[None, :]
    better = same & (ranks[:, None] < ranks[None, :])
    gap = scores[:, None] - scores[None, :]
    asked = margin * (ranks[None, :] - ranks[:, None]).to(wide)
    pairs = better.sum(1)
    share = torch.ones_like(scores)
    if mean_of_pairs:
        share = 1.0 / (same * pairs[None, :]).sum(1).clamp(min=1).to(wide)
    size = same.sum(1).to(wide)
    mean = torch.where(same, scores[None, :], 0.0).sum(1) / size
    loss = torch.where(better, torch.nn.functional.softplus(asked - gap), 0.0).sum(1) * share
    loss = loss + centering * mean.square() / size
    pull = 2.0 * centering * mean / size.square()
    return loss, pairs, (better & (gap > 0)).sum(1), share, pull


def ranking_gradient(
    dloss: Tensor, scores: Tensor, groups: Tensor, ranks: Tensor, share: Tensor, pull: Tensor, margin: float
) -> Tensor:
    """Gradient of the scores, fp32 (fp64 for fp64)."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    scores = scores.to(wide)
    same = groups[:, None] == groups[None, :]
    better = same & (ranks[:, None] < ranks[None, :])
    gap = scores[:, None] - scores[None, :]
    asked = margin * (ranks[None, :] - ranks[:, None]).to(wide)
    slope = torch.where(better, torch.sigmoid(asked - gap) * dloss[:, None], 0.0)
    dscores = (slope.sum(0) - slope.sum(1)) * share
    return dscores + torch.where(same, dloss[None, :], 0.0).sum(1) * pull
