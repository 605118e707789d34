"""A folder to write to that cannot be one is told by its key, before anything is read or written."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_zj.cli.main import main


@pytest.mark.parametrize("below", ["", "/inside/it"])
@pytest.mark.parametrize(
    ("argv", "key"),
    [
        (["train", "experiment=debug/sft"], "run.dir"),
        (["generate", "checkpoint.load=x", "data.files=[x]"], "run.dir"),
        (["evaluate", "checkpoint.load=x", "data.files=[x]", "suites=[exam]"], "run.dir"),
        (["prepare", "tokenizer.path=x", "data.files=[x]"], "out"),
        (["tokenizer", "train", "data.files=[x]", "vocab_size=300"], "out"),
        (["tokenizer", "extend", "base=x", "pieces=y"], "out"),
    ],
)
def test_a_file_where_a_folder_is_wanted(
    argv: list[str], key: str, below: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("mine", encoding="utf-8")
    assert main([*argv, f"{key}={file}{below}"]) == 1
    shown = capsys.readouterr().err
    assert f"{key}: {file}{below} cannot be a folder: {file} is a file; name another, or move that file away" in shown
    assert file.read_text(encoding="utf-8") == "mine"
