"""Inputs and independent references that several test files of the kernels share."""

from __future__ import annotations

import torch
from torch import Tensor


def generator(seed: int = 0) -> torch.Generator:
    """A CPU generator of its own: tests do not share a stream."""
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers, drawn in fp64 and rounded: the same case in every dtype."""
    return (torch.randn(*shape, dtype=torch.float64, generator=generator(seed)) * scale).to(dtype)


def ends(lengths: list[int] | tuple[int, ...]) -> Tensor:
    """cu_seqlens of these lengths."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def naive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    window: int | None = None,
    q_slots: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with one big mask over the whole pack, in the inputs' dtype (softmax in fp32 at least)."""
    num_q, num_heads, dim = q.shape
    group = num_heads // k.shape[1]
    row_q = torch.repeat_interleave(torch.arange(len(cu_q) - 1), cu_q.diff())
    row_k = torch.repeat_interleave(torch.arange(len(cu_k) - 1), cu_k.diff())
    slot_k = torch.arange(k.shape[0])
    own = torch.arange(num_q) - cu_q[row_q + 1] + cu_k[row_q + 1] if q_slots is None else q_slots
    seen = row_q[:, None] == row_k[None, :]
    if causal:
        seen = seen & (slot_k[None, :] <= own[:, None])
        if window is not None:
            seen = seen & (slot_k[None, :] > own[:, None] - window)
    kk, vv = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("qhd,khd->hqk", q, kk).to(wide) * (dim**-0.5 if scale is None else scale)
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    probs = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return torch.einsum("hqk,khd->qhd", probs.to(q.dtype), vv), lse


def relative_error(found: Tensor, truth: Tensor) -> float:
    """||found - truth|| / ||truth|| in fp64."""
    truth = truth.double()
    distance = (found.double() - truth).norm().item()
    return distance / max(truth.norm().item(), 1e-30)
