"""The reward model's objective: all-pairs logistic ranking of a prompt's responses (Ouyang et al. 2022, eq. 1).

For every pair of a group whose ranks differ, -log sigmoid(score of the better - score of the worse), averaged over
the group's pairs and then over groups; ties give no pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_zj.config.model import Want
from megatron_zj.data.batch import GROUP
from megatron_zj.data.packing import PackedBatch
from megatron_zj.engine.objective import LossTerms, Metrics


@dataclass(frozen=True)
class RankedGroups:
    """``centering``: coefficient of the squared mean score of a group, which fixes the free constant of the scores."""

    centering: float = 0.0
    wants: tuple[Want, ...] = ("scores",)
    temperature: float = 1.0  # no logits here

    def weight(self, batch: PackedBatch) -> Tensor:
        """Groups that have at least one pair."""
        better, _ = _pairs(batch)
        return torch.tensor(torch.unique(batch.per_row[GROUP][better]).numel())

    def __call__(self, outputs: dict[str, Tensor], batch: PackedBatch) -> LossTerms:
        scores_R = outputs["scores"].float()
        better, worse = _pairs(batch)
        group_R = batch.per_row[GROUP].to(scores_R.device)
        _, slot_R = torch.unique(group_R, return_inverse=True)
        pairs_of_group = torch.bincount(slot_R[better], minlength=int(slot_R.max()) + 1 if len(slot_R) else 0)
        margin_P = scores_R[better] - scores_R[worse]
        share_P = 1.0 / pairs_of_group[slot_R[better]].to(scores_R.dtype)
        loss = (-torch.nn.functional.logsigmoid(margin_P) * share_P).sum()
        if self.centering:
            rows_of_group = torch.bincount(slot_R)
            sums = torch.zeros(len(rows_of_group), dtype=scores_R.dtype, device=scores_R.device)
            means = sums.index_add(0, slot_R, scores_R) / rows_of_group
            loss = loss + self.centering * (means.square() * (pairs_of_group > 0)).sum()
        longer_P = _lengths(batch, scores_R)[better] > _lengths(batch, scores_R)[worse]
        kept = scores_R.detach()
        return LossTerms(
            loss,
            {
                "pairs": scores_R.new_tensor(float(len(better))),
                "pairs_right": (margin_P > 0).sum().to(scores_R.dtype),
                "pairs_longer_wins": longer_P.sum().to(scores_R.dtype),
                "pair_margin": margin_P.detach().sum(),
                "rows": scores_R.new_tensor(float(len(kept))),
                "score_sum": kept.sum(),
                "score_squares": kept.square().sum(),
            },
        )

    def summarise(self, metrics: Metrics) -> Metrics:
        """Pair accuracy, the longer-answer-wins baseline, and the scores' mean and deviation."""
        pairs, rows = max(metrics["pairs"], 1e-12), max(metrics["rows"], 1e-12)
        mean = metrics["score_sum"] / rows
        kept = {name: value for name, value in metrics.items() if name not in _SUMS}
        return kept | {
            "pair_accuracy": metrics["pairs_right"] / pairs,
            "longer_wins_accuracy": metrics["pairs_longer_wins"] / pairs,
            "margin": metrics["pair_margin"] / pairs,
            "score_mean": mean,
            "score_deviation": max(metrics["score_squares"] / rows - mean * mean, 0.0) ** 0.5,
        }


_SUMS = frozenset({"pairs", "pairs_right", "pairs_longer_wins", "pair_margin", "rows", "score_sum", "score_squares"})


def _pairs(batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Row indices [P] of the better and the worse response of every ordered pair of a group."""
    group_R, rank_R = batch.per_row[GROUP], batch.per_row["rank"]
    ordered = (group_R[:, None] == group_R[None, :]) & (rank_R[:, None] < rank_R[None, :])
    better, worse = ordered.nonzero(as_tuple=True)
    return better, worse


def _lengths(batch: PackedBatch, like: Tensor) -> Tensor:
    return torch.tensor(batch.lengths, device=like.device)
