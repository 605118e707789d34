"""The demo's report: reads the stage folders of a run, writes ``summary.json`` and one self-contained ``report.html``.

What it reads, all of it optional (what is missing is left out, and named in the report):

* ``<run>/<stage>/metrics.jsonl``: ``{"step": 1, "loss": ..., ...}`` a line;
* ``<run>/<stage>/evaluation/{exam,clinic,preference,safety}.json``: the result dataclasses of this package as JSON;
* ``<run>/<stage>/along/step_<8 digits>/evaluation/clinic.json``: the same of checkpoints on the way;
* ``<run>/<stage>/stage.json``: ``{"seconds": 61.2, "layout": "dp2, distributed optimizer", "kl_target": 5.0}``.

Stages: untrained (evaluation only), pretrain, sft, sft_scratch, reward, ppo; grpo, rejection, dpo and ppo_flipped where
they were asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from megatron_zj.algorithms.health import CHECKS
from megatron_zj.evaluation.clinic.conditions import NOTICE
from megatron_zj.evaluation.plot import bar_plot, line_plot
from megatron_zj.evaluation.targets import Target, demo_targets, learning_targets

TRAINED = ("pretrain", "sft", "sft_scratch", "reward", "ppo")
OTHERS = ("grpo", "rejection", "dpo", "ppo_flipped")  # also from the SFT model, where asked for
ALIGNED = ("ppo", *OTHERS)
STAGES = ("untrained", *TRAINED, *OTHERS)
FAMILIES = ("exam", "clinic", "preference", "safety")
_LAST = 5  # iterations that the KL of the summary is the mean of
_DIALOGUES = 12  # before/after dialogues shown
_CHANCE = 0.25
_KL = ("kl", "kl_standard_error", "k3", "k3_standard_error", "tokens_an_answer")  # evaluation/divergence.py
Json = dict[str, Any]


@dataclass(frozen=True)
class StageOutput:
    """What one stage left behind."""

    metrics: list[Json] = field(default_factory=list)
    evaluation: dict[str, Json] = field(default_factory=dict)
    facts: Json = field(default_factory=dict)
    along: dict[int, Json] = field(default_factory=dict)  # step -> the judge's result, of checkpoints on the way

    def values(self, key: str) -> list[float]:
        """A metric's numbers, in order of steps."""
        return [value for _, value in self.series(key)]

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of a metric where it was written as a number."""
        return [
            (float(line["step"]), float(line[key]))
            for line in self.metrics
            if isinstance(line.get(key), int | float) and "step" in line
        ]

    def found(self, family: str, *path: str) -> Any:
        """A value inside an evaluation's JSON, or None."""
        value: Any = self.evaluation.get(family)
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def read_run(run: Path) -> dict[str, StageOutput]:
    """Every stage; one without a folder is empty.  Raises ValueError naming a file that is not JSON."""
    return {stage: _read_stage(run / stage) for stage in STAGES}


def summarise(stages: Mapping[str, StageOutput]) -> Json:
    """The numbers that count, with fixed keys; None where a stage did not leave one."""
    accuracy = {"untrained": "untrained", "scratch_sft": "sft_scratch", "pretrain_sft": "sft", "ppo": "ppo"}
    return {
        "notice": NOTICE,
        "exam_accuracy": {name: stages[stage].found("exam", "micro") for name, stage in accuracy.items()},
        "reward_pair_accuracy": stages["reward"].found("preference", "pair_accuracy"),
        "oracle_score": {stage: stages[stage].found("clinic", "score") for stage in ("sft", "ppo")},
        "kl": {"ppo": _last_kl(stages["ppo"])},
        "safety_refused": {stage: stages[stage].found("safety", "refused") for stage in ("sft", "ppo")},
        "seconds": {stage: stages[stage].facts.get("seconds") for stage in TRAINED},
        "tokens_per_second": {stage: _middle(stages[stage].values("tokens_per_second")) for stage in TRAINED},
        "layout": {stage: stages[stage].facts.get("layout") for stage in TRAINED},
        "peak_memory_mib": {stage: max(stages[stage].values("memory/peak_mib"), default=None) for stage in TRAINED},
        "learning": {name: _learned(stages, name) for name in ALIGNED if "clinic" in stages[name].evaluation},
    }


