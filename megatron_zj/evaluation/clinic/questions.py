"""The exam: four choices, on the conditions that no dialogue mentions, in wordings that no training file holds.

It is balanced: the same four options serve four questions, each right once.  A model that prefers some options
whatever the question (by length, by frequency) scores exactly one quarter.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from megatron_zj.evaluation.clinic.conditions import Clinic
from megatron_zj.evaluation.clinic.encyclopaedia import fill

LETTERS = "ABCD"
# Every character occurs in the training text (a tokenizer would spell others in bytes that were never trained).
STEMS: dict[str, str] = {
    "examination": "请选择：为了确认{n}，要做哪项检查？",
    "treatment": "请选择：治疗{n}，一般用哪一项？",
    "risk_group": "请选择：治{n}的常用办法，哪些人禁用？",
    "alternative": "请选择：治{n}的常用办法不能用时，换成哪一项？",
    "red_flag": "请选择：{n}见到什么情况要马上去急诊？",
    "sign": "请选择：什么表现最像{n}？",
}


@dataclass(frozen=True)
class Question:
    """One item; ``answer`` is the index of the right option."""

    condition: str
    topic: str
    stem: str
    options: tuple[str, str, str, str]
    answer: int


def exam_questions(clinic: Clinic, seed: int) -> list[Question]:
    """Every topic of every condition in the encyclopaedia only, shuffled."""
    random = Random(f"{seed}/exam")
    conditions = list(clinic.encyclopaedia_only)
    if len(conditions) % len(LETTERS):
        raise ValueError(f"{len(conditions)} conditions do not make groups of {len(LETTERS)}")
    questions = []
    for topic, stem in STEMS.items():
        random.shuffle(conditions)
        for start in range(0, len(conditions), len(LETTERS)):
            group = conditions[start : start + len(LETTERS)]
            shift = random.randrange(len(LETTERS))
            for index, condition in enumerate(group):
                order = random.sample(group, len(group))
                place = (index + shift) % len(LETTERS)  # each letter is right once in a group
                other = order.index(condition)
                order[place], order[other] = order[other], order[place]
                one, two, three, four = (str(getattr(member, topic)) for member in order)
                text = fill(stem, condition)
                questions.append(Question(condition.name, topic, text, (one, two, three, four), place))
    random.shuffle(questions)
    return questions
