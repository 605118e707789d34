"""Tiles of attention in plain torch operators, for devices whose fused form gives no lse or takes fewer dtypes.

Same signatures as torch's fused CPU attention and its backward pass, so ``reference`` runs either.  Scores of
``ROWS`` queries exist at a time.  q, out [N, H, Q, D]; k, v [N, K, S, D], query head h reads key head h // (H / K).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.guards import without_autocast

ROWS = 256


def _wide(x: Tensor, kv_heads: int) -> Tensor:
    """[N, K, H / K, length, D] in fp32 (fp64 for fp64)."""
    return x.unflatten(1, (kv_heads, -1)).to(torch.promote_types(x.dtype, torch.float32))


def _scores(
    q: Tensor, k: Tensor, causal: bool, mask: Tensor | None, scale: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Which queries, these queries, and their scaled scores; hidden keys are at -inf."""
    key = torch.arange(k.shape[-2], device=k.device)
    for start in range(0, q.shape[-2], ROWS):
        rows = slice(start, min(start + ROWS, q.shape[-2]))
        part = q[..., rows, :]
        scores = part @ k.transpose(-1, -2) * scale
        if mask is not None:
            scores = scores + mask[..., rows, :].to(scores).unsqueeze(2)
        if causal:
            position = torch.arange(rows.start, rows.stop, device=k.device)
            scores = scores.masked_fill(key[None, :] > position[:, None], -torch.inf)
        yield rows, part, scores


@without_autocast
def forward(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, causal: bool, *, attn_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """out in q's dtype and lse [N, H, Q]; every query sees a key; ``dropout`` must be 0."""
    del dropout
    heads = k.shape[1]
    wide_q, wide_k, wide_v = (_wide(x, heads) for x in (q, k, v))
    out = torch.empty_like(wide_q)
    lse = wide_q.new_empty(wide_q.shape[:-1])
    for rows, _, scores in _scores(wide_q, wide_k, causal, attn_mask, scale):
        lse[..., rows] = scores.logsumexp(-1)
        out[..., rows, :] = scores.softmax(-1) @ wide_v
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


@without_autocast
def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dropout: float, causal: bool,
    *, attn_mask: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v in their dtypes."""
    del dropout
    heads = k.shape[1]
    wide_dout, wide_q, wide_k, wide_v, wide_out = (_wide(x, heads) for x in (dout, q, k, v, out))
    wide_lse = lse.unflatten(1, (heads, -1))[..., None]
    delta = (wide_dout * wide_out).sum(-1, keepdim=True)
    dq, dk, dv = torch.empty_like(wide_q), torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    for rows, part, scores in _scores(wide_q, wide_k, causal, attn_mask, scale):
        weight = torch.exp(scores - wide_lse[..., rows, :])
        grad = wide_dout[..., rows, :]
        dv += (weight.transpose(-1, -2) @ grad).sum(2, keepdim=True)
        dscores = weight * (grad @ wide_v.transpose(-1, -2) - delta[..., rows, :]) * scale
        dq[..., rows, :] = dscores @ wide_k
        dk += (dscores.transpose(-1, -2) @ part).sum(2, keepdim=True)
    return tuple(grad.flatten(1, 2).to(x.dtype) for grad, x in ((dq, q), (dk, k), (dv, v)))  # type: ignore[return-value]