def targets(summary: Json) -> list[Target]:
    """What this run must have reached: the chain's targets, and the other algorithms' where one of them was run."""
    others = learning_targets(summary) if any(name in summary["learning"] for name in OTHERS) else []
    return [*demo_targets(summary), *others]


def write_report(run: Path) -> Json:
    """Write ``summary.json`` and ``report.html`` into ``run``.  Returns the summary."""
    stages = read_run(run)
    summary = summarise(stages)
    (run / "summary.json").write_text(json.dumps(summary, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (run / "report.html").write_text(render_report(stages, summary), encoding="utf-8")
    return summary


def render_report(stages: Mapping[str, StageOutput], summary: Json) -> str:
    """The page: no script, no link to anything outside."""
    sections = [
        ("Does pre-training help? The ablation", _ablation(summary)),
        ("Does the reward model see what matters?", _reward(stages["reward"])),
        ("Does PPO help?", _alignment(stages, summary)),
        ("Do the others learn, and is it the reward that moves them?", _learning(stages, summary)),
        ("Health", _alarms(stages)),
        ("Before and after", _dialogues(stages)),
        ("Curves", _curves(stages)),
        ("Cost", _cost(summary)),
        ("Targets", _targets(summary)),
        ("Not found", _missing(stages)),
    ]
    body = "".join(f"<h2>{escape(title)}</h2>{content}" for title, content in sections if content)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>megatron_zj demo</title><style>'
        "body{font-family:sans-serif;max-width:960px;margin:2em auto;padding:0 1em;color:#222}"
        "table{border-collapse:collapse;margin:.6em 0}td,th{border:1px solid #ccc;padding:.3em .6em;text-align:left;"
        "vertical-align:top}th{background:#f3f4f6}.notice{background:#fef3c7;padding:.6em;border:1px solid #d97706}"
        "svg{margin:.3em}</style></head><body><h1>megatron_zj: the demo</h1>"
        f'<p class="notice">{escape(NOTICE)}</p>{body}</body></html>\n'
    )


def _read_stage(folder: Path) -> StageOutput:
    evaluation = {}
    for family in FAMILIES:
        path = folder / "evaluation" / f"{family}.json"
        if path.exists():
            evaluation[family] = _read_json(path)
    along = {
        int(path.parts[-3].removeprefix("step_")): _read_json(path)
        for path in sorted(folder.glob("along/step_*/evaluation/clinic.json"))
    }
    metrics, facts = _read_lines(folder / "metrics.jsonl"), folder / "stage.json"
    return StageOutput(metrics, evaluation, _read_json(facts) if facts.exists() else {}, along)


def _last_kl(stage: StageOutput) -> float | None:
    kl = stage.values("kl")[-_LAST:]
    return sum(kl) / len(kl) if kl else None


def _learned(stages: Mapping[str, StageOutput], name: str) -> Json:
    """One algorithm from the SFT model: the judge's score along the way, what became of the exam, and the distance."""
    stage = stages[name]
    judged = {0: stages["sft"].evaluation.get("clinic", {}), **stage.along}
    judged[stage.found("clinic", "step")] = stage.evaluation["clinic"]
    return {
        "oracle_score": stage.found("clinic", "score"),
        "oracle_curve": {str(step): one.get("score") for step, one in judged.items()},
        "exam_accuracy": stage.found("exam", "micro"),
        "kl": _last_kl(stage),
        "kl_highest": max(stage.values("kl"), default=None),
        "kl_target": stage.facts.get("kl_target"),
        "held_out_kl": {key: stage.found("clinic", key) for key in _KL},
        "held_out_kl_curve": {str(step): one.get("kl") for step, one in judged.items() if step},
        "seconds": stage.facts.get("seconds"),
    }


def _read_json(path: Path) -> Json:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); run that evaluation again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object; run that evaluation again")
    return value


