"""Log-probabilities from hidden states in plain torch, a bounded number of logits at a time.

With z = h W^T / temperature over the valid rows of W, p = softmax(z), lse = log sum exp z, H = -sum p log p:

    d lse / d z_v = p_v,   d z_y / d z_v = [v = y],   d H / d z_v = -p_v (log p_v + H)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.guards import without_autocast

CHUNK_LOGITS = 1 << 22  # logits computed at once: 16 MiB in fp32
KEPT_LOGITS = 1 << 24  # logits whose exponentials may wait for the backward pass: 64 MiB in fp32


class Kept(NamedTuple):
    """What the forward pass leaves for the backward pass, of the N tokens that count."""

    shares_NV: Tensor  # exp(z - highest z)
    total_N: Tensor  # their sum


def _chunks(tokens_N: Tensor, num_rows: int) -> Iterator[Tensor]:
    yield from torch.split(tokens_N, max(1, CHUNK_LOGITS // max(num_rows, 1)))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _logits(hidden_N: Tensor, weight: Tensor, temperature: float, out: Tensor | None = None) -> Tensor:
    logits = torch.mm(hidden_N, weight.t(), out=out)
    return logits if temperature == 1.0 else logits.div_(temperature)


def _rows(targets_N: Tensor, vocab_start: int, valid_rows: int) -> tuple[Tensor, Tensor]:
    """The targets' rows of this shard, 0 where they are not on it; and whether they are."""
    local = targets_N - vocab_start
    here = (local >= 0) & (local < valid_rows)
    return local.where(here, 0), here


def _active(targets: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.arange(targets.shape[0], device=targets.device)
    return mask.nonzero().squeeze(1)


@without_autocast
def forward(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    mask_T: Tensor | None,
    vocab_start: int,
    valid_rows: int,
    temperature: float,
    entropy: bool,
    keep: list[Kept] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """lse, target logit and entropy of each token over this shard, [T] fp32 (fp64 for fp64 hidden states).

    ``keep``: takes what spares ``backward`` a product and an exponential, where that is at most KEPT_LOGITS numbers
    and no entropy is asked for.
    """
    wide = _wide(hidden_TD.dtype)
    lse, target, spread = hidden_TD.new_zeros((3, targets_T.shape[0]), dtype=wide).unbind(0)
    tokens_N = _active(targets_T, mask_T)
    if valid_rows == 0:
        lse[tokens_N] = -torch.inf
        return lse.clone(), target.clone(), spread.clone()
    weight = weight_VD[:valid_rows].to(wide)
    kept = None
    if keep is not None and not entropy and tokens_N.shape[0] * valid_rows <= KEPT_LOGITS:
        kept = Kept(lse.new_empty((tokens_N.shape[0], valid_rows)), lse.new_empty(tokens_N.shape[0]))
        keep.append(kept)
    start = 0
    for tokens in _chunks(tokens_N, valid_rows):
        rows = slice(start, start := start + tokens.shape[0])
        logits = _logits(hidden_TD[tokens].to(wide), weight, temperature, kept and kept.shares_NV[rows])
        local, here = _rows(targets_T[tokens], vocab_start, valid_rows)
        target[tokens] = logits.gather(1, local[:, None]).squeeze(1).where(here, 0.0)
        highest = logits.amax(-1, keepdim=True)
        logits.sub_(highest)
        shares = torch.exp(logits) if entropy else logits.exp_()
        total = shares.sum(-1)
        lse[tokens] = highest.squeeze(1) + total.log()
        if entropy:
            spread[tokens] = total.log() - shares.mul_(logits).sum(-1) / total
        elif kept is not None:
            kept.total_N[rows] = total
    return lse.clone(), target.clone(), spread.clone()


@without_autocast
def backward(
    dlse_T: Tensor,
    dtarget_T: Tensor,
    dspread_T: Tensor,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    mask_T: Tensor | None,
    lse_T: Tensor,
    spread_T: Tensor,
    vocab_start: int,
    valid_rows: int,
    temperature: float,
    entropy: bool,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden_TD and weight_VD; unless ``kept``, the logits are computed again, chunk by chunk."""
    wide = _wide(hidden_TD.dtype)
    dhidden = torch.zeros(hidden_TD.shape, dtype=hidden_TD.dtype, device=hidden_TD.device)
    dweight = torch.zeros(weight_VD.shape, dtype=wide, device=weight_VD.device)
    if valid_rows == 0:
        return dhidden, dweight.to(weight_VD.dtype)
    weight = weight_VD[:valid_rows].to(wide)
    start = 0
    for tokens in _chunks(_active(targets_T, mask_T), valid_rows):
        hidden = hidden_TD[tokens].to(wide)
        rows = slice(start, start := start + tokens.shape[0])
        if kept is not None:
            dlogits = kept.shares_NV[rows] * (dlse_T[tokens] / kept.total_N[rows])[:, None]
        else:
            logits = _logits(hidden, weight, temperature)
            probs = torch.exp(logits - lse_T[tokens, None])
            if entropy:
                surprise = logits.sub_((lse_T - spread_T)[tokens, None])  # log p + H
                dlogits = probs.mul_(surprise.mul_(dspread_T[tokens, None]).neg_().add_(dlse_T[tokens, None]))
            else:
                dlogits = probs.mul_(dlse_T[tokens, None])
        local, here = _rows(targets_T[tokens], vocab_start, valid_rows)
        dlogits.scatter_add_(1, local[:, None], dtarget_T[tokens].to(wide).where(here, 0.0)[:, None])
        if temperature != 1.0:
            dlogits.div_(temperature)
        dhidden[tokens] = (dlogits @ weight).to(dhidden.dtype)
        dweight[:valid_rows].addmm_(dlogits.t(), hidden)
    return dhidden, dweight.to(weight_VD.dtype)
