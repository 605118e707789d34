"""What a run leaves to read: metrics, log lines, timings, traces, memory."""

import gzip
import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_zj.runtime import files, log
from megatron_zj.runtime.activity import Activity
from megatron_zj.runtime.distributed import Process
from megatron_zj.runtime.files import write_json
from megatron_zj.runtime.memory import peak_memory_mib
from megatron_zj.runtime.metrics import MetricsLog, read_metrics
from megatron_zj.runtime.profiler import StepProfiler
from megatron_zj.runtime.timers import Timers

_CPU = torch.device("cpu")


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    killed = MetricsLog(tmp_path)
    for step in range(1, 6):
        killed.write(step, {"loss": 10.0 - step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # the kill
    resumed = MetricsLog(tmp_path)
    resumed.write(4, {"loss": 0.5})
    resumed.write(5, {"loss": 0.25})
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 9.0), (2, 8.0), (3, 7.0), (4, 0.5), (5, 0.25)]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "状态.json", []
    write_json(path, {"state": "running", "说": [1, 2]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"state": "running", "说": [1, 2]}
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: seen.append(path.read_text(encoding="utf-8")))
    write_json(path, {"state": "done"})
    assert ["running" in text for text in seen] == [True, False]  # the new bytes, then the new name
    monkeypatch.setattr(files.os, "replace", lambda *names: 1 / 0)  # killed before the renaming
    with pytest.raises(ZeroDivisionError):
        write_json(path, {"state": "failed"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"state": "done"}


def test_a_run_that_only_opens_the_log_drops_nothing(tmp_path: Path) -> None:
    MetricsLog(tmp_path).write(1, {"loss": 1.0})
    MetricsLog(tmp_path).close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_metrics_stay_json_when_numbers_are_not_finite(tmp_path: Path) -> None:
    MetricsLog(tmp_path).write(1, {"loss": math.nan, "actor/kl": -math.inf, "lr": 1e-4})
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert (line["loss"], line["actor/kl"], line["lr"]) == (None, None, 1e-4)


def test_only_rank_0_writes(tmp_path: Path) -> None:
    MetricsLog(tmp_path, rank=1).write(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_metrics_file_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2 is no metrics line: 'rubbish'"):
        MetricsLog(tmp_path).write(4, {})


def test_tensorboard_gets_the_steps_where_asked(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first_step in (1, 2):
        metrics = MetricsLog(tmp_path, tensorboard=True)
        for step in range(first_step, 4):
            metrics.write(step, {"loss": float(10 * first_step + step)})
        metrics.close()
    reader = events.EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    assert [(event.step, event.value) for event in reader.Scalars("loss")] == [(1, 11.0), (2, 22.0), (3, 23.0)]


def test_a_resumed_run_alone_goes_on_in_its_weights_and_biases_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    histories: dict[str, list[int]] = {}

    def init(*, id: str, **settings: object) -> SimpleNamespace:
        assert settings["project"] == "clinic"
        history = histories.setdefault(id, [])
        return SimpleNamespace(log=lambda values, step: history.append(step), finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))

    def train(folder: str, *steps: int) -> None:
        metrics = MetricsLog(tmp_path / folder, wandb_project="clinic")
        for step in steps:
            metrics.write(step, {"loss": 1.0})
        metrics.close()

    train("zhongjing/sft", 1, 2, 3)
    train("zhongjing/sft", 3, 4)  # resumed
    train("chimed_gpt/sft", 1, 2)  # another run whose folder has the same name
    train("zhongjing/sft", 1, 2)  # a fresh run in the old folder
    MetricsLog(tmp_path / "zhongjing/sft", wandb_project="clinic", rank=1).write(3, {})
    assert list(histories.values()) == [[1, 2, 3, 3, 4], [1, 2], [1, 2]]


@pytest.mark.parametrize(
    ("asked", "module", "field"),
    [
        ({"tensorboard": True}, "torch.utils.tensorboard", "run.tensorboard"),
        ({"wandb_project": "x"}, "wandb", "run.wandb"),
    ],
)
def test_an_absent_writer_is_named_with_its_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, object], module: str, field: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{field}.* needs .*pip install"):
        MetricsLog(tmp_path, **asked)  # type: ignore[arg-type]


@pytest.fixture
def _clean_logger() -> Iterator[None]:
    yield
    logger = logging.getLogger(log.NAME)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True


@pytest.mark.usefixtures("_clean_logger")
def test_rank_0_logs_steps_others_only_warnings_with_their_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in (0, 1):
        logger = log.setup(Process(rank, rank, 2, _CPU), tmp_path)
        logger.info("开始训练 %d", rank)
        logger.warning("小心 %d", rank)
    shown = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 1)[1] for line in shown] == ["rank 0 开始训练 0", "rank 0 小心 0", "rank 1 小心 1"]
    assert "开始训练 0" in (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert "小心 1" not in (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_a_step_is_one_readable_line() -> None:
    metrics = {"loss": 2.513049, "lr": 0.0001, "tokens_per_second": 12345.6, "weight": 2048.0, "kl": math.nan, "d": 0.0}
    assert log.step_line(7, 400, metrics) == (
        "step   7/400  loss 2.513  lr 1.00e-04  tokens_per_second 12,346  weight 2,048  kl nan  d 0"
    )


def test_timers_add_up_by_name_and_tell_the_phase() -> None:
    activity = Activity()
    timers = Timers(_CPU, activity)
    with timers("step"):
        for _ in range(2):
            with timers("generate"):
                assert str(activity) == "step > generate"
                time.sleep(0.02)
    seconds = timers.pop()
    assert list(seconds) == ["time/generate", "time/step"]
    assert 0.04 <= seconds["time/generate"] <= seconds["time/step"] < 5
    assert timers.pop() == {}
    assert str(activity) == "no phase"


def test_after_an_error_the_phase_is_still_there_to_be_reported() -> None:
    activity = Activity()
    with pytest.raises(RuntimeError), activity.doing("step 3"), activity.doing("update"):
        raise RuntimeError
    assert str(activity) == "step 3 > update"


def test_only_the_chosen_steps_are_profiled(tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path, steps=[2], rank=3)
    for step in (1, 2, 3):
        with profiler.step(step):
            torch.ones(4, 4) @ torch.ones(4, 4)
    (trace,) = tmp_path.iterdir()
    assert trace.name == "step_00000002_rank_00003.json.gz"
    assert "aten::matmul" in gzip.decompress(trace.read_bytes()).decode()


def test_peak_memory_counts_what_was_touched_and_has_been_freed() -> None:
    before = peak_memory_mib(_CPU)
    torch.ones(200 * 2**18).sum()  # 200 MiB, gone again
    assert peak_memory_mib(_CPU) >= min(before, 10_000)
    held = torch.ones(int((before + 100) * 2**18))
    assert peak_memory_mib(_CPU) >= held.numel() * 4 / 2**20


_FAULTS = """
import ctypes, resource
from megatron_zj.runtime.distributed import session

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.memset.argtypes, libc.free.argtypes = (
    ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), (ctypes.c_void_p,)
)
size = 24 * 2**20

def step():
    blocks = [libc.malloc(size) for _ in range(4)]
    for block in blocks:
        libc.memset(block, 1, size)
    for block in reversed(blocks):
        libc.free(block)

def faults():
    for _ in range(5):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

start = faults()
with session("cpu", 60):
    print(start, faults())
"""


@pytest.mark.skipif(os.confstr("CS_GNU_LIBC_VERSION") is None, reason="glibc's allocator")
@pytest.mark.parametrize("words", [{}, {"MALLOC_ARENA_MAX": "2"}])
def test_a_session_on_a_cpu_does_not_fetch_the_memory_of_its_tensors_anew(words: dict[str, str]) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC", "GLIBC", "LD_"))}
    done = subprocess.run(
        [sys.executable, "-c", _FAULTS], env=environment | words, capture_output=True, text=True, check=True
    )
    outside, inside = map(int, done.stdout.split())
    assert outside > 100  # 4 KiB or 2 MiB each
    assert (inside < outside / 10) == (not words)  # what the user says of the allocator stands
