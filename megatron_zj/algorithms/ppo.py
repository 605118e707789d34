"""Proximal policy optimization over four roles: actor, critic, reference, reward.

A step is ``collect`` (sample, score, estimate advantages; no gradients) and ``learn`` (several passes of clipped
updates over what was collected).  Read those two; the rest is the two objectives they use and what is reported.

Sources: the clipped surrogate, Schulman et al. 2017; advantages, Schulman et al. 2016; the KL term in the reward,
Ziegler et al. 2019 and Ouyang et al. 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_zj.algorithms.functional import (
    approx_kl,
    clipped_policy_loss,
    clipped_value_loss,
    masked_sums,
    mean_and_deviation,
    response_advantages,
    shape_rewards,
    whiten,
)
from megatron_zj.config.algorithm import PPOConfig
from megatron_zj.config.model import Want
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.data.packing import PackedBatch
from megatron_zj.data.stream import Stream
from megatron_zj.engine.objective import LossTerms, Metrics
from megatron_zj.roles.role import Role
from megatron_zj.roles.world import World, WorldBatch, world_max, world_sum
from megatron_zj.rollout.generate import Rollout
from megatron_zj.runtime.seed import keyed_generator
from megatron_zj.runtime.timers import Timers


@dataclass(frozen=True)
class PPORoles:
    """The four models."""

    actor: Role
    critic: Role
    reference: Role
    reward: Role


@dataclass(frozen=True)
class ScoreScale:
    """Mean and deviation of the reward model's scores, as its own validation found them."""

    mean: float = 0.0
    deviation: float = 1.0


