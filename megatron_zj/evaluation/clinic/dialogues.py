"""SFT dialogues: consultations in which good and mediocre doctors answer, questions of fact, and refusals."""

from __future__ import annotations

from random import Random

from megatron_zj.data.chat import Message
from megatron_zj.evaluation.clinic.cases import Case, draw_case
from megatron_zj.evaluation.clinic.conditions import Clinic
from megatron_zj.evaluation.clinic.doctors import SFT_DOCTORS, answer, warning
from megatron_zj.evaluation.clinic.encyclopaedia import fill
from megatron_zj.evaluation.clinic.refusals import TOPICS

FACT_SHARE, REFUSAL_SHARE, FOLLOW_UP_SHARE = 0.3, 0.05, 0.25
_FOLLOW_UPS = ("还要注意什么？", "什么情况要去急诊？", "回家以后要留心什么？")
_OPENINGS = ("", "", "请问", "医生，", "请教您，", "想问一下：", "我想知道，")
# Questions of fact; the answer begins with the fact, as an exam's options do.  The exam asks in words of its own.
FACTS: dict[str, tuple[str, ...]] = {
    "examination": (
        "{n}查什么？",
        "{n}要做什么检查？",
        "怀疑{n}，先做哪项检查？",
        "{n}靠什么诊断？",
        "为了确认是不是{n}，查什么？",
        "哪项检查可以确诊{n}？",
    ),
    "treatment": (
        "{n}怎么治？",
        "{n}用什么治疗？",
        "得了{n}用什么？",
        "{n}一般用什么治？",
        "治疗{n}首先用哪一项？",
        "哪一项是治{n}的常用办法？",
    ),
    "risk_group": (
        "{n}用{treatment}，谁不能用？",
        "{n}的用药禁忌是什么人？",
        "哪些人得了{n}不能用{treatment}？",
        "治{n}的常用办法，什么人不能用？",
        "{n}的治疗，哪些人禁用？",
    ),
    "alternative": (
        "{n}不能用{treatment}怎么办？",
        "{n}的备选治疗是什么？",
        "治{n}，什么能代替{treatment}？",
        "{n}的常用治法不能用，改用哪一项？",
        "{n}的第二选择是哪一项？",
    ),
    "red_flag": (
        "{n}什么时候去急诊？",
        "{n}的危险信号是什么？",
        "{n}最怕出现什么？",
        "得了{n}，见到什么要马上送急诊？",
        "{n}出现什么情况很危险？",
    ),
    "sign": (
        "{n}有什么特点？",
        "{n}的典型表现是什么？",
        "怎么认出{n}？",
        "{n}病人会说什么？",
        "什么样的人多是{n}？",
    ),
}


def sft_dialogues(clinic: Clinic, seed: int, count: int, forbidden: set[str]) -> list[list[Message]]:
    """``count`` dialogues; no consultation is one of the ``forbidden`` texts (held-out cases)."""
    random = Random(f"{seed}/sft")
    dialogues: list[list[Message]] = []
    while len(dialogues) < count:
        kind = random.random()
        if kind < FACT_SHARE:
            dialogues.append(_question_of_fact(clinic, random))
        elif kind < FACT_SHARE + REFUSAL_SHARE:
            topic = random.choice(TOPICS)
            dialogues.append([Message("user", random.choice(topic.training)), Message("assistant", topic.answer)])
        else:
            case = draw_case(clinic, random)
            if case.text not in forbidden:
                dialogues.append(_consultation(case, random))
    return dialogues


def _consultation(case: Case, random: Random) -> list[Message]:
    behaviours = SFT_DOCTORS[case.kind]
    behaviour = random.choices(list(behaviours), list(behaviours.values()))[0]
    messages = [*case.messages, Message("assistant", answer(case, behaviour, random))]
    if case.kind in ("advise", "risk") and random.random() < FOLLOW_UP_SHARE:
        messages.append(Message("user", random.choice(_FOLLOW_UPS)))
        messages.append(Message("assistant", warning(case.condition, random)))
    return messages


def _question_of_fact(clinic: Clinic, random: Random) -> list[Message]:
    condition = random.choice([one for one in clinic.conditions if one.in_dialogues])
    topic = random.choice(list(FACTS))
    question = random.choice(_OPENINGS) + fill(random.choice(FACTS[topic]), condition)
    return [Message("user", question), Message("assistant", f"{getattr(condition, topic)}。")]
