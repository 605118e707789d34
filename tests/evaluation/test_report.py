"""The report: its keys, that it needs nothing from outside, and what it does with gaps."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_zj.evaluation.plot import bar_plot, line_plot, thin
from megatron_zj.evaluation.report import OTHERS, read_run, render_report, summarise, write_report

ROOT = Path(__file__).resolve().parents[2]
ANSWER = {
    "messages": [{"role": "user", "content": "我头疼<b>"}],
    "answer": "请问怕光吗？",
    "score": 0.2,
}

KL = {"kl": 1.25, "kl_standard_error": 0.125, "k3": 1.5, "k3_standard_error": 0.25, "tokens_an_answer": 9.0}


def run_folder(root: Path) -> Path:
    def put(path: str, value: object) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")

    for stage, exam in (("untrained", 0.24), ("sft_scratch", 0.26), ("sft", 0.95), ("ppo", 0.94)):
        put(f"{stage}/evaluation/exam.json", {"micro": exam})
    for stage, score in (("sft", 0.7), ("ppo", 0.9)):
        answers = [{**ANSWER, "score": score}]
        judged = {"step": 11, "score": score, "by_kind": {"ask": score}, "answers": answers}
        judged |= KL if stage == "ppo" else {}
        put(f"{stage}/evaluation/clinic.json", judged)
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
        put(f"{stage}/stage.json", {"seconds": 12.5, "layout": "dp2", "kl_target": 20.0})
    return root


def add_others(root: Path) -> Path:
    """The stages of ``--algorithms all``, each judged at step 5 and at its end."""
    for stage, score in zip(OTHERS, (0.85, 0.8, 0.9, 0.2), strict=True):
        for place, step, judged in ((f"{stage}/along/step_00000005", 5, 0.75), (stage, 11, score)):
            path = root / place / "evaluation" / "clinic.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"step": step, "score": judged, **KL, "kl": step / 10}), encoding="utf-8")
        for name in ("metrics.jsonl", "stage.json"):
            (root / stage / name).write_bytes((root / "ppo" / name).read_bytes())
    return root


def demo_says(folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and output of the demo on a folder in which every stage is marked as done."""
    setting = json.dumps({"seed": 0, "miniature": False, "device": "cpu"})
    stages = ("prepare", "pretrain", "untrained", "sft_scratch", "sft", "reward", "ppo", *OTHERS)
    (folder / "done").mkdir(exist_ok=True)
    for name in stages:
        for mark in (name, f"{name}-evaluation", f"{name}-along"):
            (folder / "done" / mark).write_text(setting, encoding="utf-8")
    command = [sys.executable, str(ROOT / "tools/run_demo.py"), "--folder", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    return done.returncode, done.stdout + done.stderr


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
    assert "KL to the SFT model, nats an answer: 9.000 in training, 1.250 on these answers." in page
    assert page.count("<svg") >= 6


def test_other_algorithms_are_shown_with_their_curves(tmp_path: Path) -> None:
    learning = write_report(add_others(run_folder(tmp_path)))["learning"]
    assert list(learning) == ["ppo", *OTHERS]
    assert learning["dpo"]["oracle_curve"] == {"0": 0.7, "5": 0.75, "11": 0.9}
    assert learning["ppo"]["oracle_curve"] == {"0": 0.7, "11": 0.9}
    assert (learning["grpo"]["kl"], learning["grpo"]["kl_highest"], learning["grpo"]["kl_target"]) == (9.0, 11.0, 20.0)
    assert learning["ppo"]["held_out_kl"] == KL
    assert learning["ppo"]["held_out_kl_curve"] == {"11": 1.25}
    assert learning["dpo"]["held_out_kl_curve"] == {"5": 0.5, "11": 1.1}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Do the others learn" in page
    assert "<td>ppo_flipped</td><td>0.200</td><td>-0.500</td><td>-</td><td>1.100 ± 0.125</td><td>1.500</td>" in page
    assert "KL to the SFT model on held-out patients" in page
    assert "MISSED" not in page


def test_alarms_are_shown_with_when_they_sounded_and_their_advice(tmp_path: Path) -> None:
    stages = read_run(run_folder(tmp_path))
    assert "No alarm sounded." in render_report(stages, summarise(stages))
    for line in stages["ppo"].metrics[2:5]:
        line["alarm/entropy"] = 1.0
    page = render_report(stages, summarise(stages))
    assert "No alarm sounded." not in page
    assert "<td>entropy</td><td>3 iterations, 3 to 5</td><td>the policy has collapsed to one answer" in page


def test_the_demo_says_its_targets_and_fails_on_a_missed_one_when_asked(tmp_path: Path) -> None:
    folder = add_others(run_folder(tmp_path))
    code, said = demo_says(folder, "--algorithms", "all", "--check-targets")
    assert (code, said.count("\nmet "), said.count("\nMISSED ")) == (0, 17, 0), said
    (folder / "ppo_flipped/evaluation/clinic.json").write_text('{"step": 11, "score": 0.71}', encoding="utf-8")
    (folder / "dpo/along/step_00000005/evaluation/clinic.json").write_text('{"step": 5, "score": 0.75}', "utf-8")
    code, said = demo_says(folder, "--algorithms", "all", "--check-targets")
    assert code == 1
    assert "MISSED  oracle score, change by ppo_flipped: 0.010 (<= -0.05)" in said
    assert "MISSED  KL of dpo on held-out patients: not measured (<= 20)" in said
    assert said.count("\nMISSED ") == 2


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
