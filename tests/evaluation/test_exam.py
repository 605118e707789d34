"""Multiple choice: both csv layouts, both styles, and how sets of answers are scored."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_zj.evaluation.clinic.files import DemoSizes, write_demo
from megatron_zj.evaluation.exam import ExamItem, read_exam, report, take_exam
from megatron_zj.evaluation.model import Ids
from tests.evaluation.models import codec, text_of

ITEM = ExamItem("s", "首选哪项？", {"A": "甲", "B": "乙乙", "C": "丙", "D": "丁"}, frozenset("B"))


def knows(answers: dict[str, str]) -> object:
    """Scores an option 0 when it is the known answer to the stem in the prompt, else -10 a token."""

    def score(pairs: Sequence[tuple[Ids, Ids]]) -> list[float]:
        found = []
        for prompt, option in pairs:
            right = any(stem in text_of(prompt) and text_of(option) == answer for stem, answer in answers.items())
            found.append(0.0 if right else -10.0 * len(option))
        return found

    return score


def write(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def test_cmmlu_and_ceval_layouts_are_read_by_their_header(tmp_path: Path) -> None:
    cmmlu = write(tmp_path / "anatomy.csv", [["", "Question", *"ABCD", "Answer"], ["0", "问？", *"甲乙丙丁", "C"]])
    ceval = write(
        tmp_path / "basic.csv",
        [["id", "question", *"ABCD", "answer", "explanation"], ["0", "问？", *"甲乙丙丁", "C", ""]],
    )
    for path in (cmmlu, ceval):
        (item,) = read_exam(path)
        assert item.stem == "问？"
        assert item.options == {"A": "甲", "B": "乙", "C": "丙", "D": "丁"}
        assert item.answer == frozenset("C")
        assert item.subject == path.stem


def test_cmexams_listed_options_and_several_answers_are_read(tmp_path: Path) -> None:
    options = "A 极高的效率\nB 特异性\nC 可调节\nD 不稳定\nE 都对\n续行"
    path = write(tmp_path / "cmexam.csv", [["Question", "Options", "Answer"], ["问？", options, "ACE"]])
    (item,) = read_exam(path)
    assert item.options["A"] == "极高的效率"
    assert item.options["E"] == "都对续行"
    assert item.answer == frozenset("ACE")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["Stem", "A"], ["x", "y"]], "columns Question and Answer"),
        ([["Question", "A", "B", "Answer"], ["x", "y", "z", "D"]], r"x\.csv, record at line 2: answer 'D'"),
        ([["Question", "A", "B", "Answer"]], r"x\.csv: no usable record"),
    ],
)
def test_a_file_that_is_no_exam_is_refused_with_its_line(tmp_path: Path, rows: list[list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_exam(write(tmp_path / "x.csv", rows))


def test_a_model_that_knows_scores_one_and_one_that_likes_short_options_scores_a_quarter(tmp_path: Path) -> None:
    write_demo(tmp_path, 0, DemoSizes(1, 10, 2, 5, 2, 5, 5))
    items = read_exam(tmp_path / "exam.csv")
    answers = {item.stem: item.options[next(iter(item.answer))] for item in items}
    known = take_exam(items, codec(), knows(answers))
    assert known.micro == known.macro == 1.0
    assert not known.constant_letter
    ignorant = take_exam(items, codec(), lambda pairs: [-float(len(option)) for _, option in pairs])
    assert 0.15 <= ignorant.micro <= 0.35
    assert set(known.by_subject) == {"examination", "treatment", "risk_group", "alternative", "red_flag", "sign"}


def test_sum_prefers_the_shorter_option_and_mean_does_not() -> None:
    def per_token(pairs: Sequence[tuple[Ids, Ids]]) -> list[float]:
        return [-1.0 * len(o) if text_of(o) == "乙乙" else -1.5 * len(o) for _, o in pairs]

    assert take_exam([ITEM], codec(), per_token, normalize="sum").micro == 0.0
    assert take_exam([ITEM], codec(), per_token, normalize="mean").micro == 1.0


def test_letter_style_lists_the_options_and_scores_letters() -> None:
    def score(pairs: Sequence[tuple[Ids, Ids]]) -> list[float]:
        assert all("B. 乙乙" in text_of(prompt) for prompt, _ in pairs)
        return [0.0 if text_of(option) == "B" else -1.0 for _, option in pairs]

    assert take_exam([ITEM], codec(), score, style="letter").micro == 1.0


def test_several_answers_count_only_when_the_set_is_exact() -> None:
    item = ExamItem("s", "问？", {"A": "甲", "B": "乙", "C": "丙", "D": "丁"}, frozenset("AC"))
    high = {"甲": 0.0, "丙": -0.1, "乙": -5.0, "丁": -6.0}
    assert take_exam([item], codec(), lambda pairs: [high[text_of(o)] for _, o in pairs]).several_answers.accuracy == 1
    one = {**high, "丙": -5.0}
    assert take_exam([item], codec(), lambda pairs: [one[text_of(o)] for _, o in pairs]).several_answers.accuracy == 0


def test_micro_weighs_items_and_macro_subjects() -> None:
    # the C-Eval rows of two systems: 11 of 22 and 12 of 19 right are 56.10 over items and 56.58 over subjects
    items = [ExamItem(subject, "问", {"A": "甲", "B": "乙"}, frozenset("A")) for subject in ["c"] * 22 + ["b"] * 19]
    chosen = [frozenset("A" if place < right else "B") for right, size in ((11, 22), (12, 19)) for place in range(size)]
    result = report(items, chosen)
    assert round(result.micro * 100, 2) == 56.10
    assert round(result.macro * 100, 2) == 56.58


def test_a_constant_letter_is_flagged() -> None:
    assert report([ITEM, ITEM], [frozenset("A"), frozenset("A")]).constant_letter


def test_a_nan_or_a_missing_score_is_an_error() -> None:
    with pytest.raises(ValueError, match="NaN"):
        take_exam([ITEM], codec(), lambda pairs: [float("nan")] * 4)
    with pytest.raises(ValueError, match="3 values for 4"):
        take_exam([ITEM], codec(), lambda pairs: [0.0] * 3)
