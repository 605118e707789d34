"""The learning rate as a pure function of the number of optimizer steps taken."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_zj.config.optim import OptimConfig


@dataclass(frozen=True)
class LearningRate:
    """A linear warm-up to ``lr``, then ``constant``, ``linear`` or ``cosine`` down to ``min_lr``.

    The first step already learns: step 0 of a warm-up of w steps has lr / w, step w - 1 has lr.  The decay starts at
    step w and reaches ``min_lr`` at ``decay_steps``; after that it stays there.
    """

    lr: float
    min_lr: float
    warmup_steps: int
    decay_steps: int
    kind: str

    @classmethod
    def from_config(cls, optim: OptimConfig, num_steps: int) -> LearningRate:
        """``num_steps``: the run's optimizer steps, where the config leaves ``decay_steps`` open."""
        decay_steps = optim.decay_steps or num_steps
        if decay_steps <= optim.warmup_steps and optim.schedule != "constant":
            raise ValueError(
                f"optim.warmup_steps={optim.warmup_steps} leaves no step for the {optim.schedule} decay, "
                f"which ends at step {decay_steps}; lower optim.warmup_steps or set optim.decay_steps"
            )
        return cls(optim.lr, optim.min_lr, optim.warmup_steps, decay_steps, optim.schedule)

    def at(self, step: int) -> float:
        """The learning rate of the optimizer step ``step``, counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.lr
        progress = min(1.0, (step - self.warmup_steps) / (self.decay_steps - self.warmup_steps))
        share = 1.0 - progress if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.min_lr + (self.lr - self.min_lr) * share
