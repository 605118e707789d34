"""Which algorithm a ``kind`` builds.  The models it has stand on its configuration (``role_kinds``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from megatron_zj.algorithms.algorithm import Algorithm
from megatron_zj.algorithms.dpo import DPO
from megatron_zj.algorithms.grpo import GRPO
from megatron_zj.algorithms.ppo import PPO, PPORoles
from megatron_zj.algorithms.pretrain import NextToken
from megatron_zj.algorithms.rejection import BestOfAll, BestOfN
from megatron_zj.algorithms.reward import RankedGroups
from megatron_zj.algorithms.shaping import Decode, ScoreScale, Shaping
from megatron_zj.algorithms.supervised import Supervised, SupervisedObjective
from megatron_zj.config.algorithm import (
    AlgorithmConfig,
    DPOConfig,
    GRPOConfig,
    OnPolicyConfig,
    PPOConfig,
    PretrainConfig,
    RejectionConfig,
    RewardConfig,
    SFTConfig,
)
from megatron_zj.config.sampling import SamplingConfig
from megatron_zj.data.stream import Stream
from megatron_zj.roles.role import Role
from megatron_zj.roles.world import World
from megatron_zj.rollout.generate import Rollout
from megatron_zj.runtime.timers import Timers

C = TypeVar("C", bound=AlgorithmConfig)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What an algorithm is made of, apart from its own configuration."""

    roles: Mapping[str, Role]
    stream: Stream
    validation: Stream | None
    rollout: Callable[[SamplingConfig], Rollout]
    world: World
    seed: int
    timers: Timers
    score_scale: ScoreScale
    decode: Decode  # token ids to text

    def shaping(self, config: OnPolicyConfig) -> Shaping:
        """What becomes of a score."""
        return Shaping(config, self.score_scale, self.decode)


Builder = Callable[[AlgorithmConfig, Parts], Algorithm]


def _for(kind: type[C], build: Callable[[C, Parts], Algorithm]) -> Builder:
    """``build`` for configurations of its own kind only."""

    def checked(config: AlgorithmConfig, parts: Parts) -> Algorithm:
        if not isinstance(config, kind):
            raise TypeError(f"expected a {kind.__name__}, got {type(config).__name__}")
        return build(config, parts)

    return checked


def _supervised(config: PretrainConfig | SFTConfig | RewardConfig, parts: Parts) -> Supervised:
    objective: SupervisedObjective = NextToken()
    if isinstance(config, RewardConfig):
        objective = RankedGroups(config.centering, config.loss, config.margin)
    return Supervised(
        parts.roles["model"],
        objective,
        parts.stream,
        config.global_batch_size,
        parts.world,
        parts.timers,
        parts.validation,
        proves_head=isinstance(config, RewardConfig),
    )


def _ppo(config: PPOConfig, parts: Parts) -> PPO:
    roles, rollout, shaping = PPORoles(**parts.roles), parts.rollout(config.sampling), parts.shaping(config)
    return PPO(config, roles, parts.stream, rollout, parts.world, parts.seed, parts.timers, shaping)


def _dpo(config: DPOConfig, parts: Parts) -> DPO:
    actor, reference = parts.roles["actor"], parts.roles["reference"]
    return DPO(config, actor, reference, parts.stream, parts.world, parts.timers, parts.validation)


def _grpo(config: GRPOConfig, parts: Parts) -> GRPO:
    roles, rollout, shaping = dict(parts.roles), parts.rollout(config.sampling), parts.shaping(config)
    return GRPO(config, roles, parts.stream, rollout, parts.world, parts.seed, parts.timers, shaping)


def _rejection(config: RejectionConfig, parts: Parts) -> BestOfN | BestOfAll:
    roles = dict(parts.roles)
    if config.source == "filter":
        return BestOfAll(config, roles, parts.stream, parts.world, parts.seed, parts.timers)
    rollout, shaping = parts.rollout(config.sampling), parts.shaping(config)
    return BestOfN(config, roles, parts.stream, rollout, parts.world, parts.seed, parts.timers, shaping)


BUILDERS: dict[str, Builder] = {
    PretrainConfig.kind: _for(PretrainConfig, _supervised),
    SFTConfig.kind: _for(SFTConfig, _supervised),
    RewardConfig.kind: _for(RewardConfig, _supervised),
    PPOConfig.kind: _for(PPOConfig, _ppo),
    DPOConfig.kind: _for(DPOConfig, _dpo),
    GRPOConfig.kind: _for(GRPOConfig, _grpo),
    RejectionConfig.kind: _for(RejectionConfig, _rejection),
}
