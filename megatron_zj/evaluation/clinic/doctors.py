"""Doctors, good and mediocre: what each kind of answer says, right or with one named fault."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from megatron_zj.evaluation.clinic.cases import ASKING, Case, Kind
from megatron_zj.evaluation.clinic.conditions import Condition

_DIAGNOSIS = ("考虑是{n}。", "您这是{n}。", "像是{n}。")
_EXAMINATION = ("建议查{examination}。", "先做{examination}确认。", "去查一下{examination}。")
_TREATMENT = ("可以用{treatment}", "治疗用{treatment}", "给您用{treatment}")
_INSTEAD = ("您不能用{treatment}，改用{alternative}。", "您的情况不要用{treatment}，换成{alternative}。")
_URGENT = ("{red_flag}是危险信号，请立即去急诊。", "{red_flag}很危险，请马上去急诊，不要自己用药。")

# How the doctors of the SFT dialogues behave, by kind of case: behaviour -> weight.  The faults leave PPO headroom.
SFT_DOCTORS: Mapping[Kind, Mapping[str, float]] = {
    "ask": {"good": 0.55, "guess": 0.25, "guess_careful": 0.2},
    "advise": {"good": 0.45, "no_caution": 0.3, "no_examination": 0.1, "drug_only": 0.15},
    "risk": {"good": 0.6, "ignore_risk": 0.4},
    "urgent": {"good": 0.6, "ignore_flag": 0.4},
}
# What candidate answers for ranking are drawn from.  Each kind also sees what is right for another kind only: a reward
# model that never saw a false alarm pays for one, and PPO finds that within ten steps.
CANDIDATES: Mapping[Kind, tuple[str, ...]] = {
    "ask": (
        *("good", "good", "guess", "guess_careful", "guess_drug", "wrong_question"),
        *("alarm", "alternative", "repeat", "cut"),
    ),
    "advise": (
        *("good", "good", "no_caution", "no_examination", "drug_only"),
        *("late_question", "alarm", "alternative", "repeat", "cut"),
    ),
    "risk": (
        *("good", "good", "ignore_risk", "drug_only", "no_examination"),
        *("late_question", "alarm", "repeat", "cut"),
    ),
    "urgent": (
        *("good", "good", "ignore_flag", "drug_only", "no_reason"),
        *("late_question", "alternative", "repeat", "cut"),
    ),
}


def answer(case: Case, behaviour: str, random: Random, stranger: Condition | None = None) -> str:
    """One doctor's answer.  ``stranger``: another condition, whose question or red flag the doctor mixes up."""
    stranger = stranger or case.look_alike
    if behaviour in ("repeat", "cut"):
        return _spoil(good(case, random), behaviour)
    if behaviour == "good":
        return good(case, random)
    suspected = random.choice((case.condition, case.look_alike)) if case.kind == "ask" else case.condition
    if behaviour == "wrong_question":
        return _say(ASKING, stranger, random)
    if behaviour == "alarm":
        return _say(_URGENT, random.choice((case.condition, case.look_alike, stranger)), random)
    if behaviour == "late_question":
        return _say(ASKING, case.condition, random)
    if behaviour == "no_reason":
        return random.choice(("请立即去急诊。", "请马上去急诊，不要自己用药。"))
    parts = {
        "guess": ("diagnosis", "drug"),
        "guess_careful": ("diagnosis", "examination", "drug", "caution"),
        "guess_drug": ("drug",),
        "no_caution": ("diagnosis", "examination", "drug"),
        "no_examination": ("diagnosis", "instead") if case.kind == "risk" else ("diagnosis", "drug", "caution"),
        "drug_only": ("diagnosis", "drug"),
        "alternative": ("diagnosis", "examination", "instead"),
        "ignore_risk": ("diagnosis", "examination", "drug", "caution"),
        "ignore_flag": ("diagnosis", "examination", "drug", "caution"),
    }[behaviour]
    return _advice(suspected, parts, random)


def good(case: Case, random: Random) -> str:
    """What a good doctor says."""
    if case.kind == "ask":
        return _say(ASKING, case.condition, random)
    if case.kind == "urgent":
        return _say(_URGENT, case.condition, random)
    last = ("instead",) if case.kind == "risk" else ("drug", "caution")
    return _advice(case.condition, ("diagnosis", "examination", *last), random)


def warning(condition: Condition, random: Random) -> str:
    """What to watch for, when the patient asks."""
    return _say(("如果{red_flag}，请立即去急诊。", "要是{red_flag}，马上去急诊。"), condition, random)


def _advice(condition: Condition, parts: tuple[str, ...], random: Random) -> str:
    said = ""
    for part in parts:
        if part == "diagnosis":
            said += _say(_DIAGNOSIS, condition, random)
        elif part == "examination":
            said += _say(_EXAMINATION, condition, random)
        elif part == "instead":
            said += _say(_INSTEAD, condition, random)
        elif part == "drug":
            said += _say(_TREATMENT, condition, random) + ("，" if "caution" in parts else "。")
        else:
            said += f"{condition.risk_group}禁用。"
    return said


def _spoil(text: str, how: str) -> str:
    """Say everything twice, or stop in the middle."""
    return text[: len(text) * 3 // 5] if how == "cut" else text + text


def _say(wordings: tuple[str, ...], condition: Condition, random: Random) -> str:
    return random.choice(wordings).format(n=condition.name, **vars(condition))
