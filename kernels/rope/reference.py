"""Rotary position embedding in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x_THD: Tensor, cos_PF: Tensor, sin_PF: Tensor, positions_T: Tensor, sign: float) -> Tensor:
    """Rotate the pairs (i, i + D/2) by the angles of each token's position; ``sign`` -1 turns back."""
    out = torch.empty(x_THD.shape, dtype=x_THD.dtype, device=x_THD.device)
    return rotate_into(x_THD, cos_PF[positions_T][:, None], sin_PF[positions_T][:, None], sign, out)


def rotate_into(x: Tensor, cos: Tensor, sin: Tensor, sign: float, out: Tensor) -> Tensor:
    """The rotated pairs of x, [..., D], written to ``out``; the angles broadcast to [..., D/2].  Computed in fp32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.dtype != wide:
        return out.copy_(rotate_into(x.to(wide), cos, sin, sign, torch.empty(x.shape, dtype=wide, device=x.device)))
    cos, sin = cos.to(wide), sin.to(wide)
    first, second = x.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=sign)
    return out
