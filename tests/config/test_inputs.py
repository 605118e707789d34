"""Named files, before a run starts: they exist, and text for pre-training has been prepared."""

from __future__ import annotations

from pathlib import Path

from megatron_zj.data.prepared import JOB, MANIFEST
from tests.config.test_checks import config, errors


def test_named_files_must_exist(tmp_path: Path) -> None:
    run = config(
        data={"files": [str(tmp_path / "corpus"), str(tmp_path / "gone")]},
        tokenizer={"path": str(tmp_path / "tokenizer.model")},
        checkpoint={"load": str(tmp_path / "stage_one")},
    )
    for name in ("corpus.bin", "corpus.idx"):
        (tmp_path / name).touch()
    assert errors(run, files=True) == [
        f"data.files[1]: {tmp_path}/gone does not exist (nor .bin and .idx of that prefix); zj prepare makes them",
        f"tokenizer.path: {tmp_path}/tokenizer.model does not exist",
        f"checkpoint.load: {tmp_path}/stage_one does not exist",
    ]


def test_raw_text_in_place_of_a_corpus_is_told_how_to_be_prepared(tmp_path: Path) -> None:
    for name in ("text.jsonl", "raw/text.txt", f"prepared/{MANIFEST}", f"unfinished/{JOB}", "other/a.idx", "b.idx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = ("text.jsonl", "raw", "prepared", "unfinished", "other", "b")
    run = config(data={"files": [str(tmp_path / name) for name in names]})
    file, folder, half = errors(run, files=True)
    assert file == (
        f"data.files[0]: {tmp_path}/text.jsonl is raw text; prepare it: zj prepare data.files=[{tmp_path}/text.jsonl] "
        "tokenizer.path=... out=DIR, and name DIR here"
    )
    assert folder.startswith(f"data.files[1]: {tmp_path}/raw is a folder without prepared text; prepare it: zj prepare")
    assert half.startswith(f"data.files[5]: {tmp_path}/b does not exist (nor .bin and .idx")
    chat = config(
        algorithm={"kind": "sft"}, data={"kind": "chat", "max_length": 64, "files": [f"{tmp_path}/text.jsonl"]}
    )
    assert errors(chat, files=True) == []


def test_an_impossible_layout_hides_nothing_that_can_be_told_without_it(tmp_path: Path) -> None:
    run = config(
        world_size=8,
        parallel={"tp": 3},
        data={"files": [str(tmp_path / "gone")], "sequence_length": 513},
        tokenizer={"path": str(tmp_path / "tokenizer.model")},
    )
    found = [problem.partition(":")[0] for problem in errors(run, files=True)]
    assert found == ["parallel", "data.sequence_length", "data.files[0]", "tokenizer.path"]


def test_a_run_folder_whose_names_are_taken_by_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    (tmp_path / "config.yaml").mkdir()
    assert errors(config(run={"dir": str(tmp_path)}), files=True) == [
        f"run.dir: {tmp_path}/checkpoints cannot be a folder: {tmp_path}/checkpoints is a file; name another, or move "
        "that file away",
        f"run.dir: {tmp_path}/config.yaml is a folder where the run writes a file; move it away",
    ]
