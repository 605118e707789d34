"""What is learned: one dataclass an algorithm, chosen by ``kind``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_zj.config.optim import EngineConfig, OptimConfig


@dataclass(frozen=True, kw_only=True)
class RoleConfig:
    """One model of an algorithm: where its weights come from, where it lives."""

    load: Path | None = None  # checkpoint whose weights it starts from; None: see the algorithm
    load_role: str | None = None  # the role inside that checkpoint; None: the only one, or the same name
    placement: str = "all"  # a key of placements; "all" is every rank under ``parallel``
    engine: EngineConfig | None = None  # None: the run's ``engine``
    optim: OptimConfig | None = None  # None: the run's ``optim`` (a frozen role has none either way)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How responses are drawn from the policy."""

    max_new_tokens: int = 64  # tokens of a response, eos included
    min_new_tokens: int = 0  # eos is forbidden before this many tokens
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # nucleus: likeliest tokens up to this probability; 1: off
    repetition_penalty: float = 1.0  # CTRL (Keskar et al. 2019); 1: off
    max_batch_rows: int = 64  # rows decoded at once, a data-parallel rank

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"need 0 <= min_new_tokens <= max_new_tokens >= 1, got {self.min_new_tokens}, {self.max_new_tokens}"
            )
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or self.repetition_penalty <= 0:
            raise ValueError("need temperature >= 0, top_k >= 0, 0 < top_p <= 1, repetition_penalty > 0")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Next-token prediction on packed text."""

    kind: Literal["pretrain"] = "pretrain"
    global_batch_size: int = 8  # rows an optimizer step
    model: RoleConfig = RoleConfig()


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Next-token prediction on the assistant's turns."""

    kind: Literal["sft"] = "sft"
    global_batch_size: int = 8  # dialogues an optimizer step
    model: RoleConfig = RoleConfig()


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """All-pairs logistic ranking loss (Ouyang et al. 2022, eq. 1) on the last token's score."""

    kind: Literal["reward"] = "reward"
    global_batch_size: int = 8  # prompts (ranked groups) an optimizer step
    centering: float = 0.0  # coefficient of the squared mean score of a group
    model: RoleConfig = RoleConfig()


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Proximal policy optimization (Schulman et al. 2017) with a KL term in the reward (Ouyang et al. 2022).

    Where ``load`` is None: actor and reference start from ``checkpoint.load``, critic from the reward model.
    """

    kind: Literal["ppo"] = "ppo"
    actor: RoleConfig = RoleConfig()
    critic: RoleConfig = RoleConfig()
    reference: RoleConfig = RoleConfig()
    reward: RoleConfig = RoleConfig()
    sampling: SamplingConfig = SamplingConfig()
    prompts_per_step: int = 32  # prompts drawn an iteration, over all ranks
    samples_per_prompt: int = 1  # responses to each prompt
    epochs: int = 2  # passes over a step's samples
    minibatch_size: int = 16  # samples an optimizer step
    gamma: float = 1.0  # discount a token
    lam: float = 0.95  # GAE's lambda (Schulman et al. 2016)
    kl_coef: float = 0.05  # weight of the KL term, per token, in the reward
    kl_target: float | None = None  # mean sequence KL (nats) the report and the health check compare with
    clip_ratio: float = 0.2  # the probability ratio counts within 1 -/+ this
    clip_value: float = 0.2  # a new value counts within this of the old one
    entropy_coef: float = 0.0  # weight of the entropy bonus; 0: none
    whiten_scores: bool = True  # subtract/divide by the reward model's stored mean and deviation
    missing_eos_penalty: float = 0.0  # subtracted from the score of a truncated answer

    def __post_init__(self) -> None:
        rows = self.prompts_per_step * self.samples_per_prompt
        if rows % self.minibatch_size:
            raise ValueError(
                f"minibatch_size {self.minibatch_size} must divide prompts_per_step x samples_per_prompt = {rows}"
            )


AlgorithmConfig = PretrainConfig | SFTConfig | RewardConfig | PPOConfig
