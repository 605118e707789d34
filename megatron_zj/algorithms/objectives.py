"""Losses as the engine takes them: sums over a micro-batch, and their denominator."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kernels.value_head import value_loss
from megatron_zj.algorithms.functional import (
    approx_kl,
    clipped_policy_loss,
    estimate_kl,
    importance_weights,
)
from megatron_zj.config.algorithm import KLEstimator, PolicyGradientConfig
from megatron_zj.config.model import Want
from megatron_zj.data.packing import PackedBatch
from megatron_zj.engine.objective import LossTerms


@dataclass(frozen=True)
class PolicyObjective:
    """The clipped surrogate, plus a KL term and minus an entropy bonus where there are.

    Fields of the rows: ``old_logprobs``, ``advantages``, ``loss_weight`` and ``loss_count`` (see
    ``aggregation_fields``); ``ref_logprobs`` with a KL term, ``sampling_logprobs`` with importance weights.
    """

    temperature: float  # the rollout's: the policy is what was sampled from
    clip_ratio: float
    clip_high: float | None = None
    dual_clip: float | None = None
    entropy_coef: float = 0.0
    kl_coef: float = 0.0  # of the KL term in the loss
    kl_estimator: KLEstimator = "k3"
    importance_cap: float | None = None
    ratio_tolerance: float = 1e-5  # a token whose ratio is farther from 1 counts in ``ratio_off``

    @classmethod
    def of(cls, config: PolicyGradientConfig, temperature: float, kl_coef: float) -> PolicyObjective:
        """``kl_coef``: of the term in the loss; 0: it stands in the reward, or nowhere."""
        return cls(
            temperature,
            config.clip_ratio,
            config.clip_high,
            config.dual_clip,
            config.entropy_coef,
            kl_coef,
            config.kl_estimator,
            config.importance_cap,
            config.health.ratio,
        )

    @property
    def wants(self) -> tuple[Want, ...]:
        """Entropy costs a pass over the vocabulary, so it is asked for only when it is used."""
        return ("logprobs", "entropy") if self.entropy_coef else ("logprobs",)

    def weight(self, batch: PackedBatch) -> Tensor:
        """Response tokens, or rows."""
        return (batch.per_token["loss_count"] * batch.targets).sum()

    def needs(self, batch: PackedBatch) -> Tensor:
        """[T]: response tokens."""
        return batch.per_token["loss_weight"]

    def __call__(self, outputs: dict[str, Tensor], batch: PackedBatch) -> LossTerms:
        fields, weight_T = batch.per_token, batch.per_token["loss_weight"] * batch.targets
        log_ratio_T = (outputs["logprobs"] - fields["old_logprobs"]) * (weight_T > 0)
        loss_T, clipped_T = clipped_policy_loss(
            log_ratio_T, fields["advantages"], self.clip_ratio, self.clip_high, self.dual_clip
        )
        ratio_T = log_ratio_T.detach()
        sums = {"approx_kl": approx_kl(ratio_T), "clip_fraction": clipped_T}
        sums["ratio_off"] = ((ratio_T.exp() - 1.0).abs() > self.ratio_tolerance).to(loss_T.dtype)
        if self.importance_cap is not None:
            factor_T = importance_weights(fields["old_logprobs"], fields["sampling_logprobs"], self.importance_cap)
            loss_T, sums["importance"] = loss_T * factor_T, factor_T
        if self.kl_coef:
            kl_T = estimate_kl(outputs["logprobs"], fields["ref_logprobs"], self.kl_estimator)
            loss_T, sums["kl_loss"] = loss_T + self.kl_coef * kl_T, kl_T.detach()
        loss = (loss_T * weight_T).sum()
        if self.entropy_coef:
            sums["entropy"] = outputs["entropy"].detach()
            loss = loss - self.entropy_coef * (outputs["entropy"] * weight_T).sum()
        return LossTerms(loss, {name: (value * weight_T).sum() for name, value in sums.items()})


@dataclass(frozen=True)
class ValueObjective:
    """The clipped squared error of the value before each response token (``clip_value`` None: unclipped)."""

    clip_value: float | None
    wants: tuple[Want, ...] = ("values",)
    temperature: float = 1.0  # no logits here

    def weight(self, batch: PackedBatch) -> Tensor:
        """Response tokens, or rows."""
        return (batch.per_token["loss_count"] * batch.targets).sum()

    def needs(self, batch: PackedBatch) -> Tensor:
        """[T]: response tokens."""
        return batch.per_token["loss_weight"]

    def __call__(self, outputs: dict[str, Tensor], batch: PackedBatch) -> LossTerms:
        weight_T = batch.per_token["loss_weight"] * batch.targets
        loss_T, clipped_T = value_loss(
            outputs["values"], batch.per_token["old_values"], batch.per_token["returns"], clip=self.clip_value
        )
        return LossTerms((loss_T * weight_T).sum(), {"clip_fraction": (clipped_T * weight_T).sum()})


@dataclass(frozen=True)
class WeightedLogprobs:
    """sum of ``loss_weight`` x log-probability, by the sum of ``loss_count``: both fields of the tokens."""

    wants: tuple[Want, ...] = ("logprobs",)
    temperature: float = 1.0

    def weight(self, batch: PackedBatch) -> Tensor:
        """What the rows say."""
        return (batch.per_token["loss_count"] * batch.targets).sum()

    def needs(self, batch: PackedBatch) -> Tensor:
        """[T]: response tokens."""
        return batch.per_token["loss_weight"]

    def __call__(self, outputs: dict[str, Tensor], batch: PackedBatch) -> LossTerms:
        return LossTerms((outputs["logprobs"] * batch.per_token["loss_weight"] * batch.targets).sum())
