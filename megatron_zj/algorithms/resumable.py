"""What an algorithm's checkpoint holds besides its models: the steps done, and its parts' state by name."""

from __future__ import annotations

from typing import Any, Protocol


class Stateful(Protocol):
    """A stream, a controller: anything whose state goes on where it stopped."""

    def state_dict(self) -> dict[str, Any]:
        """JSON types and tensors, the same on every rank."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo ``state_dict``."""


class Resumable:
    """An algorithm made of named parts.

    Samples, minibatches and dropout are keyed by the seed and the step, so no state of a random generator is left.
    """

    def __init__(self, **parts: Stateful) -> None:
        self.num_steps_done = 0
        self._parts = parts

    def state_dict(self) -> dict[str, Any]:
        """Everything but the models."""
        return {
            "num_steps_done": self.num_steps_done,
            **{name: part.state_dict() for name, part in self._parts.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo ``state_dict``."""
        self.num_steps_done = state["num_steps_done"]
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
