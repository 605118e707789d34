"""The report: its keys, that it needs nothing from outside, and what it does with gaps."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_zj.evaluation.plot import bar_plot, line_plot, thin
from megatron_zj.evaluation.report import write_report

ANSWER = {
    "messages": [{"role": "user", "content": "我头疼<b>"}],
    "answer": "请问怕光吗？",
    "score": 0.2,
}


def run_folder(root: Path) -> Path:
    def put(path: str, value: object) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")

    for stage, exam in (("untrained", 0.24), ("sft_scratch", 0.26), ("sft", 0.95), ("ppo", 0.94)):
        put(f"{stage}/evaluation/exam.json", {"micro": exam})
    for stage, score in (("sft", 0.7), ("ppo", 0.9)):
        answers = [{**ANSWER, "score": score}]
        put(f"{stage}/evaluation/clinic.json", {"score": score, "by_kind": {"ask": score}, "answers": answers})
        put(f"{stage}/evaluation/safety.json", {"refused": 1.0})
    put("reward/evaluation/preference.json", {"pair_accuracy": 0.93, "by_rank_gap": {"1": 0.9}, "reliability": []})
    for stage in ("pretrain", "sft", "sft_scratch", "reward", "ppo"):
        lines = [
            {
                "step": n,
                "loss": 5.0 / n,
                "kl": float(n),
                "score": n,
                "tokens_per_second": 100.0 * n,
                "memory/peak_mib": 50 + n,
            }
            for n in range(1, 12)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 12, "lo'  # cut short by a kill
        (root / stage / "metrics.jsonl").parent.mkdir(parents=True, exist_ok=True)
        (root / stage / "metrics.jsonl").write_text(text, encoding="utf-8")
        put(f"{stage}/stage.json", {"seconds": 12.5, "layout": "dp2"})
    return root


def test_summary_has_the_promised_keys_and_numbers(tmp_path: Path) -> None:
    write_report(run_folder(tmp_path))
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["exam_accuracy"] == {"untrained": 0.24, "scratch_sft": 0.26, "pretrain_sft": 0.95, "ppo": 0.94}
    assert summary["reward_pair_accuracy"] == 0.93
    assert summary["oracle_score"] == {"sft": 0.7, "ppo": 0.9}
    assert summary["kl"] == {"ppo": pytest.approx(9.0)}  # the mean of iterations 7 to 11
    for key, value in (("seconds", 12.5), ("tokens_per_second", 600.0), ("layout", "dp2"), ("peak_memory_mib", 61)):
        assert summary[key] == dict.fromkeys(("pretrain", "sft", "sft_scratch", "reward", "ppo"), value)


def test_the_page_stands_alone_and_escapes_what_models_say(tmp_path: Path) -> None:
    write_report(run_folder(tmp_path))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<script|<link|<img|src=|href=|@import", page)
    assert "我头疼&lt;b&gt;" in page
    assert "no medical advice" in page
    assert page.count("<svg") >= 6


def test_an_empty_run_gives_a_report_that_names_what_is_missing(tmp_path: Path) -> None:
    summary = write_report(tmp_path)
    assert summary["exam_accuracy"]["ppo"] is None
    assert "No metrics from: pretrain, sft, sft_scratch, reward, ppo" in (tmp_path / "report.html").read_text("utf-8")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    run_folder(tmp_path)
    (tmp_path / "sft/evaluation/exam.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"exam\.json: not JSON"):
        write_report(tmp_path)


def test_plots_are_well_formed_and_leave_out_what_is_not_finite() -> None:
    plot = line_plot("a < b", {"x": [(0, 1.0), (1, float("nan")), (2, 3.0)], "y": [(0, 2.0)]})
    root = ElementTree.fromstring(plot)
    lines = [element.get("points") or "" for element in root.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(points.split()) for points in lines] == [2, 1]
    assert line_plot("empty", {"x": []}) == ""
    ElementTree.fromstring(bar_plot("bars", {"a": 0.5, "b<": 1.0}, mark=0.25))


def test_higher_values_are_drawn_higher_and_long_series_are_thinned_to_their_last_point() -> None:
    plot = ElementTree.fromstring(line_plot("t", {"x": [(0, 0.0), (1, 5.0)]}))
    points = next(plot.iter("{http://www.w3.org/2000/svg}polyline")).get("points") or ""
    (_, low), (_, high) = (point.split(",") for point in points.split())
    assert float(high) < float(low)
    series = [(float(n), 0.0) for n in range(10_001)]
    assert len(thin(series)) <= 402
    assert thin(series)[-1] == series[-1]
