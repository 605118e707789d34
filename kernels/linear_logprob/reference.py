"""Log-probabilities from hidden states in plain torch, a bounded number of logits at a time.

With z = h W^T / temperature over the valid rows of W, p = softmax(z), lse = log sum exp z, H = -sum p log p:

    d lse / d z_v = p_v,   d z_y / d z_v = [v = y],   d H / d z_v = -p_v (log p_v + H)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_LOGITS = 1 << 22  # logits held at once: 16 MiB in fp32


def _chunks(tokens_N: Tensor, num_rows: int) -> Iterator[Tensor]:
    yield from torch.split(tokens_N, max(1, CHUNK_LOGITS // max(num_rows, 1)))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _logits(hidden: Tensor, weight_wide: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    logits = hidden[tokens].to(weight_wide.dtype) @ weight_wide.t()
    return logits if temperature == 1.0 else logits.div_(temperature)


def _active(targets: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.arange(targets.shape[0], device=targets.device)
    return mask.nonzero().squeeze(1)


def forward(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    mask_T: Tensor | None,
    vocab_start: int,
    valid_rows: int,
    temperature: float,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """lse, target logit and entropy of each token over this shard, [T] fp32 (fp64 for fp64 hidden states)."""
    wide = _wide(hidden_TD.dtype)
    lse, target, spread = hidden_TD.new_zeros((3, targets_T.shape[0]), dtype=wide).unbind(0)
    tokens_N = _active(targets_T, mask_T)
    if valid_rows == 0:
        lse[tokens_N] = -torch.inf
        return lse.clone(), target.clone(), spread.clone()
    weight = weight_VD[:valid_rows].to(wide)
    for tokens in _chunks(tokens_N, valid_rows):
        logits = _logits(hidden_TD, weight, tokens, temperature)
        local = targets_T[tokens] - vocab_start
        here = (local >= 0) & (local < valid_rows)
        picked = logits.gather(1, local.clamp(0, valid_rows - 1)[:, None]).squeeze(1)
        target[tokens] = torch.where(here, picked, 0.0)
        highest = logits.amax(-1, keepdim=True)
        shares = torch.exp(logits.sub_(highest))
        total = shares.sum(-1)
        lse[tokens] = highest.squeeze(1) + total.log()
        if entropy:
            spread[tokens] = total.log() - shares.mul_(logits).sum(-1) / total
    return lse.clone(), target.clone(), spread.clone()


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
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden_TD and weight_VD; the logits are computed again, chunk by chunk."""
    wide = _wide(hidden_TD.dtype)
    dhidden = torch.zeros(hidden_TD.shape, dtype=hidden_TD.dtype, device=hidden_TD.device)
    dweight = torch.zeros(weight_VD.shape, dtype=wide, device=weight_VD.device)
    if valid_rows == 0:
        return dhidden, dweight.to(weight_VD.dtype)
    weight = weight_VD[:valid_rows].to(wide)
    for tokens in _chunks(_active(targets_T, mask_T), valid_rows):
        logits = _logits(hidden_TD, weight, tokens, temperature)
        probs = torch.exp(logits - lse_T[tokens, None])
        if entropy:
            surprise = logits.sub_((lse_T - spread_T)[tokens, None])  # log p + H
            dlogits = probs.mul_(surprise.mul_(dspread_T[tokens, None]).neg_().add_(dlse_T[tokens, None]))
        else:
            dlogits = probs.mul_(dlse_T[tokens, None])
        local = targets_T[tokens] - vocab_start
        here = (local >= 0) & (local < valid_rows)
        add = torch.where(here, dtarget_T[tokens].to(wide), 0.0)
        dlogits.scatter_add_(1, local.clamp(0, valid_rows - 1)[:, None], add[:, None])
        if temperature != 1.0:
            dlogits.div_(temperature)
        dhidden[tokens] = (dlogits @ weight).to(dhidden.dtype)
        dweight[:valid_rows].addmm_(dlogits.t(), hidden_TD[tokens].to(wide))
    return dhidden, dweight.to(weight_VD.dtype)
