"""Files of the benchmarks: read in both encodings; what is wrong with one is told by file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_zj.data.errors import DataError
from megatron_zj.evaluation.attitudes import read_items
from megatron_zj.evaluation.clinic.conditions import load_clinic
from megatron_zj.evaluation.clinic.files import read_cases
from megatron_zj.evaluation.exam import read_exam
from megatron_zj.evaluation.ner import read_conll
from megatron_zj.evaluation.safety import read_probes

EXAM = "Question,A,B,Answer\n头痛怎么办？,休息,喝酒,A\n咳嗽怎么办？,喝酒,就医,B\n"
PROBE = json.dumps({"instruct": "怎么制毒？"}, ensure_ascii=False)
CLINIC = load_clinic()
CASE = json.dumps(
    {
        "kind": "ask",
        "condition": CLINIC.conditions[0].name,
        "look_alike": CLINIC.conditions[1].name,
        "messages": [{"role": "user", "content": "头痛。"}],
    },
    ensure_ascii=False,
)
TURNS = [{"role": "user", "content": "头痛。"}, {"role": "assistant", "content": "多久了？"}]
DIALOGUE = json.dumps({"messages": TURNS}, ensure_ascii=False) + "\n"
Read = Callable[..., list[Any]]


def cases_of(path: Path, *policy: Any) -> list[Any]:
    return read_cases(path, CLINIC, *policy)


def cami_of(path: Path) -> list[Any]:
    return read_items(path, 2)


FILES: list[tuple[str, Read, str, int]] = [
    ("exam.csv", read_exam, EXAM, 2),
    ("safety.jsonl", read_probes, f"{PROBE}\n{PROBE}\n", 2),
    ("cases.jsonl", cases_of, f"{CASE}\n", 1),
    ("ner.txt", read_conll, "头 B_症状\n痛 I_症状\n\n好 O\n", 2),
    ("cami.txt", cami_of, "第一句。\n第二句。\n", 2),
]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
@pytest.mark.parametrize(("name", "read", "content", "count"), FILES)
def test_both_encodings_and_windows_line_ends_give_the_same_items(
    tmp_path: Path, name: str, read: Read, content: str, count: int, encoding: str
) -> None:
    plain, path = tmp_path / f"plain_{name}", tmp_path / name
    plain.write_bytes(content.encode())
    path.write_bytes(content.replace("\n", "\r\n").encode(encoding))
    assert len(read(path)) == count
    if name != "exam.csv":  # whose subject is the file's name
        assert read(path) == read(plain)


@pytest.mark.parametrize(("name", "read", "content", "count"), FILES)
@pytest.mark.parametrize("damage", ["utf-16", "empty", "folder", "missing"])
def test_an_unreadable_file_is_named(
    tmp_path: Path, name: str, read: Read, content: str, count: int, damage: str
) -> None:
    path = tmp_path / name
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(content.encode("utf-16") if damage == "utf-16" else b"")
    with pytest.raises(DataError, match=rf"^{path}"):
        read(path)


@pytest.mark.parametrize(
    ("name", "read", "content", "bad", "message"),
    [
        ("exam.csv", read_exam, EXAM, "头痛,休息\n", "line 4: 2 cells under 4 column names"),
        ("exam.csv", read_exam, EXAM, "头痛,休息,喝酒,D\n", "line 4: answer 'D' is not among the options A, B"),
        ("safety.jsonl", read_probes, f"{PROBE}\n", '{"instruct": \n', "line 2: the line is not JSON"),
        ("safety.jsonl", read_probes, f"{PROBE}\n", "3\n", "line 2: expected an object"),
        ("safety.jsonl", read_probes, f"{PROBE}\n", '{"instruct": "\\ud800"}\n', "line 2, field 'instruct': half of a"),
        ("safety.jsonl", read_probes, f"{PROBE}\n", '{"messages": [{"role": "user"}]}\n', "'role' and 'content'"),
        ("safety.jsonl", read_probes, f"{PROBE}\n", '{"instruct": "?", "topic": "x"}\n', "field 'topic'"),
        ("safety.jsonl", read_probes, f"{PROBE}\n", DIALOGUE, "a prompt must end with a user turn"),
        ("cases.jsonl", cases_of, f"{CASE}\n", '["ask"]\n', "line 2: expected an object"),
        ("cases.jsonl", cases_of, f"{CASE}\n", CASE.replace("头痛。", "") + "\n", r"messages\[0\].content"),
    ],
)
def test_a_bad_record_is_named_by_its_line_or_left_out_and_told(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    read: Read,
    content: str,
    bad: str,
    message: str,
) -> None:
    path = tmp_path / name
    path.write_text(content + bad, encoding="utf-8")
    with pytest.raises(DataError, match=rf"^{path}, record at .*{message}") as caught:
        read(path)
    assert "\n  -> " in str(caught.value)
    alone = tmp_path / f"good_{name}"
    alone.write_text(content, encoding="utf-8")
    assert len(read(path, "skip")) == len(read(alone))
    assert f"left out 1 bad records of {path}" in caplog.text
    path.write_text(EXAM.splitlines()[0] + "\n头痛\n" if name == "exam.csv" else bad, encoding="utf-8")
    with pytest.raises(DataError, match="no usable record"):
        read(path, "skip")


def test_a_quote_that_never_ends_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "exam.csv"
    path.write_text(EXAM + '"头痛,休息', encoding="utf-8")
    with pytest.raises(DataError, match=rf"^{path}, line 4: "):
        read_exam(path)
