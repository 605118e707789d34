"""The reward head and its ranking loss in Triton: one launch forward, one backward, no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import configs
from kernels.dispatch import launch


@triton.jit
def reward_head_forward(
    hidden_ptr, last_ptr, weight_ptr, bias_ptr, norm_ptr, score_ptr, rstd_ptr, stride_h, width, eps,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    last = tl.load(last_ptr + row).to(tl.int64)
    here = last >= 0
    dot = tl.zeros((BLOCK,), tl.float32)
    square = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        inside = col < width
        x = tl.load(hidden_ptr + last * stride_h + col, mask=inside & here, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32)
        if HAS_NORM:
            weight *= tl.load(norm_ptr + col, mask=inside, other=0.0).to(tl.float32)
            square += x * x
        dot += x * weight
    score = tl.sum(dot, 0)
    rstd = 1.0
    if HAS_NORM:
        rstd = tl.math.rsqrt(tl.sum(square, 0) / width + eps)
        score *= rstd
    if HAS_BIAS:
        score += tl.load(bias_ptr).to(tl.float32)
    tl.store(score_ptr + row, tl.where(here, score, 0.0))
    tl.store(rstd_ptr + row, rstd)


# One program owns its columns for all rows, and takes the rows in order: reading dhidden back, for rows that share a
# token, meets this program's own earlier writes only and cannot race.
@triton.jit
def reward_head_backward(
    dscore_ptr, hidden_ptr, last_ptr, weight_ptr, bias_ptr, norm_ptr, score_ptr, rstd_ptr,
    dhidden_ptr, dweight_ptr, dbias_ptr, dnorm_ptr, stride_h, num_rows, width,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # sum(normed * norm * weight) is the score without its bias: with it a column needs no other column.
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = col < width
    weight = tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32)
    norm = tl.load(norm_ptr + col, mask=inside, other=0.0).to(tl.float32) if HAS_NORM else weight
    dweight = tl.zeros((BLOCK,), tl.float32)
    dnorm = tl.zeros((BLOCK,), tl.float32)
    dbias = 0.0
    bias = tl.load(bias_ptr).to(tl.float32) if HAS_BIAS else 0.0
    for row in tl.range(0, num_rows):
        last = tl.load(last_ptr + row).to(tl.int64)
        here = last >= 0
        dscore = tl.where(here, tl.load(dscore_ptr + row).to(tl.float32), 0.0)
        x = tl.load(hidden_ptr + last * stride_h + col, mask=inside & here, other=0.0).to(tl.float32)
        if HAS_NORM:
            rstd = tl.load(rstd_ptr + row)
            normed = x * rstd
            mean = (tl.load(score_ptr + row) - bias) / width
            dx = dscore * rstd * (norm * weight - normed * mean)
            dweight += dscore * normed * norm
            dnorm += dscore * normed * weight
        else:
            dx = dscore * weight
            dweight += dscore * x
        dbias += dscore
        place = dhidden_ptr + last * width + col
        dx += tl.load(place, mask=inside & here, other=0.0).to(tl.float32)  # of an earlier row with the same token
        tl.store(place, dx.to(dhidden_ptr.dtype.element_ty), mask=inside & here)
    tl.store(dweight_ptr + col, dweight, mask=inside)
    if HAS_NORM:
        tl.store(dnorm_ptr + col, dnorm, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(dbias_ptr, dbias)


@triton.jit
def _softplus(x):
    small = tl.exp(-tl.abs(x))
    above = 1.0 + small
    # log(1 + small) loses what the addition rounds away; this gives it back (Kahan; Goldberg 1991, theorem 4).
    log1p = tl.where(above == 1.0, small, tl.log(above) * small / tl.where(above == 1.0, 1.0, above - 1.0))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def ranking_forward(
    score_ptr, group_ptr, rank_ptr, loss_ptr, pairs_ptr, correct_ptr, share_ptr, pull_ptr, num_rows, margin, centering,
    MEAN_OF_PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < num_rows
    score_i = tl.load(score_ptr + i, mask=inside, other=0.0).to(tl.float32)
    group_i = tl.load(group_ptr + i, mask=inside, other=0)
    rank_i = tl.load(rank_ptr + i, mask=inside, other=0)
    loss = tl.zeros((BLOCK,), tl.float32)
    pairs = tl.zeros((BLOCK,), tl.int32)
    correct = tl.zeros((BLOCK,), tl.int32)
    of_group = tl.zeros((BLOCK,), tl.int32)  # pairs of the whole group
    size = tl.zeros((BLOCK,), tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, num_rows, BLOCK):
        j = start + tl.arange(0, BLOCK)
        there = j < num_rows
        score_j = tl.load(score_ptr + j, mask=there, other=0.0).to(tl.float32)
        group_j = tl.load(group_ptr + j, mask=there, other=0)
        rank_j = tl.load(rank_ptr + j, mask=there, other=0)
        same = (group_i[:, None] == group_j[None, :]) & inside[:, None] & there[None, :]
        better = same & (rank_i[:, None] < rank_j[None, :])
        gap = score_i[:, None] - score_j[None, :]
        asked = margin * (rank_j[None, :] - rank_i[:, None]).to(tl.float32)
        loss += tl.sum(tl.where(better, _softplus(asked - gap), 0.0), 1)
        pairs += tl.sum(better.to(tl.int32), 1)
        correct += tl.sum((better & (gap > 0.0)).to(tl.int32), 1)
        size += tl.sum(same.to(tl.int32), 1)
        total += tl.sum(tl.where(same, score_j[None, :], 0.0), 1)
        if MEAN_OF_PAIRS:
            pairs_j = tl.zeros((BLOCK,), tl.int32)
            for inner in tl.range(0, num_rows, BLOCK):
                k = inner + tl.arange(0, BLOCK)
                group_k = tl.load(group_ptr + k, mask=k < num_rows, other=0)
                rank_k = tl.load(rank_ptr + k, mask=k < num_rows, other=0)
                wins = (group_j[:, None] == group_k[None, :]) & (rank_j[:, None] < rank_k[None, :])
                pairs_j += tl.sum((wins & (k[None, :] < num_rows)).to(tl.int32), 1)
            of_group += tl.sum(tl.where(same, pairs_j[None, :], 0), 1)
    share = tl.full((BLOCK,), 1.0, tl.float32)
    if MEAN_OF_PAIRS:
        share = 1.0 / tl.maximum(of_group, 1).to(tl.float32)
    members = tl.maximum(size, 1).to(tl.float32)
    mean = total / members
    loss = loss * share + centering * mean * mean / members
    tl.store(loss_ptr + i, loss, mask=inside)
    tl.store(pairs_ptr + i, pairs.to(tl.int64), mask=inside)
    tl.store(correct_ptr + i, correct.to(tl.int64), mask=inside)
    tl.store(share_ptr + i, share, mask=inside)
    # What each row's gradient adds to every score of its group, through the centering term.
    tl.store(pull_ptr + i, 2.0 * centering * mean / (members * members), mask=inside)


@triton.jit
def ranking_backward(
    dloss_ptr, score_ptr, group_ptr, rank_ptr, share_ptr, pull_ptr, dscore_ptr, num_rows, margin, BLOCK: tl.constexpr
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < num_rows
    score_i = tl.load(score_ptr + i, mask=inside, other=0.0).to(tl.float32)
    group_i = tl.load(group_ptr + i, mask=inside, other=0)
    rank_i = tl.load(rank_ptr + i, mask=inside, other=0)
    dloss_i = tl.load(dloss_ptr + i, mask=inside, other=0.0)
    share = tl.load(share_ptr + i, mask=inside, other=0.0)
    pull = tl.load(pull_ptr + i, mask=inside, other=0.0)
    dscore = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, num_rows, BLOCK):
        j = start + tl.arange(0, BLOCK)
        there = j < num_rows
        score_j = tl.load(score_ptr + j, mask=there, other=0.0).to(tl.float32)
        group_j = tl.load(group_ptr + j, mask=there, other=0)
        rank_j = tl.load(rank_ptr + j, mask=there, other=0)
        dloss_j = tl.load(dloss_ptr + j, mask=there, other=0.0)
        same = (group_i[:, None] == group_j[None, :]) & inside[:, None] & there[None, :]
        gap = score_i[:, None] - score_j[None, :]
        asked = margin * (rank_j[None, :] - rank_i[:, None]).to(tl.float32)
        better = same & (rank_i[:, None] < rank_j[None, :])
        worse = same & (rank_i[:, None] > rank_j[None, :])
        falls = tl.sigmoid(asked - gap) * dloss_i[:, None]
        rises = tl.sigmoid(gap - asked) * dloss_j[None, :]
        dscore += tl.sum(tl.where(worse, rises, 0.0) - tl.where(better, falls, 0.0), 1) * share
        dscore += tl.sum(tl.where(same, dloss_j[None, :], 0.0), 1) * pull
    tl.store(dscore_ptr + i, dscore, mask=inside)


def _rows(hidden: Tensor) -> Tensor:
    if hidden.dtype == torch.float64:
        raise NotImplementedError("the Triton reward head takes fp16, bf16 and fp32, not fp64")
    return hidden if hidden.stride(1) == 1 else hidden.contiguous()


def forward(
    hidden: Tensor, last: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """scores and rstd, [R] fp32."""
    hidden = _rows(hidden)
    scores = hidden.new_empty(last.shape[0], dtype=torch.float32)
    rstd = torch.empty_like(scores)
    config = configs.config("reward_head_forward", "", hidden.device)
    launch(
        reward_head_forward, (last.shape[0],),
        hidden, last.contiguous(), weight.contiguous(), scores if bias is None else bias,
        scores if norm is None else norm.contiguous(), scores, rstd, hidden.stride(0), hidden.shape[1], eps,
        HAS_BIAS=bias is not None, HAS_NORM=norm is not None, **config,
    )  # fmt: skip
    return scores, rstd


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
    """Gradients of hidden (zero but at the last tokens), weight, bias [1] and the norm's weight."""
    hidden = _rows(hidden)
    width = hidden.shape[1]
    dhidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    dweight, dnorm = (hidden.new_empty(width, dtype=torch.float32) for _ in range(2))
    dbias = hidden.new_empty(1, dtype=torch.float32)
    config = configs.config("reward_head_backward", "", hidden.device)
    launch(
        reward_head_backward, (triton.cdiv(width, config["BLOCK"]),),
        dscores.contiguous(), hidden, last.contiguous(), weight.contiguous(), scores if bias is None else bias,
        scores if norm is None else norm.contiguous(), scores, rstd, dhidden, dweight, dbias, dnorm,
        hidden.stride(0), last.shape[0], width, HAS_BIAS=bias is not None, HAS_NORM=norm is not None, **config,
    )  # fmt: skip
    return dhidden, dweight, dbias, dnorm


