"""The runner of the lanes and the benchmark's own honesty."""

from __future__ import annotations

import json
import xml.etree.ElementTree as xml
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import bench, check, shapes
from kernels.check import Outcome

CPU = torch.device("cpu")


def test_a_lane_that_ran_nothing_is_red_unless_it_says_why() -> None:
    assert Outcome("compile", 0, 0, 5, 1.0).red
    assert not Outcome("gpu", 0, 0, 0, 0.0, "skipped: no CUDA device here").red
    assert Outcome("mutation", 40, 1, 0, 1.0).red
    assert not Outcome("mutation", 40, 0, 2, 1.0).red


def test_table_has_one_line_a_lane() -> None:
    text = check.table([Outcome("reference", 51, 0, 1, 12.3), Outcome("gpu", 0, 0, 0, 0.0, "skipped: no CUDA")])
    assert [row.split()[0] for row in text.splitlines()] == ["lane", "reference", "gpu"]
    assert "skipped: no CUDA" in text


def test_gpu_lane_without_a_gpu_is_skipped_with_a_reason() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (outcome,) = check.gpu()
    assert "no CUDA" in outcome.note
    assert not outcome.red


def test_another_triton_is_imported_before_the_installed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / ".triton" / "9.9.9" / "triton"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "9.9.9"', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert check.other_triton("9.9.9") == [f"PYTHONPATH={package.parent}"]


def test_a_triton_that_cannot_be_had_is_a_red_lane_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    outcome = check.run_lane("interpreter", long=False, version="0.0.1")
    assert outcome.red
    assert "could not install triton==0.0.1" in outcome.note


def _gae_case() -> shapes.Case:
    return next(case for case in shapes.cases(CPU) if case.op == "gae")


