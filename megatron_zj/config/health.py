"""Limits of the health checks of reinforcement learning: beyond them an alarm is raised (algorithms/health.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_zj.config.ranges import check_ranges


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """A limit of None switches its alarm off."""

    action: Literal["warn", "stop", "off"] = "warn"  # what an alarm does
    patience: int = 3  # iterations in a row that an alarm must hold before ``stop`` ends the run
    ratio: float = 1e-5  # |probability ratio - 1| of any token on an iteration's first minibatch (raise it for bf16)
    kl_low: float | None = -1.0  # mean sequence KL to the reference (nats) below this: sampling and scoring disagree
    kl_high: float | None = 30.0  # above this the policy has left the reference; with a kl_target: above 3 x that
    clip_fraction: float | None = 0.5  # share of tokens that the policy's clip binds
    value_clip_fraction: float | None = 0.8  # share of values that the critic's clip binds
    explained_variance: float | None = -0.5  # of the returns by the critic: below this it is worse than a constant
    entropy: float | None = 0.02  # estimated entropy (nats a token) below this: the policy has collapsed
    length_correlation: float | None = 0.9  # |correlation| of score and length above this: it is rewarded for length
    truncated: float | None = 0.95  # share of answers that never end
    repetition: float | None = 0.6  # mean share of an answer's 4-grams that occurred before

    def __post_init__(self) -> None:
        check_ranges(self, patience="[1, inf)", ratio="(0, inf)")
