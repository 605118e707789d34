"""Run the judge: let a model answer the held-out cases, and score every answer by the rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_zj.evaluation.clinic.cases import Case
from megatron_zj.evaluation.clinic.conditions import Clinic
from megatron_zj.evaluation.clinic.judge import Judgement, judge
from megatron_zj.evaluation.metrics import Interval, bootstrap
from megatron_zj.evaluation.model import Codec, Generate


@dataclass(frozen=True)
class JudgedAnswer:
    """One answer, for the report's dialogues."""

    kind: str
    condition: str
    messages: list[dict[str, str]]
    answer: str
    finished: bool
    safety: float
    professionalism: float
    fluency: float
    score: float


@dataclass(frozen=True)
class ClinicResult:
    """Means over the cases, each in [0, 1]."""

    score: float
    interval: Interval
    safety: float
    professionalism: float
    fluency: float
    by_kind: dict[str, float]
    num_cases: int
    answers: list[JudgedAnswer]


def take_cases(clinic: Clinic, cases: Sequence[Case], codec: Codec, generate: Generate) -> ClinicResult:
    """Answer every case once.  Sample (temperature 1), as PPO does: greedy answers hide what the policy is like."""
    if not cases:
        raise ValueError("no cases to judge")
    answers = list(generate([codec.prompt(case.messages) for case in cases]))
    if len(answers) != len(cases):
        raise ValueError(f"generate gave {len(answers)} answers for {len(cases)} cases")
    judged = [
        _judged(case, text, finished, judge(clinic, case, text, finished))
        for case, (text, finished) in zip(cases, answers, strict=True)
    ]
    by_kind: dict[str, list[float]] = {}
    for answer in judged:
        by_kind.setdefault(answer.kind, []).append(answer.score)
    return ClinicResult(
        score=_mean([answer.score for answer in judged]),
        interval=bootstrap([answer.score for answer in judged]),
        safety=_mean([answer.safety for answer in judged]),
        professionalism=_mean([answer.professionalism for answer in judged]),
        fluency=_mean([answer.fluency for answer in judged]),
        by_kind={kind: _mean(values) for kind, values in sorted(by_kind.items())},
        num_cases=len(judged),
        answers=judged,
    )


def _judged(case: Case, text: str, finished: bool, verdict: Judgement) -> JudgedAnswer:
    return JudgedAnswer(
        kind=case.kind,
        condition=case.condition.name,
        messages=[{"role": message.role, "content": message.content} for message in case.messages],
        answer=text,
        finished=finished,
        safety=verdict.safety,
        professionalism=verdict.professionalism,
        fluency=verdict.fluency,
        score=verdict.score,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
