"""The loop and what happens between steps, on stand-ins: when, in which order, and what an error leaves behind."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_zj.algorithms.health import HealthError
from megatron_zj.config.checkpoint import CheckpointConfig
from megatron_zj.engine.objective import Metrics
from megatron_zj.engine.totals import NonFiniteError
from megatron_zj.runtime.activity import Activity
from megatron_zj.runtime.distributed import Process
from megatron_zj.runtime.log import progress_bar
from megatron_zj.runtime.metrics import MetricsLog
from megatron_zj.runtime.timers import Timers
from megatron_zj.train import callbacks
from megatron_zj.train.callbacks import Measure, Report, Save, Validate
from megatron_zj.train.loop import run
from tests.helpers.ranks import run_ranks

CPU = torch.device("cpu")


class Counting:
    """An algorithm whose loss at step n is ``losses[n]``, else n."""

    def __init__(self, done: int = 0, validation: dict[int, float] | None = None) -> None:
        self.num_steps_done = done
        self.evaluated: list[int] = []
        self.validation = validation or {}

    def step(self) -> Metrics:
        self.num_steps_done += 1
        return {"loss": float(self.num_steps_done), "tokens": 100.0}

    def evaluate(self) -> Metrics:
        self.evaluated.append(self.num_steps_done)
        return {"loss": self.validation.get(self.num_steps_done, 0.5)}

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps_done": self.num_steps_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_steps_done = state["num_steps_done"]


class Broken(Counting):
    """Its second step meets a NaN in draws 3 and 40 to 59."""

    def step(self) -> Metrics:
        if self.num_steps_done == 1:
            raise NonFiniteError("the loss is nan", [3, *range(40, 60)])
        return super().step()


class Unhealthy(Counting):
    """Its second iteration is measured and then ends the run, on every rank alike."""

    def step(self) -> Metrics:
        metrics = super().step()
        if self.num_steps_done == 2:
            raise HealthError("alarm 'kl_high'", {**metrics, "kl": 9.0})
        return metrics


class Notes:
    """Stands for a Checkpointer, and for a callback: writes down what it is asked."""

    def __init__(self) -> None:
        self.saved: list[tuple[int, dict[str, Any]]] = []
        self.waited: list[float | None] = []  # seconds at most; None: as long as it takes
        self.steps: list[Metrics] = []
        self.ended: list[bool] = []

    def save(self, step: int, engines: Any, state: dict[str, Any]) -> None:
        self.saved.append((step, state))

    def wait(self) -> None:
        self.waited.append(None)

    def wait_alone(self, seconds: float) -> None:
        self.waited.append(seconds)

    def on_step(self, step: int, metrics: Metrics) -> None:
        self.steps.append(dict(metrics))

    def on_end(self, completed: bool) -> None:
        self.ended.append(completed)


def timers() -> Timers:
    return Timers(CPU, Activity())


def saves(every: int, num_steps: int, algorithm: Counting) -> tuple[Save, Notes]:
    notes = Notes()
    return Save(notes, CheckpointConfig(every=every), {}, algorithm, num_steps, timers()), notes  # type: ignore[arg-type]


def test_the_loop_does_what_is_left_after_a_resume_and_times_each_step() -> None:
    algorithm, notes = Counting(done=3), Notes()
    run(algorithm, 5, [notes], timers())
    assert [metrics["loss"] for metrics in notes.steps] == [4.0, 5.0]
    assert all(metrics["time/step"] > 0 for metrics in notes.steps)
    assert not any(name.startswith("time/step ") for metrics in notes.steps for name in metrics)
    assert notes.ended == [True]
    run(algorithm, 5, [notes], timers())  # nothing left
    assert len(notes.steps) == 2


def test_a_broken_loss_names_the_step_and_the_records_and_ends_every_callback() -> None:
    notes = Notes()
    with pytest.raises(NonFiniteError) as caught:
        run(Broken(), 5, [notes], timers(), lambda draw: f"a.jsonl, record at line {draw}")
    lines = str(caught.value).splitlines()
    assert lines[:3] == ["step 2: the loss is nan", "the data of that loss:", "  a.jsonl, record at line 3"]
    assert lines[-1] == "  and 9 more"
    assert len(lines) == 15
    assert notes.ended == [False]
    with pytest.raises(NonFiniteError, match=r"^step 2: the loss is nan$"):
        run(Broken(), 5, [], timers())


def _stopped(folder: Path) -> tuple[list[int], list[str], list[bool]]:
    said: list[str] = []
    callbacks.logger.info = lambda text, *values: said.append(text % values)  # type: ignore[method-assign]
    callbacks.peak_memory_mib = lambda device: 100.0 + 50 * dist.get_rank()
    algorithm = Unhealthy()
    save, notes = saves(1, 5, algorithm)
    report = Report(MetricsLog(folder, rank=dist.get_rank()), progress_bar(Process(1, 1, 2, CPU), 5), 5, 1)
    with pytest.raises(HealthError, match="kl_high"):
        run(
            algorithm, 5, [Validate(algorithm, 0, 5, timers()), Measure(CPU, None, None), report, save, notes], timers()
        )
    return [step for step, _ in notes.saved], said, notes.ended


def test_a_run_that_its_health_stops_leaves_the_row_that_tells_why_and_every_ranks_memory(tmp_path: Path) -> None:
    for saved, said, ended in run_ranks(2, _stopped, tmp_path):
        assert (saved, ended) == ([1], [False])  # a checkpoint of unhealthy weights would be the newest
        assert any(line == "peak memory by rank, MiB: 100 150" for line in said)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line.get("kl")) for line in lines] == [(1, None), (2, 9.0)]
    assert lines[1]["time/step"] > 0
    assert lines[1]["memory/peak_mib"] == 150.0


@pytest.mark.parametrize(("every", "expected"), [(2, [2, 4, 5]), (0, [5]), (1, [1, 2, 3, 4, 5])])
def test_validation_and_saving_happen_every_so_often_and_at_the_end(every: int, expected: list[int]) -> None:
    algorithm = Counting()
    save, notes = saves(every, 5, algorithm)
    run(algorithm, 5, [Validate(algorithm, every, 5, timers()), notes, save], timers())
    assert algorithm.evaluated == expected
    assert notes.saved == [(step, {"num_steps_done": step}) for step in expected]
    assert notes.waited == [None]
    seen = [index + 1 for index, metrics in enumerate(notes.steps) if "validation/loss" in metrics]
    assert seen == expected
    assert all(("time/validation" in metrics) == ("validation/loss" in metrics) for metrics in notes.steps)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_weights_that_fail_validation_are_not_saved(loss: float) -> None:
    algorithm = Counting(validation={2: loss})
    save, notes = saves(1, 5, algorithm)
    with pytest.raises(NonFiniteError, match=f"step 2: the validation loss is {loss}"):
        run(algorithm, 5, [Validate(algorithm, 1, 5, timers()), save], timers())
    assert [step for step, _ in notes.saved] == [1]
    assert notes.waited == [60.0]  # no collective: the other ranks may be gone


def test_speed_is_of_the_whole_step_and_utilisation_only_where_the_peak_is_known() -> None:
    metrics = {"tokens": 300.0, "time/step": 2.0, "sequence_length": 8.0}
    Measure(CPU, flops_per_token=lambda length: length / 2, peak_flops=1200.0).on_step(1, metrics)
    assert metrics["tokens_per_second"] == 150.0
    assert metrics["mfu"] == 0.5
    assert metrics["memory/peak_mib"] > 1
    for flops, peak, length in ((float, None, 8.0), (None, 1200.0, 8.0), (float, 1200.0, None)):
        unknown: Metrics = {"tokens": 300.0, "time/step": 2.0}
        if length:
            unknown["sequence_length"] = length
        Measure(CPU, flops, peak).on_step(1, unknown)
        assert "mfu" not in unknown
    without: Metrics = {"time/step": 2.0}
    Measure(CPU, float, None).on_step(1, without)
    assert "tokens_per_second" not in without


def _peaks() -> tuple[float, str]:
    lines = []
    callbacks.logger.info = lambda text, *values: lines.append(text % values)  # type: ignore[method-assign]
    callbacks.peak_memory_mib = lambda device: 100.0 + 50 * dist.get_rank()
    measure, metrics = Measure(CPU, None, None), {"time/step": 1.0}
    measure.on_step(1, metrics)
    measure.on_end(completed=True)
    measure.on_end(completed=False)  # an error: the others may be gone
    return metrics["memory/peak_mib"], "".join(lines)


def test_memory_is_reported_of_every_rank_and_the_highest_in_the_metrics() -> None:
    for highest, said in run_ranks(2, _peaks):
        assert highest == 150.0
        assert said == "peak memory by rank, MiB: 100 150"


def test_the_report_writes_every_step_and_shows_some_without_what_says_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process = Process(0, 0, 1, CPU)
    report = Report(MetricsLog(tmp_path), progress_bar(process, 5), 5, every=2)
    with caplog.at_level(logging.INFO, logger="megatron_zj"):
        for step in range(1, 6):
            report.on_step(step, {"loss": step / 8, "skipped": 0.0, "actor/loss_scale": 1.0, "weight": 7.0})
        report.on_step(6, {"loss": 1.0, "skipped": 1.0})
    report.on_end(completed=True)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [0.125, 0.25, 0.375, 0.5, 0.625, 1.0]
    assert lines[0]["weight"] == 7.0
    shown = [record.getMessage() for record in caplog.records]
    assert [line.split()[1] for line in shown] == ["2/5", "4/5", "5/5", "6/5"]
    assert "skipped" not in shown[0]
    assert "weight" not in shown[0]
    assert "skipped 1" in shown[-1]  # an overflow is worth a word
