"""Folders of raw files, and records whose texts are wanted rather than ids."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_zj.config.data import ChatConfig, PreferenceConfig, PromptsConfig, TokenizerConfig
from megatron_zj.data.chat import Message
from megatron_zj.data.errors import DataError
from megatron_zj.data.prepare import PrepareConfig, TextConfig, prepare
from megatron_zj.data.raw import raw_files, read_raw
from megatron_zj.data.records import PromptRecord
from megatron_zj.data.stream import build_stream
from megatron_zj.data.tokenizer import SentencePieceTokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "raw"
    (made / "older").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl", ".a.jsonl.swp", ".hidden.jsonl", "notes.md", "older/c.jsonl"):
        turns = [{"role": "user", "content": f"{name}怎么办？"}, {"role": "assistant", "content": "多休息。"}]
        (made / name).write_text(json.dumps({"messages": turns}, ensure_ascii=False) + "\n", encoding="utf-8")
    return made


def test_a_folder_stands_for_its_own_files_of_known_kinds_in_order(folder: Path) -> None:
    assert raw_files([str(folder), "x.csv"]) == [str(folder / "a.jsonl"), str(folder / "b.jsonl"), "x.csv"]
    asked = read_raw([str(folder)], "prompts", "auto", "error")
    assert asked == [PromptRecord((Message("user", f"{name}怎么办？"),)) for name in ("a.jsonl", "b.jsonl")]


def test_training_and_preparing_read_a_folder_as_its_files(
    folder: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    files = tuple(str(folder / name) for name in ("a.jsonl", "b.jsonl"))
    states = [build_stream(ChatConfig(files=names), tokenizer, 0).state_dict() for names in ((str(folder),), files)]
    assert states[0] == states[1]
    tokenizer.save(tmp_path / "tokenizer")
    made = [
        prepare(
            PrepareConfig(
                out=tmp_path / f"out{len(names)}",
                data=TextConfig(files=names),
                tokenizer=TokenizerConfig(path=tmp_path / "tokenizer"),
            )
        )
        for names in ((str(folder),), files)
    ]
    assert made[0] == made[1]
    assert [entry["path"] for entry in made[0].inputs] == list(files)
    with pytest.raises(DataError, match="out1 is a prepared folder"):
        raw_files([str(tmp_path / "out1")])


def test_a_folder_without_raw_files_is_named(folder: Path) -> None:
    (folder / "older" / "c.jsonl").rename(folder / "older" / "c.doc")
    with pytest.raises(DataError, match=rf"^{folder}/older holds no file of a known kind"):
        raw_files([str(folder / "older")])


@pytest.mark.parametrize(
    ("kind", "field", "last", "message"),
    [
        ("chat", "conversations", "human", "the dialogue ends without an answer"),
        ("prompts", "prompt", "assistant", "must end with a user turn"),
        ("prompts", "messages", "assistant", "must end with a user turn"),
        ("preference", "prompt", "assistant", "must end with a user turn"),
        ("preference", "messages", "assistant", "must end with a user turn"),
        ("prompts", "prompt[2].role", "assistant", "turn 3 is from 'assistant' where 'user' must speak"),
    ],
)
def test_turns_out_of_order_are_told_by_the_field_that_the_record_has(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, kind: str, field: str, last: str, message: str
) -> None:
    path = tmp_path / "x.jsonl"
    key, _, more = field.partition("[")
    said = ["头痛。", "多久了？", "三天。"][: 3 if last == "human" or more else 2]
    names = ("from", "value") if key == "conversations" else ("role", "content")
    roles = ("human", "gpt") if key == "conversations" else ("user", "assistant")
    speakers = [roles[number % 2] for number in range(len(said) - 1)] + [last]
    record = {key: [dict(zip(names, turn, strict=True)) for turn in zip(speakers, said, strict=True)]}
    record |= {"responses": ["好。", "坏。"]} if key == "messages" or kind == "preference" else {}
    path.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
    wanted = rf"^{path}, record at line 1, field '{re.escape(field)}': .*{message}"
    schema = {"chat": ChatConfig, "prompts": PromptsConfig, "preference": PreferenceConfig}[kind]
    with pytest.raises(DataError, match=wanted):
        build_stream(schema(files=(str(path),), max_length=64), tokenizer, 0)
    if kind != "preference":
        with pytest.raises(DataError, match=wanted):
            read_raw([str(path)], kind, "auto", "error")  # type: ignore[arg-type]
