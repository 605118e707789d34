"""Which algorithm a ``kind`` names, which models it has, and the head each of them ends in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_zj.algorithms.ppo import PPO, PPORoles, ScoreScale
from megatron_zj.algorithms.pretrain import NextToken
from megatron_zj.algorithms.reward import RankedGroups
from megatron_zj.algorithms.supervised import Supervised, SupervisedObjective
from megatron_zj.config.algorithm import (
    AlgorithmConfig,
    PPOConfig,
    PretrainConfig,
    RewardConfig,
    SamplingConfig,
    SFTConfig,
)
from megatron_zj.config.model import HeadKind
from megatron_zj.data.stream import Stream
from megatron_zj.roles.role import Role
from megatron_zj.roles.world import World
from megatron_zj.rollout.generate import Rollout
from megatron_zj.runtime.timers import Timers


@dataclass(frozen=True)
class RoleKind:
    """A model of an algorithm: its head, and whether it learns."""

    head: HeadKind
    trains: bool = True


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


@dataclass(frozen=True)
class Recipe:
    """How to make one kind of algorithm."""

    roles: Mapping[str, RoleKind]
    build: Callable[[AlgorithmConfig, Parts], Supervised | PPO]
    updates_per_step: Callable[[AlgorithmConfig], int]  # optimizer steps an algorithm step


def _supervised(objective: Callable[[AlgorithmConfig], SupervisedObjective], head: HeadKind) -> Recipe:
    def build(config: AlgorithmConfig, parts: Parts) -> Supervised:
        if isinstance(config, PPOConfig):
            raise TypeError("PPO is not a supervised algorithm")
        return Supervised(
            parts.roles["model"],
            objective(config),
            parts.stream,
            config.global_batch_size,
            parts.world,
            parts.timers,
            parts.validation,
        )

    return Recipe({"model": RoleKind(head)}, build, lambda config: 1)


def _ranked_groups(config: AlgorithmConfig) -> RankedGroups:
    if not isinstance(config, RewardConfig):
        raise TypeError(f"expected a reward configuration, got {config.kind}")
    return RankedGroups(config.centering)


def _build_ppo(config: AlgorithmConfig, parts: Parts) -> PPO:
    if not isinstance(config, PPOConfig):
        raise TypeError(f"expected a PPO configuration, got {config.kind}")
    rollout = parts.rollout(config.sampling)
    roles = PPORoles(**parts.roles)
    return PPO(config, roles, parts.stream, rollout, parts.world, parts.seed, parts.timers, parts.score_scale)


def _ppo_updates(config: AlgorithmConfig) -> int:
    if not isinstance(config, PPOConfig):
        raise TypeError(f"expected a PPO configuration, got {config.kind}")
    return config.epochs * config.prompts_per_step * config.samples_per_prompt // config.minibatch_size


RECIPES: dict[str, Recipe] = {
    PretrainConfig.kind: _supervised(lambda config: NextToken(), "lm"),
    SFTConfig.kind: _supervised(lambda config: NextToken(), "lm"),
    RewardConfig.kind: _supervised(_ranked_groups, "score"),
    PPOConfig.kind: Recipe(
        {
            "actor": RoleKind("lm"),
            "critic": RoleKind("value"),
            "reference": RoleKind("lm", trains=False),
            "reward": RoleKind("score", trains=False),
        },
        _build_ppo,
        _ppo_updates,
    ),
}
