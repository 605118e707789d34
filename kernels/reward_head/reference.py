"""The reward head and its ranking loss in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def scores(
    hidden_TD: Tensor, last_R: Tensor, weight_D: Tensor, bias_1: Tensor | None, norm_weight_D: Tensor | None, eps: float
) -> Tensor:
    """[R] in fp32 (fp64 for fp64): the dot product of each row's last, normalised hidden state."""
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    here = last_R >= 0
    picked_RD = (
        hidden_TD[last_R.clamp(min=0)].to(wide)
        if hidden_TD.shape[0]
        else hidden_TD.new_zeros((last_R.shape[0], hidden_TD.shape[1]), dtype=wide)
    )
    if norm_weight_D is not None:
        picked_RD = torch.nn.functional.rms_norm(picked_RD, (picked_RD.shape[1],), norm_weight_D.to(wide), eps)
    found_R = picked_RD @ weight_D.to(wide)
    if bias_1 is not None:
        found_R = found_R + bias_1.to(wide)
    return torch.where(here, found_R, torch.zeros_like(found_R))


def ranking(
    scores_R: Tensor, groups_R: Tensor, ranks_R: Tensor, margin: float, centering: float, mean_of_pairs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss share, number of pairs and of correctly ordered pairs of each row as the better one, [R] each."""
    wide = torch.promote_types(scores_R.dtype, torch.float32)
    scores = scores_R.to(wide)
    same_RR = groups_R[:, None] == groups_R[None, :]
    pairs_RR = same_RR & (ranks_R[:, None] < ranks_R[None, :])
    gap_RR = scores[:, None] - scores[None, :]
    asked_RR = margin * (ranks_R[None, :] - ranks_R[:, None]).to(wide)
    num_R = pairs_RR.sum(1)
    loss_RR = torch.where(pairs_RR, torch.nn.functional.softplus(asked_RR - gap_RR), 0.0)
    loss_R = loss_RR.sum(1)
    if mean_of_pairs:
        in_group_R = (same_RR * num_R[None, :]).sum(1)
        loss_R = loss_R / in_group_R.clamp(min=1).to(wide)
    if centering:
        size_R = same_RR.sum(1).to(wide)
        mean_R = torch.where(same_RR, scores[None, :], 0.0).sum(1) / size_R
        loss_R = loss_R + centering * mean_R.square() / size_R
    return loss_R, num_R, (pairs_RR & (gap_RR > 0)).sum(1)
