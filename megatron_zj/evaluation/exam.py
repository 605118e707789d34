"""Multiple choice by option likelihood: C-Eval and CMMLU (csv), CMExam (csv, several answers), the demo's exam.

Two styles.  ``option``: the stem is the prompt, every option's text is scored after it.  ``letter``: the prompt lists
the options, the letters are scored.  The prompt goes through the model's own chat template.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_zj.config.data import OnBadRecord
from megatron_zj.data.errors import BadRecord
from megatron_zj.data.raw import read_table
from megatron_zj.data.records import text_of
from megatron_zj.evaluation.metrics import Interval, bootstrap, macro, micro
from megatron_zj.evaluation.model import Codec, ScoreOptions, checked

Style = Literal["option", "letter"]
Normalize = Literal["sum", "mean"]
_SUBJECT_COLUMNS = ("topic", "subject", "clinical department")  # else the file's name is the subject
_COLUMNS = {*"abcde", "question", "answer", "options", *_SUBJECT_COLUMNS}
_OPTION = re.compile(r"^\s*([A-H])[\s.．、:：]\s*(.*)$")


@dataclass(frozen=True)
class ExamItem:
    """One question.  ``answer``: the right letters, usually one."""

    subject: str
    stem: str
    options: Mapping[str, str]
    answer: frozenset[str]


@dataclass(frozen=True)
class SubjectResult:
    """One subject's share."""

    accuracy: float
    num_items: int


@dataclass(frozen=True)
class ExamResult:
    """``micro`` over items, ``macro`` over subjects.  An item with several answers is right when the set is exact."""

    micro: float
    macro: float
    interval: Interval
    num_items: int
    single_answer: SubjectResult
    several_answers: SubjectResult
    by_subject: dict[str, SubjectResult]
    predicted_letters: dict[str, int]
    constant_letter: bool  # every prediction is the same letter: the model does not read the question


def read_exam(path: Path, on_bad_record: OnBadRecord = "error") -> list[ExamItem]:
    """A csv (or jsonl ...) of either layout, by its column names.  Raises DataError naming file and line."""
    return read_table(path, lambda record: _item(record, Path(path.name.removesuffix(".gz")).stem), on_bad_record)


def take_exam(
    items: Sequence[ExamItem],
    codec: Codec,
    score_options: ScoreOptions,
    style: Style = "option",
    normalize: Normalize = "sum",
) -> ExamResult:
    """Answer every item by the likelihood of its options.

    ``normalize``: ``mean`` divides an option's log-probability by its tokens.  One answer: the likeliest option.
    Several: every option with at least the uniform share of the probability (that the item has several is known).
    """
    pairs = [pair for item in items for pair in _pairs(item, codec, style)]
    sums = checked(score_options(pairs), len(pairs), "score_options")
    scale = [len(option) if normalize == "mean" else 1 for _, option in pairs]
    scores = iter([value / max(1, size) for value, size in zip(sums, scale, strict=True)])
    chosen = [_choose(item, {letter: next(scores) for letter in item.options}) for item in items]
    return report(items, chosen)


def report(items: Sequence[ExamItem], chosen: Sequence[frozenset[str]]) -> ExamResult:
    """Results of any way to choose letters."""
    right = [item.answer == letters for item, letters in zip(items, chosen, strict=True)]
    by_subject: dict[str, list[bool]] = {}
    for item, value in zip(items, right, strict=True):
        by_subject.setdefault(item.subject, []).append(value)
    letters = Counter(letter for found in chosen for letter in sorted(found))
    return ExamResult(
        micro=micro(by_subject),
        macro=macro(by_subject),
        interval=bootstrap([float(value) for value in right]),
        num_items=len(items),
        single_answer=_share(value for item, value in zip(items, right, strict=True) if len(item.answer) == 1),
        several_answers=_share(value for item, value in zip(items, right, strict=True) if len(item.answer) > 1),
        by_subject={subject: _share(values) for subject, values in sorted(by_subject.items())},
        predicted_letters=dict(sorted(letters.items())),
        constant_letter=len(items) > 1 and len(set(chosen)) == 1,
    )


def _item(record: Mapping[str, Any], subject: str) -> ExamItem:
    if not {"question", "answer"} <= {name.lower() for name in record}:
        raise BadRecord(f"no exam: columns Question and Answer are needed, found {', '.join(map(str, record))}")
    row = {name.lower(): text_of(record[name], name, empty=True) for name in record if name.lower() in _COLUMNS}
    if "options" in row:
        options = _listed_options(row["options"])
    else:
        options = {letter.upper(): row[letter] for letter in "abcde" if row.get(letter)}
    answer = frozenset(re.sub(r"[^A-H]", "", row["answer"].upper()))
    if not row["question"] or len(options) < 2:
        raise BadRecord(f"a question needs a stem and two options or more, found {len(options)}")
    if not answer or not answer <= set(options):
        raise BadRecord(f"answer {row['answer']!r} is not among the options {', '.join(options)}")
    named = next((row[column] for column in _SUBJECT_COLUMNS if row.get(column)), subject)
    return ExamItem(named, row["question"], options, answer)


def _listed_options(text: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for line in text.splitlines():
        found = _OPTION.match(line)
        if found:
            options[found.group(1)] = found.group(2).strip()
        elif options and line.strip():
            options[list(options)[-1]] += line.strip()
    return options


def _pairs(item: ExamItem, codec: Codec, style: Style) -> list[tuple[list[int], list[int]]]:
    if style == "option":
        prompt = codec.question(item.stem)
        return [(prompt, codec.text(text)) for text in item.options.values()]
    listed = "\n".join(f"{letter}. {text}" for letter, text in item.options.items())
    prompt = codec.question(f"{item.stem}\n{listed}\n请只回答选项字母。")
    return [(prompt, codec.text(letter)) for letter in item.options]


def _choose(item: ExamItem, scores: Mapping[str, float]) -> frozenset[str]:
    best = max(scores, key=lambda letter: scores[letter])
    if len(item.answer) == 1:
        return frozenset({best})
    weights = {letter: math.exp(score - scores[best]) for letter, score in scores.items()}
    threshold = sum(weights.values()) / len(weights)
    return frozenset(letter for letter, weight in weights.items() if weight >= threshold)


def _share(values: Iterable[bool]) -> SubjectResult:
    items = list(values)
    return SubjectResult(sum(items) / len(items) if items else 0.0, len(items))
