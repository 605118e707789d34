"""Pre-training, SFT and reward modelling: one role, one objective, one stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from megatron_zj.algorithms.provenance import head_checksum
from megatron_zj.algorithms.resumable import Resumable
from megatron_zj.data.stream import Stream
from megatron_zj.engine.objective import Metrics, Objective
from megatron_zj.roles.role import Role
from megatron_zj.roles.world import World, WorldBatch
from megatron_zj.runtime.timers import Timers


class SupervisedObjective(Objective, Protocol):
    """An engine's objective that also turns its averaged sums into what a person wants to read."""

    def summarise(self, metrics: Metrics) -> Metrics:
        """Metrics by the global weight, made readable."""


class Supervised(Resumable):
    """One optimizer step a step, on the next ``batch_size`` units (rows, or ranked groups) of the stream."""

    def __init__(
        self,
        role: Role,
        objective: SupervisedObjective,
        stream: Stream,
        batch_size: int,
        world: World,
        timers: Timers,
        validation: Stream | None = None,
        proves_head: bool = False,
    ) -> None:
        """``proves_head``: a checksum of the model's scalar head is part of the state."""
        self.role = role
        self.objective = objective
        self.stream = stream
        self.batch_size = batch_size
        self.world = world
        self.timers = timers
        self.validation = validation
        self.proves_head = proves_head
        super().__init__(stream=stream)
        self.validation_metrics: Metrics = {}
        self.validation_step: int | None = None  # whose weights they are of

    @property
    def roles(self) -> dict[str, Role]:
        """Every model of the algorithm, by name."""
        return {"model": self.role}

    def step(self) -> Metrics:
        """Draw, learn, report."""
        with self.timers("data"):
            batch = WorldBatch.gather(self.stream.next(self.batch_size, self.world.rank, self.world.size))
        with self.timers("update"):
            metrics = self.role.update(self.objective, batch).wait()
        self.num_steps_done += 1
        return self.objective.summarise(metrics) | row_sizes(batch.row_lengths)

    def evaluate(self) -> Metrics:
        """The objective over one epoch of the validation stream, in its own fixed order; {} without one."""
        if self.validation is None:
            return {}
        start, left = self.validation.state_dict(), self.validation.num_units
        sums: Metrics = {}
        while left > 0:
            size = min(left, self.batch_size)
            batch = WorldBatch.gather(self.validation.next(size, self.world.rank, self.world.size))
            metrics = self.role.evaluate(self.objective, batch).wait()
            weight = metrics.pop("weight")
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + value * weight
            sums["weight"] = sums.get("weight", 0.0) + weight
            left -= size
        self.validation.load_state_dict(start)
        total = max(sums.pop("weight"), 1.0)
        self.validation_metrics = self.objective.summarise({name: value / total for name, value in sums.items()})
        self.validation_step = self.num_steps_done
        return self.validation_metrics

    def state_dict(self) -> dict[str, Any]:
        """What the last validation said (PPO reads the scores' scale there), of which step; and the head's checksum."""
        head = {"head": head_checksum(self.role)} if self.proves_head else {}
        validation = {"validation": self.validation_metrics, "validation_step": self.validation_step}
        return super().state_dict() | validation | head

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo ``state_dict``."""
        super().load_state_dict(state)
        self.validation_metrics = state["validation"]
        self.validation_step = state.get("validation_step")  # an old checkpoint does not say


def row_sizes(lengths: Sequence[int]) -> Metrics:
    """Tokens of a step, and the length of the sequence that a token stands in, on average over tokens."""
    tokens = sum(lengths)
    return {"tokens": float(tokens), "sequence_length": sum(length**2 for length in lengths) / max(tokens, 1)}
