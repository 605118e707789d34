"""What the training loop drives."""

from __future__ import annotations

from typing import Any, Protocol

from megatron_zj.engine.objective import Metrics


class Algorithm(Protocol):
    """What every algorithm is.  ``step`` draws its own data and ends with updated weights.

    One that can be validated has ``evaluate() -> Metrics`` too.
    """

    num_steps_done: int

    def step(self) -> Metrics:
        """One step; what it measured."""

    def state_dict(self) -> dict[str, Any]:
        """All state but the models', as JSON types and tensors; the same on every rank."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo ``state_dict``."""
