"""The only training loop of the project."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from megatron_zj.algorithms.algorithm import Algorithm
from megatron_zj.algorithms.health import HealthError
from megatron_zj.engine.objective import Metrics
from megatron_zj.engine.totals import NonFiniteError
from megatron_zj.runtime.profiler import StepProfiler
from megatron_zj.runtime.timers import Timers

_MAX_RECORDS = 12  # that a message names


class Callback(Protocol):
    """Something done between steps, in the order given to ``run``.  Both methods are called on every rank."""

    def on_step(self, step: int, metrics: Metrics) -> None:
        """After each step; may add to ``metrics`` what later callbacks then see."""

    def on_end(self, completed: bool) -> None:
        """After the last step, or (``completed`` False) when an error ends the run."""


@runtime_checkable
class StopCallback(Protocol):
    """A callback that also looks at a step which was made, and then ended the run on every rank alike."""

    def on_stop(self, step: int, metrics: Metrics) -> None:
        """Instead of ``on_step``; no checkpoint follows.  May be collective."""


def run(
    algorithm: Algorithm,
    num_steps: int,
    callbacks: Sequence[Callback],
    timers: Timers,
    describe: Callable[[int], str] | None = None,
    profiler: StepProfiler | None = None,
) -> None:
    """Step until ``num_steps`` are done, the ones before a resume included.

    ``describe``: the file and record of a draw, for the NonFiniteError that a NaN or Inf loss ends the run with.
    ``profiler``: records the steps it was made for.
    """
    completed = False
    try:
        while algorithm.num_steps_done < num_steps:
            start = time.perf_counter()
            step = algorithm.num_steps_done + 1
            with timers(f"step {step}"), profiler.step(step) if profiler else contextlib.nullcontext():
                metrics, stop = _step(algorithm, describe)
            phases = {name: value for name, value in timers.pop().items() if not name.startswith("time/step ")}
            metrics = metrics | phases | {"time/step": time.perf_counter() - start}
            for callback in callbacks:
                with _after(timers, f"after step {step}", callback):
                    if stop is None:
                        callback.on_step(algorithm.num_steps_done, metrics)
                    elif isinstance(callback, StopCallback):
                        callback.on_stop(algorithm.num_steps_done, metrics)
            if stop is not None:
                raise stop
        completed = True
    finally:
        for callback in callbacks:
            with _after(timers, "end of the run", callback):
                callback.on_end(completed)


@contextlib.contextmanager
def _after(timers: Timers, when: str, callback: Callback) -> Iterator[None]:
    """What a callback does, a collective or a slow disk, is a phase that other ranks can name."""
    with timers.activity.doing(when), timers.activity.doing(type(callback).__name__):
        yield


def _step(algorithm: Algorithm, describe: Callable[[int], str] | None) -> tuple[Metrics, HealthError | None]:
    """One step, and what ends the run after it; a NaN or Inf loss says at which step, on which records."""
    try:
        return algorithm.step(), None
    except HealthError as stop:
        return stop.metrics, stop
    except NonFiniteError as error:
        lines = [f"step {algorithm.num_steps_done + 1}: {error}"]
        if describe is not None and error.draws:
            lines += ["the data of that loss:", *(f"  {describe(draw)}" for draw in error.draws[:_MAX_RECORDS])]
            if len(error.draws) > _MAX_RECORDS:
                lines.append(f"  and {len(error.draws) - _MAX_RECORDS} more")
        raise NonFiniteError("\n".join(lines), error.draws) from error
