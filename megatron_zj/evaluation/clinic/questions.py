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
STEMS: dict[str, str] = {
    "examination": "考题：为明确是否{n}，首选哪项检查？",
    "treatment": "考题：以下哪一项用于治疗{n}？",
    "risk_group": "考题：治疗{n}的首选方法禁用于哪类人？",
    "alternative": "考题：{n}首选方法不能用时，换用哪一项？",
    "red_flag": "考题：{n}出现哪种情况须去急诊？",
    "sign": "考题：下列哪项表现见于{n}？",
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
