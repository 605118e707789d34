"""The reward model's objective on a prompt's ranked responses.  Rank 0 is best; ties teach nothing about each other.

``pairs``: for every pair of a group whose ranks differ, -log sigmoid(better - worse - margin x rank gap), averaged
over the group's pairs and then over groups (Ouyang et al. 2022, eq. 1; the margin, Touvron et al. 2023, eq. 2).

``plackett_luce``: the ranking as a series of choices, each of one response against all worse ones:
logsumexp(its score and theirs) - its score, averaged over the group's choices and then over groups (Plackett 1975).

``per_token``: as ``pairs``, but on the scores of every token from the first that differs, averaged over tokens
(Zhongjing's code, after DeepSpeed-Chat).  Where one response has ended its last score stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.reward_head import ranking_loss
from megatron_zj.algorithms.functional import wins
from megatron_zj.config.model import Want
from megatron_zj.data.batch import GROUP
from megatron_zj.data.packing import PackedBatch
from megatron_zj.engine.objective import LossTerms, Metrics


@dataclass(frozen=True)
class RankedGroups:
    """``centering``: coefficient of the squared mean score of a group, which fixes the free constant of the scores."""

    centering: float = 0.0
    loss: Literal["pairs", "plackett_luce", "per_token"] = "pairs"
    margin: float = 0.0  # a rank of gap
    temperature: float = 1.0  # no logits here

    @property
    def wants(self) -> tuple[Want, ...]:
        """A score a row, or (``values``) a token."""
        return ("values",) if self.loss == "per_token" else ("scores",)

    @property
    def whole_rows(self) -> bool:
        """``per_token`` compares the same place of two rows, and a row's end stands for what is missing."""
        return self.loss == "per_token"

    @property
    def differences_only(self) -> bool:
        """All of these losses compare scores; centering alone looks at one."""
        return self.centering == 0.0

    def weight(self, batch: PackedBatch) -> Tensor:
        """Groups that have at least one pair."""
        better, _ = _pairs(batch)
        return torch.tensor(torch.unique(batch.per_row[GROUP][better]).numel())

    def __call__(self, outputs: dict[str, Tensor], batch: PackedBatch) -> LossTerms:
        per_token = self.loss == "per_token"
        scores_R = outputs["values"][batch.last] if per_token else outputs["scores"]
        better, worse = _pairs(batch)
        _, slot_R = torch.unique(batch.per_row[GROUP].to(scores_R.device), return_inverse=True)
        pairs_of_group = torch.bincount(slot_R[better], minlength=int(slot_R.max()) + 1 if len(slot_R) else 0)
        margin_P = scores_R[better] - scores_R[worse]
        if self.loss == "plackett_luce":
            loss = _choices(scores_R, batch, slot_R)
        elif per_token:
            gap_P = (batch.per_row["rank"][worse] - batch.per_row["rank"][better]).to(scores_R)
            terms_P = _per_token(outputs["values"], batch, better, worse, self.margin * gap_P)
            loss = (terms_P / pairs_of_group[slot_R[better]].to(scores_R.dtype)).sum()
        else:
            loss = ranking_loss(scores_R, slot_R, batch.per_row["rank"].to(slot_R), margin=self.margin).loss.sum()
        if self.centering:
            rows_of_group = torch.bincount(slot_R)
            sums = torch.zeros(len(rows_of_group), dtype=scores_R.dtype, device=scores_R.device)
            means = sums.index_add(0, slot_R, scores_R) / rows_of_group
            loss = loss + self.centering * (means.square() * (pairs_of_group > 0)).sum()
        lengths_R = torch.tensor(batch.lengths, device=scores_R.device, dtype=scores_R.dtype)
        kept = scores_R.detach()
        return LossTerms(
            loss,
            {
                "pairs": scores_R.new_tensor(float(len(better))),
                "pairs_right": wins(margin_P.detach()).sum(),
                "pairs_longer_wins": wins(lengths_R[better] - lengths_R[worse]).sum(),
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
            "longer_wins": metrics["pairs_longer_wins"] / pairs,
            "margin": metrics["pair_margin"] / pairs,
            "score_mean": mean,
            "score_deviation": max(metrics["score_squares"] / rows - mean * mean, 0.0) ** 0.5,
        }


_SUMS = frozenset({"pairs", "pairs_right", "pairs_longer_wins", "pair_margin", "rows", "score_sum", "score_squares"})


def _pairs(batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Row indices [P] of the better and the worse response of every ordered pair of a group."""
    better, worse = _beats(batch).nonzero(as_tuple=True)
    return better, worse


def _beats(batch: PackedBatch) -> Tensor:
    """[R, R] bool: row i is of the same group as row j, and better."""
    group_R, rank_R = batch.per_row[GROUP], batch.per_row["rank"]
    return (group_R[:, None] == group_R[None, :]) & (rank_R[:, None] < rank_R[None, :])


def _choices(scores_R: Tensor, batch: PackedBatch, slot_R: Tensor) -> Tensor:
    """Plackett-Luce, summed over groups of the mean over choices."""
    beats_RR = _beats(batch).to(scores_R.device)
    chooses_R = beats_RR.any(1)
    field_RR = beats_RR | torch.eye(len(scores_R), dtype=torch.bool, device=scores_R.device)
    rivals_RR = scores_R[None, :].expand(len(scores_R), -1).masked_fill(~field_RR, float("-inf"))
    terms_R = (rivals_RR.logsumexp(1) - scores_R)[chooses_R]
    slots = slot_R[chooses_R]
    return (terms_R / torch.bincount(slots)[slots].to(scores_R.dtype)).sum()


def _per_token(values_T: Tensor, batch: PackedBatch, better: Tensor, worse: Tensor, margin_P: Tensor) -> Tensor:
    """[P]: the pair loss averaged over tokens, from the first that differs to the end of the longer response."""
    rows = [
        (batch.tokens[start : start + length], values_T[start : start + length])
        for start, length in zip(batch.cu_seqlens_list, batch.lengths, strict=False)
    ]
    terms = []
    for high, low, margin in zip(better.tolist(), worse.tolist(), margin_P, strict=True):
        (tokens_high, values_high), (tokens_low, values_low) = rows[high], rows[low]
        end, shared = max(len(tokens_high), len(tokens_low)), min(len(tokens_high), len(tokens_low))
        differing = (tokens_high[:shared] != tokens_low[:shared]).nonzero()
        first = min(int(differing[0]) if len(differing) else shared, end - 1)  # equal rows: their last token
        difference = _held(values_high, end)[first:] - _held(values_low, end)[first:]
        terms.append(-torch.nn.functional.logsigmoid(difference - margin).mean())
    return torch.stack(terms) if terms else values_T[:0]


def _held(values: Tensor, length: int) -> Tensor:
    """``values`` with its last entry repeated up to ``length``."""
    return torch.cat([values, values[-1:].expand(length - len(values))])
