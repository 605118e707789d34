"""RMSNorm in plain torch: its fused forward, and a backward pass of few passes over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.guards import without_autocast


@without_autocast
def forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, x + residual (y again without one), and rstd [rows] in fp32 (fp64 for fp64)."""
    total = x if residual is None else x + residual
    wide = torch.promote_types(x.dtype, torch.float32)
    y, rstd = torch.ops.aten._fused_rms_norm(total.to(wide), [x.shape[-1]], weight.to(wide), eps)
    y = y.to(x.dtype)
    return y, y if residual is None else total, rstd.reshape(-1)


@without_autocast
def backward(dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x (and of the residual: the same) and of the weight."""
    wide = torch.promote_types(x.dtype, torch.float32)
    width, rstd, weight_wide = x.shape[-1], rstd[:, None], weight.to(wide)
    rows, dy = x.reshape(-1, width).to(wide), dy.reshape(-1, width).to(wide)
    normed = rows * rstd
    product = dy * normed
    dweight = product.sum(0)
    mean = product.mv(weight_wide).div_(width)[:, None]
    slope = torch.mul(dy, weight_wide, out=product).addcmul_(normed, mean, value=-1)
    dx = slope.mul_(rstd) if dsum is None else torch.addcmul(dsum.reshape(-1, width).to(wide), slope, rstd)
    return dx.view(x.shape).to(x.dtype), dweight.to(weight.dtype)