def _read_lines(path: Path) -> list[Json]:
    """Lines of a metrics file; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number}: not a metrics line ({error})") from error
    return found


def _ablation(summary: Json) -> str:
    names = {
        "untrained": "random weights",
        "scratch_sft": "SFT only",
        "pretrain_sft": "pre-training + SFT",
        "ppo": "pre-training + SFT + PPO",
    }
    found = {key: value for key, value in summary["exam_accuracy"].items() if value is not None}
    rows = [[names[key], f"{value:.3f}"] for key, value in found.items()]
    text = "<p>Held-out exam, four choices, on the conditions that no dialogue mentions; chance is 0.25.</p>"
    return text + table(["model", "exam accuracy"], rows) + bar_plot("exam accuracy", found, _CHANCE) if found else ""


def _reward(stage: StageOutput) -> str:
    result = stage.evaluation.get("preference")
    if not result:
        return ""
    rows = [
        ["pair accuracy", _number(result.get("pair_accuracy"))],
        *([f"... rank gap {gap}", _number(value)] for gap, value in (result.get("by_rank_gap") or {}).items()),
        ["the longer answer wins (baseline)", _number(result.get("longer_wins"))],
        ["correlation with length", _number(result.get("length_correlation"))],
        ["calibration error (ECE)", _number(result.get("calibration_error"))],
    ]
    bins = [(one["confidence"], one["accuracy"]) for one in result.get("reliability") or []]
    curve = line_plot("reliability", {"measured": bins, "ideal": [(0.5, 0.5), (1.0, 1.0)]}, "confidence")
    return table(["held-out pairs", ""], rows) + (curve if bins else "")


def _alignment(stages: Mapping[str, StageOutput], summary: Json) -> str:
    results = {
        stage: stages[stage].evaluation["clinic"] for stage in ("sft", "ppo") if "clinic" in stages[stage].evaluation
    }
    if not results:
        return ""
    kinds = sorted({kind for result in results.values() for kind in result.get("by_kind") or {}})
    rows = [
        [measure, *(_number(result.get(measure)) for result in results.values())]
        for measure in ("score", "safety", "professionalism", "fluency")
    ]
    rows += [
        [f"kind: {kind}", *(_number((r.get("by_kind") or {}).get(kind)) for r in results.values())] for kind in kinds
    ]
    rows.append(["exam", *(_number(stages[stage].found("exam", "micro")) for stage in results)])
    rows.append(["probes refused", *(_number(summary["safety_refused"][stage]) for stage in results)])
    text = "<p>Answers to held-out patients, sampled at temperature 1, scored by the judge's rules (0 to 1).</p>"
    kl = f"{_number(summary['kl']['ppo'])} in training, {_number(stages['ppo'].found('clinic', 'kl'))} on these answers"
    return text + table(["judge", *results], rows) + f"<p>KL to the SFT model, nats an answer: {kl}.</p>"


def _learning(stages: Mapping[str, StageOutput], summary: Json) -> str:
    learning: dict[str, Json] = summary["learning"]
    if not any(name in learning for name in OTHERS):
        return ""
    before = summary["oracle_score"]["sft"]
    rows = [["SFT", _number(before), "", _number(summary["exam_accuracy"]["pretrain_sft"]), "", "", "", "", ""]]
    for name, found in learning.items():
        change = None if before is None else found["oracle_score"] - before
        held_out = found["held_out_kl"]
        kl = f"{_number(held_out['kl'])} ± {_number(held_out['kl_standard_error'])}"
        shown = [_number(value) for value in (found["oracle_score"], change, found["exam_accuracy"])]
        trained = [_number(found["kl"]), _number(found["kl_highest"]), _number(found["kl_target"], 1)]
        rows.append([name, *shown, kl, _number(held_out["k3"]), *trained])
    head = ["from the same SFT model", "oracle score", "change", "exam", "KL, held-out patients", "... by k3"]
    head += ["KL, training (last 5)", "... (highest)", "KL target"]
    curves = {
        name: [(float(step), score) for step, score in found["oracle_curve"].items() if score is not None]
        for name, found in learning.items()
    }
    distances = {
        name: [(0.0, 0.0), *((float(step), kl) for step, kl in found["held_out_kl_curve"].items() if kl is not None)]
        for name, found in learning.items()
    }
    sampled = {name: stages[name] for name in learning if stages[name].values("score")}
    plots = [
        line_plot("oracle score of held-out patients", curves),
        line_plot("KL to the SFT model on held-out patients (nats an answer)", distances),
        line_plot("reward model's score", {name: one.series("score") for name, one in sampled.items()}, "iteration"),
        line_plot(
            "KL to the SFT model in training (nats)",
            {name: one.series("kl") for name, one in sampled.items()},
            "iteration",
        ),
    ]
    text = (
        "<p>ppo_flipped maximises the opposite of the reward: if the score did not fall, something else moved it. "
        "KL to the SFT model in nats an answer: on the judged answers, ± its standard error, measured alike for all; "
        "and as training logs it, where it does.</p>"
    )
    return text + table(head, rows) + "".join(plots)


def _targets(summary: Json) -> str:
    rows = [[one.claim, _number(one.measured), one.wanted, "met" if one.met else "MISSED"] for one in targets(summary)]
    return table(["target", "measured", "wanted", ""], rows)


def _alarms(stages: Mapping[str, StageOutput]) -> str:
    """Every alarm of the learning that sounded: when, and what to do about it."""
    rows = []
    for stage in ALIGNED:
        for check in CHECKS:
            steps = [int(step) for step, _ in stages[stage].series(f"alarm/{check.name}")]
            if steps:
                rows.append([stage, check.name, f"{len(steps)} iterations, {steps[0]} to {steps[-1]}", check.advice])
    quiet = "<p>No alarm sounded.</p>" if any(stages[stage].metrics for stage in ALIGNED) else ""
    return table(["stage", "alarm", "sounded", "advice"], rows) if rows else quiet


def _dialogues(stages: Mapping[str, StageOutput]) -> str:
    """The same patients before and after PPO: the largest changes first, up and down."""
    before, after = (stages[stage].found("clinic", "answers") or [] for stage in ("sft", "ppo"))
    pairs = [(one, two) for one, two in zip(before, after, strict=False) if one["messages"] == two["messages"]]
    pairs.sort(key=lambda pair: -abs(pair[1]["score"] - pair[0]["score"]))
    rows = [
        [
            "\n".join(f"{'患者' if turn['role'] == 'user' else '医生'}：{turn['content']}" for turn in one["messages"]),
            f"{one['answer']}\n({one['score']:.2f})",
            f"{two['answer']}\n({two['score']:.2f})",
        ]
        for one, two in pairs[:_DIALOGUES]
    ]
    return table(["dialogue", "SFT (score)", "PPO (score)"], rows) if rows else ""


def _curves(stages: Mapping[str, StageOutput]) -> str:
    plots = [
        line_plot("pre-training loss", {"loss": stages["pretrain"].series("loss")}),
        line_plot(
            "SFT loss", {"pretrained": stages["sft"].series("loss"), "scratch": stages["sft_scratch"].series("loss")}
        ),
        line_plot("reward model loss", {"loss": stages["reward"].series("loss")}),
        line_plot("PPO: reward model's score", {"score": stages["ppo"].series("score")}, "iteration"),
        line_plot("PPO: KL to the SFT model (nats)", {"kl": stages["ppo"].series("kl")}, "iteration"),
        line_plot("PPO: length of answers (tokens)", {"length": stages["ppo"].series("response_length")}, "iteration"),
    ]
    return "".join(plots)


def _cost(summary: Json) -> str:
    rows = [
        [
            stage,
            str(summary["layout"][stage] or ""),
            _number(summary["seconds"][stage], 1),
            _number(summary["tokens_per_second"][stage], 0),
            _number(summary["peak_memory_mib"][stage], 0),
        ]
        for stage in TRAINED
    ]
    return table(["stage", "layout", "seconds", "tokens/s (median step)", "peak MiB a rank"], rows)


def _missing(stages: Mapping[str, StageOutput]) -> str:
    gone = [stage for stage in TRAINED if not stages[stage].metrics]
    return f"<p>No metrics from: {escape(', '.join(gone))}.</p>" if gone else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; cells are escaped, line breaks kept."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell).replace(chr(10), '<br>')}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{top}</tr>{body}</table>"


def _number(value: Any, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"


def _middle(values: Sequence[float]) -> float | None:
    return median(values) if values else None
