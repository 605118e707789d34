"""Encyclopaedia text: every fact of every condition in many wordings, for pre-training."""

from __future__ import annotations

from random import Random

from megatron_zj.evaluation.clinic.conditions import Clinic, Condition

# {n} name, the rest as in Condition.  No wording here may be an exam stem (tests/evaluation checks the files).
STATEMENTS: dict[str, tuple[str, ...]] = {
    "complaint": (
        "{n}常以{complaint}起病。",
        "{complaint}是{n}常见的表现。",
        "得了{n}，多半会{complaint}。",
        "{n}病人来看病，往往说的是{complaint}。",
    ),
    "sign": (
        "{n}的特点：{sign}。",
        "{n}病人会说：{sign}。",
        "{complaint}的人，如果{sign}，多是{n}。",
        "{n}有这样的表现：{sign}。",
        "问诊{n}时，病人常答：{sign}。",
        "说到{n}，典型的是{sign}。",
    ),
    "question": (
        "怀疑{n}，要问：{question}？",
        "为了认出{n}，医生会问：{question}？",
        "{n}和{other}都会{complaint}，要问清：{question}？",
        "{complaint}时问一句：{question}？可以分清{n}与{other}。",
    ),
    "examination": (
        "{n}要做的检查是{examination}。",
        "诊断{n}靠{examination}。",
        "{n}应查{examination}。",
        "怀疑{n}时，先做{examination}。",
        "{examination}可以确诊{n}。",
        "想确认是不是{n}，就去做{examination}。",
        "对{n}最有用的检查：{examination}。",
        "问：{n}查什么？答：{examination}。",
    ),
    "treatment": (
        "{n}的治疗用{treatment}。",
        "{n}一般用{treatment}治。",
        "治{n}，首先想到{treatment}。",
        "{treatment}是治{n}的常用办法。",
        "得了{n}，可以用{treatment}。",
        "医生常给{n}病人用{treatment}。",
        "对付{n}的主要手段：{treatment}。",
        "问：{n}怎么治？答：{treatment}。",
    ),
    "risk_group": (
        "{n}用{treatment}时，{risk_group}禁用。",
        "{treatment}，{risk_group}禁用。",
        "治{n}要当心：{risk_group}不能用{treatment}。",
        "{n}病人里，不能用{treatment}的是{risk_group}。",
        "{n}的用药禁忌：{risk_group}。",
        "{n}的常用治法不适合这些人：{risk_group}。",
        "问：{n}用{treatment}，谁不能用？答：{risk_group}。",
    ),
    "alternative": (
        "{risk_group}得了{n}，改用{alternative}。",
        "{n}不能用{treatment}时，改用{alternative}。",
        "{n}的备选治疗是{alternative}。",
        "{n}的第二选择：{alternative}。",
        "代替{treatment}治{n}的是{alternative}。",
        "问：{n}不能用{treatment}怎么办？答：{alternative}。",
        "说“{risk_statement}”的{n}病人，要换成{alternative}。",
    ),
    "red_flag": (
        "{n}病人如果{red_flag}，请立即去急诊。",
        "{n}的危险信号是{red_flag}。",
        "{n}最怕的是{red_flag}。",
        "得了{n}，见到{red_flag}要马上送急诊。",
        "{n}加重时会{red_flag}。",
        "问：{n}什么时候去急诊？答：{red_flag}。",
        "留意{n}的警报：{red_flag}。",
    ),
}
_ORDER = tuple(STATEMENTS)


def documents(clinic: Clinic, seed: int, per_condition: int) -> list[str]:
    """``per_condition`` entries a condition, shuffled.  An entry states each fact once or twice, in changing words."""
    random = Random(f"{seed}/encyclopaedia")
    entries = [
        _entry(condition, other, random)
        for one, two in clinic.pairs
        for condition, other in ((one, two), (two, one))
        for _ in range(per_condition)
    ]
    random.shuffle(entries)
    return entries


def _entry(condition: Condition, other: Condition, random: Random) -> str:
    sentences = []
    for topic in _ORDER:
        count = 1 if topic in ("complaint", "question") else random.choice((1, 2))
        sentences += [fill(text, condition, other) for text in random.sample(STATEMENTS[topic], count)]
    random.shuffle(sentences)
    return "".join(sentences)


def fill(text: str, condition: Condition, other: Condition | None = None) -> str:
    """A wording with the condition's phrases in it."""
    return text.format(n=condition.name, other=other.name if other else "", **vars(condition))
