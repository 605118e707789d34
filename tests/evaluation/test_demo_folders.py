"""The demo's tools write over, and remove, what a demo wrote before, and nothing else."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
SMALL = [
    *("--documents-per-condition=1", "--sft=6", "--sft-validation=2", "--preference=4", "--preference-validation=2"),
    *("--prompts=3", "--cases=2"),
]


@pytest.fixture(scope="module")
def run_demo() -> dict[str, Any]:
    return runpy.run_path(str(TOOLS / "run_demo.py"))


@pytest.fixture
def demo(run_demo: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command, without the training: returns its exit code."""
    main = run_demo["main"]
    monkeypatch.setitem(main.__globals__, "Demo", lambda *_: SimpleNamespace(run=lambda others: True))
    return lambda *words: _code(main, monkeypatch, "run_demo.py", *words)


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch) -> Any:
    main = runpy.run_path(str(TOOLS / "prepare_demo.py"))["main"]
    return lambda *words: _code(main, monkeypatch, "prepare_demo.py", *SMALL, *words)


def _code(main: Any, monkeypatch: pytest.MonkeyPatch, *argv: object) -> int:
    monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
    try:
        return main() or 0
    except SystemExit as ended:
        return int(str(ended.code))


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("option", ["--miniature", "--fresh", "--seed=0"])
@pytest.mark.parametrize("name", ["thesis.txt", "data/sft.jsonl", "done/prepare", "demo.json"])
def test_a_folder_of_somebody_elses_is_refused_and_stays(
    demo: Any, tmp_path: Path, option: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / name, "thesis")
    assert demo("--folder", tmp_path, option) == 2
    assert contents(tmp_path) == {name: "thesis"}
    assert f"{tmp_path} is not a demo's folder" in capsys.readouterr().err
    assert demo("--folder", tmp_path / name, option) == 2  # a file


@pytest.mark.parametrize("was_older", [False, True])
def test_another_demo_in_the_same_folder_is_refused_before_anything_is_written(
    demo: Any, tmp_path: Path, was_older: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """``was_older``: a folder from before it had a file of settings."""
    if was_older:
        put(tmp_path / "done/prepare", json.dumps({"seed": 0, "miniature": False, "device": "cpu"}))
    else:
        assert demo("--folder", tmp_path) == 0
    put(tmp_path / "data/sft.jsonl", "of seed 0")
    before = contents(tmp_path)
    for other in ("--seed=1", "--miniature"):
        assert demo("--folder", tmp_path, other) == 2
        assert contents(tmp_path) == before
        assert "give another --folder, or --fresh to start over" in capsys.readouterr().err
    assert demo("--folder", tmp_path, "--seed=0") == 0
    assert demo("--folder", tmp_path, "--device=cuda") == 0  # the same data
    assert contents(tmp_path).items() >= before.items()


def test_starting_over_removes_what_the_demo_wrote_and_nothing_else(demo: Any, tmp_path: Path) -> None:
    assert demo("--folder", tmp_path) == 0
    for name in ("done/prepare", "data/sft.jsonl", "tokenizer/x", "ppo/x", "untrained/x", "report.html", "notes.txt"):
        put(tmp_path / name, "x")
    assert demo("--folder", tmp_path, "--fresh", "--seed=1") == 0
    left = contents(tmp_path)
    assert (set(left), json.loads(left["demo.json"])) == ({"demo.json", "notes.txt"}, {"seed": 1, "miniature": False})


def test_a_miniature_starts_over_in_a_miniatures_folder(demo: Any, tmp_path: Path) -> None:
    for seed in (0, 1):
        assert demo("--folder", tmp_path, "--miniature", f"--seed={seed}") == 0
        assert not (tmp_path / "done").exists()
        put(tmp_path / "done/prepare", "x")


@pytest.mark.parametrize("mine", ['{"messages": []}\n', '{"messages": []}'])
def test_demo_data_is_written_over_demo_data_alone(
    prepare: Any, tmp_path: Path, mine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    assert prepare("--to", data) == 0
    first = contents(data)
    assert prepare("--to", data, "--seed=1") == 0
    assert contents(data) != first
    with (data / "sft.jsonl").open("a", encoding="utf-8") as file:  # a record of the user's among ours
        file.write(mine)
    before = contents(data)
    assert prepare("--to", data) == 2
    assert f"{data / 'sft.jsonl'} is not, or not only, the demo's" in capsys.readouterr().err
    assert contents(data) == before


@pytest.mark.parametrize("name", ["README.md", "exam.csv", "tokenizer.txt", "sft.jsonl"])
def test_demo_data_does_not_replace_a_users_file(prepare: Any, tmp_path: Path, name: str) -> None:
    put(tmp_path / name, "mine")
    assert prepare("--to", tmp_path) == 2
    assert contents(tmp_path) == {name: "mine"}


def test_demo_data_wants_a_folder_and_counts(prepare: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = put(tmp_path / "file", "mine")
    for words, complaint in (
        (("--to", file), str(file)),
        (("--to", file / "data"), str(file)),
        (("--to", tmp_path / "data", "--sft=-4"), "must be a whole number >= 0, got '-4'"),
    ):
        assert prepare(*words) == 2
        assert complaint in capsys.readouterr().err
    assert contents(tmp_path) == {"file": "mine"}