class PPO:
    """The algorithm.  ``rollout`` turns prompts into samples on the actor's shards."""

    def __init__(
        self,
        config: PPOConfig,
        roles: PPORoles,
        prompts: Stream,
        rollout: Rollout,
        world: World,
        seed: int,
        timers: Timers,
        scale: ScoreScale,
    ) -> None:
        self.config, self.models, self.prompts, self.rollout = config, roles, prompts, rollout
        self.world, self.seed, self.timers, self.scale = world, seed, timers, scale
        self.policy_objective = PolicyObjective(config.clip_ratio, rollout.temperature, config.entropy_coef)
        self.value_objective = ValueObjective(config.clip_value)
        self.num_steps_done = 0

    @property
    def roles(self) -> dict[str, Role]:
        """Every model of the algorithm, by name."""
        return vars(self.models)

    def step(self) -> Metrics:
        """One iteration: collect, then learn."""
        with self.timers("collect"):
            samples, collected = self.collect()
        with self.timers("learn"):
            learned = self.learn(samples)
        self.num_steps_done += 1
        return collected | learned

    def collect(self) -> tuple[WorldBatch, Metrics]:
        """Sample responses from the current policy, score them, estimate advantages."""
        config, models, temperature = self.config, self.models, self.rollout.temperature
        with self.timers("generate"):
            samples = models.actor.generate(self.rollout.at_step(self.num_steps_done), self._next_prompts())
        logprobs = models.actor.infer("logprobs", samples, temperature)
        ref_logprobs = models.reference.infer("logprobs", samples, temperature)
        values = models.critic.infer("values", samples)
        raw_scores = models.reward.infer("scores", samples)

        mask, old, ref = samples.local.per_token["response_mask"], _rows(logprobs.wait()), _rows(ref_logprobs.wait())
        scores = self._scale(_tensor(raw_scores.wait()), samples.local)
        rewards = shape_rewards(scores, old, ref, mask, config.kl_coef)
        estimates = response_advantages(rewards, _rows(values.wait()), mask, config.gamma, config.lam)
        moments = mean_and_deviation(world_sum(masked_sums(estimates[0].values, mask.values)))
        advantages = estimates[0].replace(whiten(estimates[0].values, mask.values, *moments))
        trajectories = samples.with_fields(
            {"old_logprobs": old, "old_values": _rows(values.wait()), "advantages": advantages, "returns": estimates[1]}
        )
        return trajectories, self._report(trajectories.local, ref, _tensor(raw_scores.wait()), scores)

    def learn(self, trajectories: WorldBatch) -> Metrics:
        """Several passes over the trajectories in fresh orders; metrics are means over the updates."""
        config, updates = self.config, []
        for epoch in range(config.epochs):
            generator = keyed_generator(self.seed, "minibatches", self.num_steps_done, epoch)
            order = torch.randperm(trajectories.num_rows, generator=generator)
            for row_ids in torch.split(order, config.minibatch_size):
                critic = self.models.critic.update(self.value_objective, trajectories, row_ids.tolist())
                actor = self.models.actor.update(self.policy_objective, trajectories, row_ids.tolist())
                updates.append(_prefixed("critic/", critic.wait()) | _prefixed("actor/", actor.wait()))
        return {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}

    def _next_prompts(self) -> WorldBatch:
        """The next prompts, each ``samples_per_prompt`` times, with a sample id that no layout changes."""
        copies = self.config.samples_per_prompt
        local = self.prompts.next(self.config.prompts_per_step, self.world.rank, self.world.size)
        repeated = local.select([row for row in range(local.num_rows) for _ in range(copies)])
        copy = torch.arange(repeated.num_rows) % copies
        return WorldBatch.gather(
            repeated.with_fields(per_row={"sample_id": repeated.per_row["sample_id"] * copies + copy})
        )

    def _scale(self, scores_R: Tensor, local: Batch) -> Tensor:
        scale = self.scale if self.config.whiten_scores else ScoreScale()
        penalty = self.config.missing_eos_penalty * local.per_row["truncated"].to(scores_R.dtype)
        return (scores_R - scale.mean) / max(scale.deviation, 1e-6) - penalty

    def _report(self, local: Batch, ref: Rows, raw_scores_R: Tensor, scores_R: Tensor) -> Metrics:
        """What a person watches, over the whole world's samples."""
        mask_T = local.per_token["response_mask"].values.bool()
        old_T, returns_T = local.per_token["old_logprobs"].values, local.per_token["returns"].values
        error_T = returns_T - local.per_token["old_values"].values
        drift_T = (old_T - local.per_token["sampling_logprobs"].values).abs() * mask_T
        sums = world_sum(
            torch.stack(
                [
                    torch.tensor(float(local.num_rows), dtype=torch.float64),
                    mask_T.double().sum(),
                    raw_scores_R.double().sum(),
                    scores_R.double().sum(),
                    ((old_T - ref.values) * mask_T).double().sum(),
                    local.per_row["truncated"].double().sum(),
                    drift_T.double().sum(),
                ]
            )
        )
        rows, tokens, raw, scaled, kl, truncated, drift = (float(value) for value in sums)
        _, error_deviation = mean_and_deviation(world_sum(masked_sums(error_T, mask_T)))
        _, return_deviation = mean_and_deviation(world_sum(masked_sums(returns_T, mask_T)))
        return {
            "score": raw / rows,
            "score_scaled": scaled / rows,
            "kl": kl / rows,
            "kl_per_token": kl / max(tokens, 1.0),
            "response_length": tokens / rows,
            "truncated": truncated / rows,
            "explained_variance": 1.0 - (error_deviation / max(return_deviation, 1e-8)) ** 2,
            "parity/mean": drift / max(tokens, 1.0),
            "parity/max": world_max(float(drift_T.max()) if len(drift_T) else 0.0),
            "tokens": float(tokens),
        }

    def state_dict(self) -> dict[str, Any]:
        """Iterations done and the place in the prompts; samples are keyed by both, so there is no other randomness."""
        return {"num_steps_done": self.num_steps_done, "prompts": self.prompts.state_dict(), "scale": vars(self.scale)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo ``state_dict``."""
        self.num_steps_done = state["num_steps_done"]
        self.prompts.load_state_dict(state["prompts"])
        self.scale = ScoreScale(**state["scale"])


@dataclass(frozen=True)
class PolicyObjective:
    """The clipped surrogate over response tokens, minus an optional entropy bonus."""

    clip_ratio: float
    temperature: float  # the rollout's: the policy is what was sampled from
    entropy_coef: float = 0.0

    @property
    def wants(self) -> tuple[Want, ...]:
        """Entropy costs a pass over the vocabulary, so it is asked for only when it is used."""
        return ("logprobs", "entropy") if self.entropy_coef else ("logprobs",)

    def weight(self, batch: PackedBatch) -> Tensor:
        """Response tokens."""
        return (batch.per_token["response_mask"] * batch.targets).sum()

    def __call__(self, outputs: dict[str, Tensor], batch: PackedBatch) -> LossTerms:
        mask_T = batch.per_token["response_mask"] * batch.targets
        log_ratio_T = (outputs["logprobs"] - batch.per_token["old_logprobs"]) * mask_T
        loss_T, clipped_T = clipped_policy_loss(log_ratio_T, batch.per_token["advantages"], self.clip_ratio)
        metrics = {
            "approx_kl": (approx_kl(log_ratio_T.detach()) * mask_T).sum(),
            "clip_fraction": (clipped_T * mask_T).sum(),
        }
        loss = (loss_T * mask_T).sum()
        if self.entropy_coef:
            metrics["entropy"] = (outputs["entropy"].detach() * mask_T).sum()
            loss = loss - self.entropy_coef * (outputs["entropy"] * mask_T).sum()
        return LossTerms(loss, metrics)


@dataclass(frozen=True)
class ValueObjective:
    """The clipped squared error of the value before each response token."""

    clip_value: float
    wants: tuple[Want, ...] = ("values",)
    temperature: float = 1.0  # no logits here

    def weight(self, batch: PackedBatch) -> Tensor:
        """Response tokens."""
        return (batch.per_token["response_mask"] * batch.targets).sum()

    def __call__(self, outputs: dict[str, Tensor], batch: PackedBatch) -> LossTerms:
        mask_T = batch.per_token["response_mask"] * batch.targets
        loss_T, clipped_T = clipped_value_loss(
            outputs["values"], batch.per_token["old_values"], batch.per_token["returns"], self.clip_value
        )
        return LossTerms((loss_T * mask_T).sum(), {"clip_fraction": (clipped_T * mask_T).sum()})


def _prefixed(prefix: str, metrics: Metrics) -> Metrics:
    return {prefix + name: value for name, value in metrics.items()}


def _rows(answer: Rows | Tensor) -> Rows:
    if not isinstance(answer, Rows):
        raise TypeError("expected a value a token")
    return answer


def _tensor(answer: Rows | Tensor) -> Tensor:
    if isinstance(answer, Rows):
        raise TypeError("expected a value a row")
    return answer
