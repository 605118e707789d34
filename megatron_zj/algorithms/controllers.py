"""State that follows a run: the KL coefficient and the running moments of the scores.  Both are in the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_LARGEST_ERROR = 0.2  # of the relative distance to the target, an update (Ziegler et al. 2019)


@dataclass
class KLController:
    """The KL coefficient.  ``target`` None: fixed.

    Ziegler et al. 2019, section 2.2: e = clip(KL / target - 1, -0.2, 0.2); coef *= 1 + e n / horizon, with n the
    samples that KL (nats a sequence) was measured on.
    """

    coef: float
    target: float | None = None
    horizon: int = 10000

    def update(self, kl: float, num_samples: int) -> None:
        """After an iteration."""
        if self.target is not None:
            error = min(max(kl / self.target - 1.0, -_LARGEST_ERROR), _LARGEST_ERROR)
            self.coef *= 1.0 + error * num_samples / self.horizon

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # A fixed coefficient is the configuration's: changing it and resuming means what it says.
        if self.target is not None:
            self.coef = state["coef"]


@dataclass
class RunningMoments:
    """Mean and deviation of all values so far, merged batch by batch (Welford 1962; Chan et al. 1979, eq. 2.1)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances to the mean

    @property
    def deviation(self) -> float:
        """Population standard deviation; 1 before there are two values."""
        return (self.squares / self.count) ** 0.5 if self.count > 1 else 1.0

    def add(self, count: float, mean: float, deviation: float) -> None:
        """Merge a batch of which these are known, the same on every rank."""
        if count <= 0:
            return
        total, distance = self.count + count, mean - self.mean
        self.squares += deviation**2 * count + distance**2 * self.count * count / total
        self.mean += distance * count / total
        self.count = total

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]
