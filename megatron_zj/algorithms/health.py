"""Is this run healthy?  Named alarms over an iteration's metrics, each with advice."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_zj.config.health import HealthConfig
from megatron_zj.engine.objective import Metrics

logger = logging.getLogger(__name__)


class HealthError(RuntimeError):
    """An alarm that held long enough to stop the run.  Raised on every rank; ``metrics`` are the iteration's."""

    def __init__(self, message: str, metrics: Metrics) -> None:
        super().__init__(message)
        self.metrics = metrics


@dataclass(frozen=True)
class Check:
    """``metric`` against ``limit``; the alarm sounds beyond it."""

    name: str
    metric: str
    limit: Callable[[HealthConfig, float | None], float | None]  # of the configuration and the KL target
    advice: str
    below: bool = False  # sounds below the limit, not above
    absolute: bool = False  # of the metric's absolute value

    def sounds(self, value: float, limit: float) -> bool:
        """Whether ``value`` is beyond; what is not a number always is."""
        value = abs(value) if self.absolute else value
        return not (value >= limit if self.below else value <= limit)


def _kl_high(config: HealthConfig, target: float | None) -> float | None:
    return config.kl_high if config.kl_high is None or target is None else 3.0 * target


CHECKS = (
    Check(
        "ratio",
        "actor/first_ratio_off",
        lambda config, target: 0.0,
        "before the first update the new policy is the old one, so every ratio is 1. It is not: the weights changed "
        "between scoring and learning, dropout is on, or the precision is low (raise health.ratio for bf16)",
    ),
    Check(
        "kl_negative",
        "kl",
        lambda config, target: config.kl_low,
        "the mean KL to the reference cannot be negative but for noise: samples are not from the scored policy "
        "(parity?), or top-p, top-k or a repetition penalty cut the distribution they were drawn from",
        below=True,
    ),
    Check(
        "kl_high",
        "kl",
        _kl_high,
        "the policy has left the reference and may exploit the reward model: raise kl_coef, take kl_controller "
        "adaptive, lower optim.lr, or do fewer epochs",
    ),
    Check(
        "policy_clip",
        "actor/clip_fraction",
        lambda config, target: config.clip_fraction,
        "most tokens are clipped, so they teach nothing: lower the actor's optim.lr or epochs, or set early_stop_kl",
    ),
    Check(
        "value_clip",
        "critic/clip_fraction",
        lambda config, target: config.value_clip_fraction,
        "the critic moves as fast as clip_value lets it: widen clip_value to the scale of the returns, or set it null",
    ),
    Check(
        "explained_variance",
        "explained_variance",
        lambda config, target: config.explained_variance,
        "the critic predicts returns worse than a constant: critic_warmup_steps, a higher critic.optim.lr, or look "
        "whether its checkpoint was loaded",
        below=True,
    ),
    Check(
        "entropy",
        "entropy",
        lambda config, target: config.entropy,
        "the policy has collapsed to one answer: entropy_coef, a higher kl_coef, a lower optim.lr",
        below=True,
    ),
    Check(
        "length_reward",
        "length_correlation",
        lambda config, target: config.length_correlation,
        "the score follows the answers' length: look at the reward model's longer-wins baseline, or set length_penalty",
        absolute=True,
    ),
    Check(
        "truncated",
        "truncated",
        lambda config, target: config.truncated,
        "answers do not end: raise sampling.max_new_tokens, set missing_eos_penalty, or look whether SFT learned eos",
    ),
    Check(
        "repetition",
        "repetition",
        lambda config, target: config.repetition,
        "answers repeat themselves: add the rule 'varied', raise kl_coef, or look at what the reward model likes",
    ),
)


class Health:
    """Looks at every iteration.  How long each alarm has held is part of the run's state."""

    def __init__(self, config: HealthConfig, kl_target: float | None, speaks: bool) -> None:
        self.config, self.kl_target, self.speaks = config, kl_target, speaks
        self.held: dict[str, int] = {}

    def __call__(self, step: int, metrics: Metrics) -> Metrics:
        """``alarm/<name>``: 1 for each that sounds, else nothing.  HealthError where ``action`` stop says so."""
        if self.config.action == "off":
            return {}
        alarms = {}
        for check in CHECKS:
            limit = check.limit(self.config, self.kl_target)
            if limit is None or check.metric not in metrics or not check.sounds(metrics[check.metric], limit):
                self.held.pop(check.name, None)
                continue
            self.held[check.name] = self.held.get(check.name, 0) + 1
            alarms[f"alarm/{check.name}"] = 1.0
            side = "below" if check.below else "above"
            text = f"step {step}: {check.metric} = {metrics[check.metric]:.4g} is {side} {limit:.4g}: {check.advice}"
            if self.config.action == "stop" and self.held[check.name] >= self.config.patience:
                raise HealthError(
                    f"alarm {check.name!r} for {self.held[check.name]} iterations. {text}", metrics | alarms
                )
            if self.speaks and self.held[check.name] == 1:
                logger.warning("alarm %s: %s", check.name, text)
        return alarms

    def state_dict(self) -> dict[str, Any]:
        return dict(self.held)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.held = dict(state)
