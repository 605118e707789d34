"""From the reward model's raw scores to what is maximised: scale, rules, clip, penalties."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_zj.algorithms.controllers import RunningMoments
from megatron_zj.algorithms.functional import (
    first_of_equals,
    masked_sums,
    mean_and_deviation,
    response_lengths,
    row_digests,
)
from megatron_zj.algorithms.rules import Answer, chosen_rules
from megatron_zj.config.algorithm import OnPolicyConfig
from megatron_zj.data.batch import Batch
from megatron_zj.roles.world import world_sum

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class ScoreScale:
    """Mean and deviation of the reward model's scores, as its own validation found them."""

    mean: float = 0.0
    deviation: float = 1.0


class ScoreError(ValueError):
    """The reward model gave something that is not a number.  Raised on every rank."""


def require_finite_scores(raw_scores_R: Tensor) -> None:
    """Raise ScoreError on every rank where some rank's scores hold a NaN or Inf.  Collective over the world."""
    broken = int(world_sum((~raw_scores_R.isfinite()).sum()))
    if broken:
        raise ScoreError(
            f"{broken} of the reward model's scores are not finite; its weights or its precision are at fault: "
            "look at the reward run's last metrics, or set algorithm.reward.engine.precision"
        )


class Shaping:
    """score = sign x clip((raw - mean) / deviation + rules) - penalties.

    Mean and deviation: the reward model's own, or (``running_scores``) those of all scores of this run, this batch
    included, or 0 and 1.  Equal rows of a rank get the raw score of the first.  ``decode``: token ids to text, for the
    rules.
    """

    def __init__(self, config: OnPolicyConfig, scale: ScoreScale, decode: Decode) -> None:
        self.config, self.scale, self.decode = config, scale, decode
        self.rules = chosen_rules(config.rules)
        self.running = RunningMoments()

    def __call__(self, raw_scores_R: Tensor, samples: Batch) -> Tensor:
        """Shaped scores [R] of this rank's samples.  Collective over the world."""
        config = self.config
        require_finite_scores(raw_scores_R)
        scores_R = self._scaled(raw_scores_R[first_of_equals(row_digests(samples.tokens))])
        if self.rules:
            scores_R = scores_R + scores_R.new_tensor([self._rule_rewards(answer) for answer in self._answers(samples)])
        if config.score_clip is not None:
            scores_R = scores_R.clamp(-config.score_clip, config.score_clip)
        scores_R = config.score_sign * scores_R
        scores_R = scores_R - config.missing_eos_penalty * samples.per_row["truncated"].to(scores_R.dtype)
        if config.length_penalty:
            excess_R = (response_lengths(samples.per_token["response_mask"]) - config.length_free).clamp(min=0)
            scores_R = scores_R - config.length_penalty * excess_R.to(scores_R.dtype)
        return scores_R

    def state_dict(self) -> dict[str, Any]:
        return {"scale": vars(self.scale), "running": self.running.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale = ScoreScale(**state["scale"])
        self.running.load_state_dict(state["running"])

    def _scaled(self, raw_scores_R: Tensor) -> Tensor:
        if self.config.running_scores:
            sums = world_sum(masked_sums(raw_scores_R, torch.ones_like(raw_scores_R)))
            self.running.add(float(sums[0]), *mean_and_deviation(sums))
            return (raw_scores_R - self.running.mean) / max(self.running.deviation, 1e-6)
        scale = self.scale if self.config.whiten_scores else ScoreScale()
        return (raw_scores_R - scale.mean) / max(scale.deviation, 1e-6)

    def _answers(self, samples: Batch) -> list[Answer]:
        answers = []
        rows = zip(samples.tokens.split(), samples.per_token["response_mask"].split(), strict=True)
        for (tokens, mask), truncated in zip(rows, samples.per_row["truncated"].tolist(), strict=True):
            prompt, response = tokens[~mask.bool()], tokens[mask.bool()]
            texts = self.decode(prompt.tolist()), self.decode(response.tolist())
            answers.append(Answer(*texts, prompt, response, bool(truncated)))
        return answers

    def _rule_rewards(self, answer: Answer) -> float:
        return sum(weight * found(answer) for found, weight in self.rules)
