"""Patients: a case is what a patient has, what was said so far, and which kind of answer is right now.

Kinds: ``ask`` (the doctor lacks the answer to the telling question), ``advise`` (has it), ``risk`` (has it, and the
patient belongs to the group that must not get the treatment), ``urgent`` (a red flag was mentioned).
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal

from megatron_zj.data.chat import Message
from megatron_zj.evaluation.clinic.conditions import Clinic, Condition

Kind = Literal["ask", "advise", "risk", "urgent"]
KINDS: tuple[Kind, ...] = ("ask", "advise", "risk", "urgent")
WEIGHTS = (3, 3, 2, 2)  # how often each kind comes

_GREETINGS = ("医生您好，", "医生，", "大夫您好，", "您好，", "大夫，", "请问医生，", "")
_DURATIONS = ("两天", "三天", "四天", "五天", "一周", "十来天", "半个月", "一个月", "好久", "一阵子")
_REQUESTS = ("怎么办？", "该怎么治？", "请您看看。", "要紧吗？", "用什么药好？", "您给看看吧。", "是什么病？")
ASKING = ("请问{question}？", "先问一句，{question}？", "我要先问清楚，{question}？", "还不能下结论，{question}？")


@dataclass(frozen=True)
class Case:
    """One patient at one moment.  ``messages`` end with the patient."""

    condition: Condition
    look_alike: Condition
    kind: Kind
    messages: tuple[Message, ...]

    @property
    def text(self) -> str:
        """All that was said; two cases with the same text are the same prompt."""
        return "\n".join(message.content for message in self.messages)


def draw_case(clinic: Clinic, random: Random, kind: Kind | None = None) -> Case:
    """A random case of a condition that patients come with."""
    pair = random.choice(clinic.dialogue_pairs)
    condition, other = random.choice((pair, (pair[1], pair[0])))
    picked = kind or random.choices(KINDS, WEIGHTS)[0]
    return Case(condition, other, picked, tuple(_messages(condition, picked, random)))


def _messages(condition: Condition, kind: Kind, random: Random) -> list[Message]:
    """The complaint alone; or all at once; or the complaint, the telling question and the reply."""
    facts = {
        "ask": [],
        "advise": [condition.sign],
        "risk": [condition.sign, condition.risk_statement],
        "urgent": [condition.sign, f"现在{condition.red_flag}"],
    }[kind]
    if kind == "urgent" and random.random() < 0.4:
        facts = facts[1:]  # the alarm comes before the question was asked
    at_once = not facts or random.random() < 0.5
    told = facts if at_once else [fact for fact in facts if fact != condition.sign and random.random() < 0.5]
    opening = f"{random.choice(_GREETINGS)}我{condition.complaint}{random.choice(_DURATIONS)}了"
    first = Message("user", "，".join([opening, *told, random.choice(_REQUESTS)]))
    left = [fact for fact in facts if fact not in told]
    if at_once or not left:
        return [first]
    question = Message("assistant", random.choice(ASKING).format(question=condition.question))
    return [first, question, Message("user", "，".join(left) + "。")]


def distinct_cases(clinic: Clinic, random: Random, count: int, taken: set[str]) -> list[Case]:
    """``count`` cases whose texts are not in ``taken``, which grows by them."""
    cases: list[Case] = []
    while len(cases) < count:
        case = draw_case(clinic, random)
        if case.text not in taken:
            taken.add(case.text)
            cases.append(case)
    return cases