def ranking(
    scores: Tensor, groups: Tensor, ranks: Tensor, margin: float, centering: float, mean_of_pairs: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, pairs, correct, and what the backward pass needs: share and pull, [R] each."""
    if scores.dtype == torch.float64:
        raise NotImplementedError("the Triton ranking loss takes fp16, bf16 and fp32, not fp64")
    loss, share, pull = (scores.new_empty(scores.shape, dtype=torch.float32) for _ in range(3))
    pairs, correct = (scores.new_empty(scores.shape, dtype=torch.int64) for _ in range(2))
    config = configs.config("ranking_forward", "", scores.device)
    launch(
        ranking_forward, (triton.cdiv(scores.shape[0], config["BLOCK"]),),
        scores.contiguous(), groups.contiguous(), ranks.contiguous(), loss, pairs, correct, share, pull,
        scores.shape[0], margin, centering, MEAN_OF_PAIRS=mean_of_pairs, **config,
    )  # fmt: skip
    return loss, pairs, correct, share, pull


def ranking_gradient(
    dloss: Tensor, scores: Tensor, groups: Tensor, ranks: Tensor, share: Tensor, pull: Tensor, margin: float
) -> Tensor:
    """Gradient of the scores, fp32."""
    dscores = scores.new_empty(scores.shape, dtype=torch.float32)
    config = configs.config("ranking_backward", "", scores.device)
    launch(
        ranking_backward, (triton.cdiv(scores.shape[0], config["BLOCK"]),),
        dloss.contiguous(), scores.contiguous(), groups.contiguous(), ranks.contiguous(), share, pull, dscores,
        scores.shape[0], margin, **config,
    )  # fmt: skip
    return dscores
