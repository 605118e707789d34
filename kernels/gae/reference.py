"""Generalized advantage estimation in plain torch: one step a time index, over all rows at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def forward(
    rewards_T: Tensor, values_T: Tensor, ends: Sequence[int], bootstrap_R: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [T] in fp32 (fp64 for fp64)."""
    wide = torch.promote_types(rewards_T.dtype, torch.float32)
    starts = torch.tensor(ends[:-1], device=rewards_T.device)
    lengths = torch.tensor(ends[1:], device=rewards_T.device) - starts
    advantages = torch.zeros(rewards_T.shape, dtype=wide, device=rewards_T.device)
    if rewards_T.shape[0] == 0:
        return advantages, torch.zeros_like(advantages)
    # Rows are aligned at their ends: step s handles token length - 1 - s of every row that long.
    longest = int(lengths.max())
    order = torch.argsort(lengths, descending=True, stable=True)
    lengths_R, lasts_R = lengths[order], (starts + lengths - 1)[order]
    alive = [int(n) for n in (lengths_R[:, None] > torch.arange(longest, device=lengths.device)[None, :]).sum(0)]
    after = torch.zeros(len(order), dtype=wide, device=rewards_T.device)
    value_after = after.clone() if bootstrap_R is None else bootstrap_R.to(wide)[order]
    rewards, values = rewards_T.to(wide), values_T.to(wide)
    for step, count in enumerate(alive):
        index = lasts_R[:count] - step
        value = values[index]
        after = rewards[index] + gamma * value_after[:count] - value + gamma * lam * after[:count]
        advantages[index] = after
        value_after = value
    return advantages, advantages + values
