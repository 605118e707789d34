"""What a demo run must reach: every target against the numbers of ``summary.json``.

A number that was not measured misses its target; so does one that is not a number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

IMPROVES = ("grpo", "rejection", "dpo")  # as PPO, must raise the oracle score of the SFT model they start from
WORSENS = ("ppo_flipped",)  # must lower it
CLEARLY = 0.05  # least change of the oracle score (in [0, 1]) that counts: some 1.6 standard errors of 200 answers


@dataclass(frozen=True)
class Target:
    """One claim: ``low`` <= ``measured`` <= ``high``."""

    claim: str
    measured: float | None  # None: the run did not measure it
    low: float = -math.inf
    high: float = math.inf

    @property
    def met(self) -> bool:
        """Whether it was measured and lies between the bounds."""
        return self.measured is not None and self.low <= self.measured <= self.high

    @property
    def wanted(self) -> str:
        """The bounds in words."""
        if math.isinf(self.high):
            return f">= {self.low:g}"
        return f"<= {self.high:g}" if math.isinf(self.low) else f"{self.low:g} to {self.high:g}"

    def __str__(self) -> str:
        """``met     exam, untrained: 0.242 (0.15 to 0.35)``."""
        measured = "not measured" if self.measured is None else f"{self.measured:.3f}"
        return f"{'met   ' if self.met else 'MISSED'}  {self.claim}: {measured} ({self.wanted})"


def demo_targets(summary: Mapping[str, Any]) -> list[Target]:
    """Of the standard chain: pre-training, SFT, reward model, PPO."""
    exam, oracle = summary["exam_accuracy"], summary["oracle_score"]
    return [
        Target("exam, untrained", exam["untrained"], 0.15, 0.35),
        Target("exam, SFT from scratch", exam["scratch_sft"], high=0.45),
        Target("exam, pre-training + SFT", exam["pretrain_sft"], 0.80),
        Target("reward model, held-out pairs", summary["reward_pair_accuracy"], 0.90),
        Target("oracle score, SFT", oracle["sft"], 0.60),
        Target("oracle score, gain by PPO", _change(oracle["sft"], oracle["ppo"]), 0.10),
        Target("exam, change by PPO", _change(exam["pretrain_sft"], exam["ppo"]), -0.02),
        _kl("ppo", summary["learning"]),
        _held_out_kl("ppo", summary["learning"]),
    ]


def learning_targets(summary: Mapping[str, Any]) -> list[Target]:
    """Of the other algorithms, each from the same SFT model, and of the control with the reward's sign flipped."""
    before, learning = summary["oracle_score"]["sft"], summary["learning"]
    changes = {name: _change(before, learning.get(name, {}).get("oracle_score")) for name in (*IMPROVES, *WORSENS)}
    raised = [Target(f"oracle score, gain by {name}", changes[name], CLEARLY) for name in IMPROVES]
    lowered = [Target(f"oracle score, change by {name}", changes[name], high=-CLEARLY) for name in WORSENS]
    return [*raised, *lowered, _kl("grpo", learning), *(_held_out_kl(name, learning) for name in IMPROVES)]


def _kl(name: str, learning: Mapping[str, Any]) -> Target:
    """The highest KL of any training iteration against its configured target; without either it is not measured."""
    found = learning.get(name, {})
    limit = found.get("kl_target")
    measured = None if limit is None else found.get("kl_highest")
    return Target(f"KL of {name} at its highest", measured, high=math.inf if limit is None else limit)


def _held_out_kl(name: str, learning: Mapping[str, Any]) -> Target:
    """The highest KL of any judged checkpoint, measured alike for all, against PPO's target; so each must have one."""
    limit = learning.get("ppo", {}).get("kl_target")
    found = list(learning.get(name, {}).get("held_out_kl_curve", {}).values())
    measured = None if limit is None or not found or None in found else max(found)
    return Target(f"KL of {name} on held-out patients", measured, high=math.inf if limit is None else limit)


def _change(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before