def test_benchmark_refuses_to_time_an_op_whose_check_is_red(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = torch.ones(3)
    verify = {"ours": lambda: ([one * 1.5], [one])}
    wrong = replace(_gae_case(), verify=verify, forms={"ours": lambda: pytest.fail("timed")})
    monkeypatch.setattr(shapes, "cases", lambda device: [wrong])
    timings, _, red = bench.bench([], CPU, 1)
    assert timings == []
    assert red == ["gae"]
    assert "RED, not timed" in capsys.readouterr().out


@pytest.mark.parametrize("op", sorted({case.op for case in shapes.cases(CPU)} - {"gae", "decode_attention"}))
def test_benchmark_checks_gradients_before_it_times_them(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An op whose backward pass is wrong by a factor, and whose forward pass is right, is not timed."""
    name = {"rms_norm": "add_rms_norm", "value_head": "value_head_loss"}.get(op, op)
    right = getattr(shapes, name)

    def halved(*inputs: Any, **options: Any) -> Any:
        return right(*(_HalfGradient.apply(x) if _smooth(x) else x for x in inputs), **options)

    (case, *_) = [case for case in shapes.cases(CPU) if case.op == op]
    assert bench.check(case, "ours") is None
    monkeypatch.setattr(shapes, name, halved)
    assert "differs by 5.0e-01" in (bench.check(case, "ours") or "")


def _smooth(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.requires_grad


class _HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad / 2


def test_a_red_form_is_left_out_and_the_others_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    one = torch.ones(3)
    verify = {"ours": lambda: ([one], [one]), "ours tma": lambda: ([one * 2], [one])}
    forms = {"ours both": lambda: one, "ours tma both": lambda: pytest.fail("timed"), "naive both": lambda: one}
    case = replace(_gae_case(), verify=verify, forms=forms)
    monkeypatch.setattr(shapes, "cases", lambda device: [case])
    timings, _, red = bench.bench([], CPU, 1)
    assert [timing.form for timing in timings] == ["ours both", "naive both"]
    assert red == ["gae"]


def test_benchmark_checks_and_times_every_form_and_writes_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [
        shapes._norm(CPU, 8, 16),
        shapes._logprob(CPU, 8, 32, 16),
        shapes._attention(CPU, 1, 16, 2, 1, 8, packed=True),
    ]
    monkeypatch.setattr(shapes, "cases", lambda device: small)
    out = tmp_path / "bench.json"
    drawn = tmp_path / "bench.svg"
    assert bench.main(["--device", "cpu", "--repeats", "1", "--out", str(out), "--plot", str(drawn)]) == 0
    bars = xml.parse(drawn).getroot().findall("{http://www.w3.org/2000/svg}rect")
    assert len(bars) == len(json.loads(out.read_text(encoding="utf-8"))["timings"])
    record = json.loads(out.read_text(encoding="utf-8"))
    forms = {(row["op"], row["form"]) for row in record["timings"]}
    assert {("rms_norm", "ours both"), ("linear_logprob", "naive forward"), ("attention", "ours forward"),
            ("rms_norm", "ours backward"), ("attention", "naive backward")} <= forms  # fmt: skip
    assert all(row["milliseconds"] > 0 and row["percent"] is None for row in record["timings"])
    beside = {(row["op"], row["way"], row["rival"]): row for row in record["side by side"]}
    row = beside["linear_logprob", "forward", "naive"]
    assert row["times_faster"] == pytest.approx(row["milliseconds"][1] / row["milliseconds"][0])
    assert row["times_less_memory"] == pytest.approx(row["peak_mib"][1] / row["peak_mib"][0])
    assert "linear_logprob" in capsys.readouterr().out


def test_a_backward_pass_is_timed_over_a_graph_that_was_built_before() -> None:
    calls: list[str] = []

    def form(x: torch.Tensor) -> list[torch.Tensor]:
        calls.append("forward")
        return [_Noted.apply(x, calls)]

    case = shapes._case("gae", "", {"ours": form}, [torch.ones(3)], shapes._work(2e6, 5e6), "GB/s", {})
    timings = {timing.form: timing for timing in bench.time_case(replace(case, forms={}), bench.Stopwatch(CPU, 3), {})}
    assert calls == ["forward", *["backward"] * 6]  # two warm runs, three timed ones, one for its memory
    only = timings["ours backward"]
    assert only.rate == pytest.approx(5.0 / only.milliseconds)


class _Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, calls: list[str]) -> torch.Tensor:
        ctx.calls = calls
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.calls.append("backward")
        return grad, None


def test_each_pass_is_rated_by_its_own_work() -> None:
    cases = {case.op: case for case in [shapes._attention(CPU, 2, 16, 4, 2, 8, packed=False), shapes._norm(CPU, 8, 16),
                                        shapes._logprob(CPU, 8, 32, 16), shapes._swiglu(CPU, 8, 16)]}  # fmt: skip
    forward = 2 * 2 * 4 * 2 * 8 * 16 * 16 / 2  # two products of 2 rows, 4 heads, half of 16 x 16
    assert cases["attention"].work == {
        "": forward,
        "forward": forward,
        "backward": 2.5 * forward,
        "both": 3.5 * forward,
    }
    assert (cases["rms_norm"].work["forward"], cases["rms_norm"].work["backward"]) == (4 * 8 * 16 * 4, 4 * 8 * 16 * 4)
    assert cases["linear_logprob"].work["both"] == 3 * 2 * 8 * 32 * 16
    assert (cases["swiglu"].work["forward"], cases["swiglu"].work["backward"]) == (3 * 8 * 16 * 4, 5 * 8 * 16 * 4)


def test_passes_are_compared_with_the_same_pass() -> None:
    took = {
        "ours forward": 1.0,
        "ours backward": 2.0,
        "naive backward": 6.0,
        "bare GEMM both": 4.0,
        "naive forward": 5.0,
    }
    timings = [bench.Timing("gae", "", form, time, 1.0, "GB/s", None, 1.0) for form, time in took.items()]
    found = {(c.rival, c.way): c.times_faster for c in bench.side_by_side(timings)}
    assert found == {("naive", "backward"): 3.0, ("naive", "forward"): 5.0}


def test_peak_memory_on_a_cpu_is_that_of_the_tensors_alive_at_once() -> None:
    x = torch.ones(1 << 18)  # 1 MiB

    def run() -> torch.Tensor:
        first = x + 1.0
        second = first * 2.0  # two are alive here
        del first
        return second.exp_()

    assert bench.Stopwatch(CPU, 1).peak_mib(run) == pytest.approx(2.0, abs=0.01)


def test_every_op_has_a_case_in_the_benchmark() -> None:
    timed = {case.op for case in shapes.cases(CPU)}
    assert timed == set(bench.OPS)
    ops = {path.parent.name for path in Path(check.__file__).parent.glob("*/reference.py")}
    assert ops <= timed
