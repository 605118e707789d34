"""Proximal policy optimization over four roles: actor, critic, reference, reward.

A step is ``collect`` (sample, score, estimate advantages; no gradients) and ``learn`` (several passes of clipped
updates over what was collected).  Read those two.  Their parts: ``functional`` the formulas, ``objectives`` the two
losses, ``shaping`` what becomes of a score, ``controllers`` the KL coefficient, ``experience`` prompts and reports.

Sources: the clipped surrogate, Schulman et al. 2017; advantages, Schulman et al. 2016; the KL term in the reward,
Ziegler et al. 2019 and Ouyang et al. 2022.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_zj.algorithms.controllers import KLController
from megatron_zj.algorithms.experience import (
    as_rows,
    as_tensor,
    averages,
    describe_policy,
    describe_samples,
    measure_parity,
    minibatches,
    next_prompts,
    prefixed,
    require_parity,
)
from megatron_zj.algorithms.functional import (
    aggregation_fields,
    masked_sums,
    mean_and_deviation,
    response_advantages,
    shape_rewards,
    whiten,
)
from megatron_zj.algorithms.health import Health
from megatron_zj.algorithms.objectives import PolicyObjective, ValueObjective
from megatron_zj.algorithms.resumable import Resumable
from megatron_zj.algorithms.shaping import Shaping
from megatron_zj.config.algorithm import PPOConfig
from megatron_zj.data.batch import Rows
from megatron_zj.data.stream import Stream
from megatron_zj.engine.objective import Metrics
from megatron_zj.roles.role import Role
from megatron_zj.roles.world import World, WorldBatch, world_sum
from megatron_zj.rollout.generate import Rollout
from megatron_zj.runtime.timers import Timers


@dataclass(frozen=True)
class PPORoles:
    """The four models."""

    actor: Role
    critic: Role
    reference: Role
    reward: Role


class PPO(Resumable):
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
        shaping: Shaping,
    ) -> None:
        self.config, self.models, self.prompts, self.rollout = config, roles, prompts, rollout
        self.world, self.seed, self.timers, self.shaping = world, seed, timers, shaping
        adaptive = config.kl_controller == "adaptive"
        self.kl = KLController(config.kl_coef, config.kl_target if adaptive else None, config.kl_horizon)
        self.health = Health(config.health, config.kl_target, speaks=world.rank == 0)
        super().__init__(prompts=prompts, shaping=shaping, kl=self.kl, health=self.health)

    @property
    def roles(self) -> dict[str, Role]:
        """Every model of the algorithm, by name."""
        return vars(self.models)

    def step(self) -> Metrics:
        """One iteration: collect, then learn."""
        with self.timers("collect"):
            samples, metrics = self.collect()
        with self.timers("learn"):
            metrics |= self.learn(samples)
        if self.num_steps_done >= self.config.critic_warmup_steps:  # before, the coefficient has nothing to act on
            self.kl.update(metrics["kl"], samples.num_rows)
        self.num_steps_done += 1
        return metrics | self.health(self.num_steps_done, metrics)

    def collect(self) -> tuple[WorldBatch, Metrics]:
        """Sample responses from the current policy, score them, estimate advantages."""
        config, models, temperature = self.config, self.models, self.rollout.temperature
        with self.timers("generate"):
            prompts = next_prompts(self.prompts, config, self.world)
            samples = models.actor.generate(self.rollout.at_step(self.num_steps_done), prompts)
        where = "response_mask"
        logprobs = models.actor.infer("logprobs", samples, temperature, where) if config.recompute_logprobs else None
        ref_logprobs = models.reference.infer("logprobs", samples, temperature, where)
        values = models.critic.infer("values", samples, at=where)
        raw_scores = models.reward.infer("scores", samples)

        local, mask = samples.local, samples.local.per_token["response_mask"]
        old = as_rows(logprobs.wait()) if logprobs else local.per_token["sampling_logprobs"]
        metrics = self._check_parity(samples, old) if logprobs else {}
        ref, old_values = as_rows(ref_logprobs.wait()), as_rows(values.wait())
        raw = as_tensor(raw_scores.wait())
        scores = self.shaping(raw, local)
        in_reward = self.kl.coef if config.kl_in == "reward" else 0.0
        rewards = shape_rewards(scores, old, ref, mask, in_reward, config.kl_estimator)
        advantages, returns = response_advantages(rewards, old_values, mask, config.gamma, config.lam)
        trajectories = samples.with_fields(
            {
                "old_logprobs": old,
                "ref_logprobs": ref,
                "old_values": old_values,
                "advantages": self._whitened(advantages, mask),
                "returns": returns,
                **aggregation_fields(mask, config.aggregation, old.values.dtype),
            }
        )
        metrics |= describe_samples(local, raw, scores) | describe_policy(local, old, ref)
        metrics |= self._judge_critic(returns, old_values, mask)
        return trajectories, metrics | {"kl_coef": self.kl.coef}

    def learn(self, trajectories: WorldBatch) -> Metrics:
        """Several passes over the trajectories in fresh orders; metrics are means over the updates."""
        config, step = self.config, self.num_steps_done
        in_loss = self.kl.coef if config.kl_in == "loss" else 0.0
        policy_objective = PolicyObjective.of(config, self.rollout.temperature, in_loss)
        value_objective = ValueObjective(config.clip_value)
        actor_learns = step >= config.critic_warmup_steps
        updates: list[Metrics] = []
        first: Metrics = {}
        for row_ids in minibatches(trajectories, config, self.seed, step):
            critic = self.models.critic.update(value_objective, trajectories, row_ids)
            actor = self.models.actor.update(policy_objective, trajectories, row_ids) if actor_learns else None
            updates.append(prefixed("critic/", critic.wait()))
            if actor is None:
                continue
            found = actor.wait()
            first = first or {"actor/first_ratio_off": found["ratio_off"]}
            updates[-1] |= prefixed("actor/", found)
            if config.early_stop_kl is not None and found["approx_kl"] > config.early_stop_kl:
                actor_learns = False
        return averages(updates) | first

    def _check_parity(self, samples: WorldBatch, logprobs: Rows) -> Metrics:
        """Rollout and training must agree about the policy."""
        parity = measure_parity(samples.local, logprobs)
        require_parity(parity, self.config.parity)
        return parity

    def _whitened(self, advantages: Rows, mask: Rows) -> Rows:
        """Mean 0 and deviation 1 over the response tokens of the world."""
        if not self.config.whiten_advantages:
            return advantages
        moments = mean_and_deviation(world_sum(masked_sums(advantages.values, mask.values)))
        return advantages.replace(whiten(advantages.values, mask.values, *moments))

    def _judge_critic(self, returns: Rows, values: Rows, mask: Rows) -> Metrics:
        """Share of the returns' variance that the values explain: 1 at best, 0 for a constant."""
        _, error = mean_and_deviation(world_sum(masked_sums(returns.values - values.values, mask.values)))
        _, whole = mean_and_deviation(world_sum(masked_sums(returns.values, mask.values)))
        return {"explained_variance": 1.0 - (error / max(whole, 1e-8)) ** 2}
