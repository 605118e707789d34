"""What happens between steps: validation, speed, lines and files, checkpoints."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from tqdm import tqdm

from megatron_zj.algorithms.algorithm import Algorithm
from megatron_zj.checkpoint.save import Checkpointer, Saveable
from megatron_zj.config.checkpoint import CheckpointConfig
from megatron_zj.engine.objective import Metrics
from megatron_zj.engine.totals import NonFiniteError
from megatron_zj.roles.world import gather_in_order, world_max
from megatron_zj.runtime.log import step_line
from megatron_zj.runtime.memory import peak_memory_mib
from megatron_zj.runtime.metrics import MetricsLog
from megatron_zj.runtime.timers import Timers

logger = logging.getLogger(__name__)
_GRACE_SECONDS = 60.0  # for a background save, once the run has failed


# What the line of a step shows, where the algorithm has it; metrics.jsonl keeps everything.
_HEADLINE = (
    *("loss", "perplexity", "pair_accuracy", "score", "kl", "response_length", "truncated"),
    *("actor/loss", "actor/approx_kl", "actor/clip_fraction", "critic/loss", "explained_variance"),
    *("validation/loss", "validation/pair_accuracy", "grad_norm", "lr", "time/step", "tokens_per_second", "mfu"),
)


@runtime_checkable
class Evaluates(Protocol):
    """An algorithm with validation data of its own."""

    def evaluate(self) -> Metrics:
        """Metrics on held-out data; {} where there is none."""


class Validate:
    """Every ``every`` steps (0: never) and after the last one, adds ``validation/...`` to the step's metrics.

    ``saves_every``: also every so many steps (0: never), for checkpoints that are to hold what validation says of them.
    Runs before Save: weights whose validation loss is NaN or Inf end the run with NonFiniteError and are not saved.
    """

    def __init__(self, algorithm: Evaluates, every: int, num_steps: int, timers: Timers, saves_every: int = 0) -> None:
        self._algorithm, self._num_steps, self._timers = algorithm, num_steps, timers
        self._intervals = [interval for interval in (every, saves_every) if interval]

    def on_step(self, step: int, metrics: Metrics) -> None:
        """Validate when it is time."""
        if step == self._num_steps or any(step % interval == 0 for interval in self._intervals):
            with self._timers("validation"):
                found = self._algorithm.evaluate()
            if not math.isfinite(found.get("loss", 0.0)):
                raise NonFiniteError(
                    f"step {step}: the validation loss is {found['loss']}: the weights after this step are broken and "
                    "are not saved. Resume from the last checkpoint with a lower optim.lr"
                )
            metrics.update({f"validation/{name}": value for name, value in found.items()})
            metrics.update(self._timers.pop())

    def on_end(self, completed: bool) -> None:
        """Nothing."""


class Measure:
    """Adds speed and memory: tokens/s, peak MiB, and the model FLOPs utilisation where it can be told.

    ``flops_per_token``: a trained token's arithmetic by ``sequence_length``, as the step reports it.  ``peak_flops``: a
    second, of all devices together.  None for either: several models, or an unknown device, and no utilisation.
    """

    def __init__(
        self, device: torch.device, flops_per_token: Callable[[float], float] | None, peak_flops: float | None
    ) -> None:
        self._device, self._flops_per_token, self._peak_flops = device, flops_per_token, peak_flops

    def on_step(self, step: int, metrics: Metrics) -> None:
        """``tokens`` is what the whole world processed in the step."""
        if "tokens" in metrics:
            metrics["tokens_per_second"] = metrics["tokens"] / max(metrics["time/step"], 1e-9)
            if self._peak_flops and self._flops_per_token and "sequence_length" in metrics:
                flops = self._flops_per_token(metrics["sequence_length"])
                metrics["mfu"] = metrics["tokens_per_second"] * flops / self._peak_flops
        metrics["memory/peak_mib"] = world_max(peak_memory_mib(self._device))

    def on_stop(self, step: int, metrics: Metrics) -> None:
        """As after any step, and every rank's peak."""
        self.on_step(step, metrics)
        self._log_peaks()

    def on_end(self, completed: bool) -> None:
        """Every rank's peak, to the log; after an error not, because ranks may be gone."""
        if completed:
            self._log_peaks()

    def _log_peaks(self) -> None:
        """Collective over the world."""
        peaks = gather_in_order([round(peak_memory_mib(self._device))])
        logger.info("peak memory by rank, MiB: %s", " ".join(str(peak) for peak in peaks))


class Report:
    """One readable line a step, the progress bar, metrics.jsonl and what else MetricsLog writes to."""

    def __init__(self, log: MetricsLog, bar: tqdm[None], num_steps: int, every: int) -> None:
        self._log, self._bar, self._num_steps, self._every = log, bar, num_steps, every

    def on_step(self, step: int, metrics: Metrics) -> None:
        """Write the step."""
        self._log.write(step, metrics)
        self._bar.update(1)
        if step % max(self._every, 1) == 0 or step == self._num_steps:
            shown = {name: metrics[name] for name in _HEADLINE if name in metrics}
            if metrics.get("skipped"):
                shown["skipped"] = metrics["skipped"]  # an fp16 overflow
            logger.info(step_line(step, self._num_steps, shown))

    def on_stop(self, step: int, metrics: Metrics) -> None:
        """The row that tells why the run ended."""
        self.on_step(step, metrics)

    def on_end(self, completed: bool) -> None:
        """Close the files."""
        self._bar.close()
        self._log.close()


class Save:
    """Checkpoints every ``config.every`` steps and after the last one; a failed run keeps the last good one."""

    def __init__(
        self,
        checkpointer: Checkpointer,
        config: CheckpointConfig,
        engines: Mapping[str, Saveable | None],
        algorithm: Algorithm,
        num_steps: int,
        timers: Timers,
    ) -> None:
        self._checkpointer, self._config, self._engines = checkpointer, config, engines
        self._algorithm, self._num_steps, self._timers = algorithm, num_steps, timers

    def on_step(self, step: int, metrics: Metrics) -> None:
        """Save when it is time."""
        if step == self._num_steps or (self._config.every and step % self._config.every == 0):
            with self._timers("save"):
                self._checkpointer.save(step, self._engines, self._state())
            self._timers.pop()

    def on_end(self, completed: bool) -> None:
        """Let a background save finish."""
        if completed:
            self._checkpointer.wait()
        else:
            self._checkpointer.wait_alone(_GRACE_SECONDS)

    def _state(self) -> dict[str, Any]:
        return self._algorithm.state_dict()
