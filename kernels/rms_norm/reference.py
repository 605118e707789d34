"""RMSNorm in plain torch, on torch's fused forward."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, x + residual (y again without one), and rstd [rows] in fp32 (fp64 for fp64)."""
    total = x if residual is None else x + residual
    wide = torch.promote_types(x.dtype, torch.float32)
    y, rstd = torch.ops.aten._fused_rms_norm(total.to(wide), [x.shape[-1]], weight.to(wide), eps)
    y = y.to(x.dtype)
    return y, y if residual is None else total, rstd.reshape(-1)


def backward(dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x (and of the residual: the same) and of the weight."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rstd = rstd.view(*x.shape[:-1], 1)
    normed = x.to(wide) * rstd
    dy = dy.to(wide)
    dweight = (dy * normed).flatten(0, -2).sum(0)
    slope = dy * weight.to(wide)
    mean = (slope * normed).mean(-1, keepdim=True)
    dx = slope.addcmul_(normed, mean, value=-1).mul_(rstd)
    if dsum is not None:
        dx.add_(dsum)
    return dx.to(x.dtype), dweight.to(weight.dtype)
