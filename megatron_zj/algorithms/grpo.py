"""Group relative policy optimization (Shao et al. 2024): PPO's surrogate without a critic.

Each prompt is answered several times; an answer's advantage, the same for all its tokens, is its score minus the
group's mean, by the group's deviation where ``scale_advantages`` (without it: Liu et al. 2025).  The tie to the
reference stands in the loss.
"""

from __future__ import annotations

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
from megatron_zj.algorithms.functional import aggregation_fields, group_advantages, spread_over_responses
from megatron_zj.algorithms.health import Health
from megatron_zj.algorithms.objectives import PolicyObjective
from megatron_zj.algorithms.resumable import Resumable
from megatron_zj.algorithms.shaping import Shaping
from megatron_zj.config.algorithm import GRPOConfig
from megatron_zj.data.stream import Stream
from megatron_zj.engine.objective import Metrics
from megatron_zj.roles.role import Role
from megatron_zj.roles.world import World, WorldBatch
from megatron_zj.rollout.generate import Rollout
from megatron_zj.runtime.timers import Timers


class GRPO(Resumable):
    """The algorithm over three roles: actor, reference, reward."""

    def __init__(
        self,
        config: GRPOConfig,
        roles: dict[str, Role],
        prompts: Stream,
        rollout: Rollout,
        world: World,
        seed: int,
        timers: Timers,
        shaping: Shaping,
    ) -> None:
        self.config, self.roles, self.prompts, self.rollout = config, roles, prompts, rollout
        self.world, self.seed, self.timers, self.shaping = world, seed, timers, shaping
        self.health = Health(config.health, config.kl_target, speaks=world.rank == 0)
        self.objective = PolicyObjective.of(config, rollout.temperature, config.kl_coef)
        super().__init__(prompts=prompts, shaping=shaping, health=self.health)

    def step(self) -> Metrics:
        """One iteration: collect, then learn."""
        with self.timers("collect"):
            samples, metrics = self.collect()
        with self.timers("learn"):
            metrics |= self.learn(samples)
        self.num_steps_done += 1
        return metrics | self.health(self.num_steps_done, metrics)

    def collect(self) -> tuple[WorldBatch, Metrics]:
        """Answer each prompt several times, score, compare within the group."""
        config, roles, temperature = self.config, self.roles, self.rollout.temperature
        with self.timers("generate"):
            prompts = next_prompts(self.prompts, config, self.world)
            samples = roles["actor"].generate(self.rollout.at_step(self.num_steps_done), prompts)
        where = "response_mask"
        logprobs = roles["actor"].infer("logprobs", samples, temperature, where) if config.recompute_logprobs else None
        ref_logprobs = roles["reference"].infer("logprobs", samples, temperature, where)
        raw_scores = roles["reward"].infer("scores", samples)

        local, mask, metrics = samples.local, samples.local.per_token["response_mask"], {}
        old = as_rows(logprobs.wait()) if logprobs else local.per_token["sampling_logprobs"]
        if logprobs:
            metrics = measure_parity(local, old)
            require_parity(metrics, config.parity)
        ref, raw = as_rows(ref_logprobs.wait()), as_tensor(raw_scores.wait())
        scores = self.shaping(raw, local)
        # a prompt's answers are neighbours on their home rank
        advantages = group_advantages(scores, config.samples_per_prompt, config.scale_advantages)
        trajectories = samples.with_fields(
            {
                "old_logprobs": old,
                "ref_logprobs": ref,
                "advantages": spread_over_responses(advantages, mask),
                **aggregation_fields(mask, config.aggregation, old.values.dtype),
            }
        )
        return trajectories, metrics | describe_samples(local, raw, scores) | describe_policy(local, old, ref)

    def learn(self, trajectories: WorldBatch) -> Metrics:
        """Several passes over the samples in fresh orders; metrics are means over the updates."""
        config, updates = self.config, []
        for ids in minibatches(trajectories, config, self.seed, self.num_steps_done):
            updates.append(self.roles["actor"].update(self.objective, trajectories, ids).wait())
            if config.early_stop_kl is not None and updates[-1]["approx_kl"] > config.early_stop_kl:
                break
        return prefixed("actor/", averages(updates)) | {"actor/first_ratio_off": updates[0]["ratio_off"]}
