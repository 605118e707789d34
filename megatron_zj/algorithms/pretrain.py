"""Next-token prediction: pre-training and SFT.  They differ in what the data puts into ``loss_mask``, only."""

from __future__ import annotations

import math

from torch import Tensor

from megatron_zj.config.model import Want
from megatron_zj.data.packing import PackedBatch
from megatron_zj.engine.objective import LossTerms, Metrics


class NextToken:
    """Minus the log-probability of every token whose ``loss_mask`` is 1, per such token."""

    wants: tuple[Want, ...] = ("logprobs",)
    temperature = 1.0

    def weight(self, batch: PackedBatch) -> Tensor:
        """Predicted tokens that carry loss."""
        return (batch.per_token["loss_mask"] * batch.targets).sum()

    def needs(self, batch: PackedBatch) -> Tensor:
        """[T]: the log-probabilities that count."""
        return batch.per_token["loss_mask"]

    def __call__(self, outputs: dict[str, Tensor], batch: PackedBatch) -> LossTerms:
        mask = (batch.per_token["loss_mask"] * batch.targets).to(outputs["logprobs"].dtype)
        return LossTerms(-(outputs["logprobs"] * mask).sum())

    def summarise(self, metrics: Metrics) -> Metrics:
        """Adds the perplexity, exp(loss)."""
        return metrics | {"perplexity": math.exp(min(metrics["loss"], 50.0))}
