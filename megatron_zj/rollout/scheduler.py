"""Which rows are being decoded: a queue of prompts, a fixed number of slots, and rows that finish at their own time.

Active rows always fill slots 0 .. n-1, so a decoding step is one dense batch: when a row ends, the next prompt takes
its slot, or else the last active row moves into it.  Pure bookkeeping, the same on every rank of a shard.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from torch import Tensor

from megatron_zj.rollout.stop_text import StopText


@dataclass
class Sample:
    """One row on its way: its place in the batch, its prompt, its noise, what was drawn so far."""

    row: int
    prompt: Tensor  # [P] int64
    noise: Tensor  # [max_new_tokens] float64
    limit: int  # tokens it may draw
    stop_text: StopText | None = None  # None: no string ends it
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False  # ended by a stop token or string

    @property
    def done(self) -> bool:
        """Whether nothing more will be drawn."""
        return self.stopped or len(self.tokens) >= self.limit

    def record(self, token: int, logprob: float, stop_ids: frozenset[int]) -> None:
        """Keep what was drawn."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.stopped = token in stop_ids or (self.stop_text is not None and self.stop_text.ends(token))


class Scheduler:
    """Admits samples to slots and retires them."""

    def __init__(self, samples: list[Sample], num_slots: int) -> None:
        self._queue = deque(samples)
        self._num_slots = num_slots
        self.active: list[Sample] = []  # by slot
        self.finished: list[Sample] = []

    def admit(self) -> list[Sample]:
        """Fill free slots from the queue; returns who came, in slots ``len(active) - n`` and up."""
        free = self._num_slots - len(self.active)
        coming = [self._queue.popleft() for _ in range(min(free, len(self._queue)))]
        self.active.extend(coming)
        return coming

    def retire(self) -> list[tuple[int, int]]:
        """Take out finished samples.  Returns cache moves (from slot, to slot), to be done in this order."""
        moves = []
        slot = 0
        while slot < len(self.active):
            if not self.active[slot].done:
                slot += 1
                continue
            self.finished.append(self.active[slot])
            last = self.active.pop()
            if slot < len(self.active):
                self.active[slot] = last
                moves.append((len(self.active), slot))
        return moves
