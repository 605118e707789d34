"""Files as users have them, damaged in every usual way: each command names the file, and the line, on one screen."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.cli.commands import Outcome, zj
from tests.cli.conftest import train_argv

GOOD = [
    json.dumps({"instruction": f"头痛{number}天。", "output": "多休息。"}, ensure_ascii=False) for number in range(12)
]
LINES = "\n".join(GOOD).encode()
TABLE = "instruction,output\n" + "".join(f"头痛{number}天。,多休息。\n" for number in range(12))
HALF = b'\n{"instruction": "\\ud83d", "output": "a"}\n'


def _parquet(*rows: dict[str, str | None]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    schema = pyarrow.schema([("instruction", pyarrow.string()), ("output", pyarrow.string())])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema=schema), sink)
    return sink.getvalue().to_pybytes()


WHOLE: dict[str, bytes] = {
    "mark.csv": TABLE.encode("utf-8-sig"),
    "windows.csv": TABLE.replace("\n", "\r\n").encode("gb18030"),
    "windows.jsonl": LINES.replace(b"\n", b"\r\n"),
    "long.jsonl": LINES + b'\n{"instruction": "a", "output": "' + "休息。".encode() * 350_000 + b'"}',
}
BAD: dict[str, tuple[bytes, str]] = {
    "empty.csv": (b"", " is empty"),
    "header.csv": (b"instruction,output\n", " holds no record"),
    "twice.csv": (b"output,instruction,output\na,b,c\n", ", line 1: two columns are called 'output'"),
    "quote.csv": (TABLE.encode() + b'"a,b\n', ", line 14: "),
    "short.csv": (TABLE.encode() + b"a\n", ", record at line 14: 1 cells under 2 column names"),
    "comma.jsonl": (LINES.replace(b"\n", b",\n"), ", record at line 1: the line is not JSON (Extra data"),
    "half.jsonl": (LINES + HALF, ", record at line 13, field 'instruction': half of a character"),
    "utf16.jsonl": (LINES.decode().encode("utf-16"), " is neither UTF-8 nor GB18030 text"),
    "brackets.jsonl": (LINES + b"\n" + b"[" * (1 << 20), ", record at line 13: the line is JSON beyond all measure"),
    "brackets.json": (b"[" * (1 << 20), ", line 1: maximum recursion depth exceeded"),
    "two.json": (f"[{GOOD[0]}]\n[{GOOD[1]}]".encode(), ", line 2: there is more after the end of the JSON value"),
    "zero.jsonl.gz": (b"", " is empty"),
    "nothing.jsonl.gz": (gzip.compress(b""), " holds no record"),
    "cut.jsonl.gz": (gzip.compress(LINES)[:-12], " is no complete gzip file"),
    "nulls.parquet": (
        _parquet({"instruction": "a", "output": "b"}, {"instruction": "a", "output": None}),
        ", record at line 2, field 'output': expected text, found NoneType",
    ),
    "cut.parquet": (_parquet({"instruction": "a", "output": "b"})[:-9], " is no readable parquet file"),
    "packed.parquet.gz": (gzip.compress(_parquet()), ": parquet is compressed inside and not read from .gz"),
}
OTHERS = ("train", "generate", "evaluate", "tokenizer")  # read as zj prepare does, with their own ends
EVERYWHERE = ("comma.jsonl", "half.jsonl", "cut.jsonl.gz")
DAMAGED = [("prepare", name) for name in BAD] + [(command, name) for command in OTHERS for name in EVERYWHERE]
RECORDS = ("short.csv", "half.jsonl", "brackets.jsonl")  # one bad record among good ones


def _run(command: str, world: Path, path: Path, **more: object) -> Outcome:
    out = path.parent / "out"
    data = {"data.files": f"[{path}]", **{name.replace("__", "."): value for name, value in more.items()}}
    words = [f"{key}={value}" for key, value in data.items()]
    source = [f"checkpoint.load={world / 'sft'}", f"run.dir={out}", "sampling.max_new_tokens=2"]
    if command == "train":
        return zj([*train_argv("sft", world, "unused"), *words, f"run.dir={out}", "run.num_steps=1"])
    if command == "prepare":
        tokenizer = [f"tokenizer.path={world / 'tokenizer'}", "data.max_length=256"]
        return zj(["prepare", *tokenizer, "data.kind=chat", *words, f"out={out}"])
    if command == "tokenizer":
        return zj(["tokenizer", "train", *words, "vocab_size=280", f"out={out}"])
    return zj([command, *source, *words, *(["suites=[dialogue]"] if command == "evaluate" else [])])


@pytest.mark.parametrize(("command", "name"), DAMAGED)
def test_a_damaged_file_is_told_by_name_and_line(world: Path, tmp_path: Path, command: str, name: str) -> None:
    content, complaint = BAD[name]
    path = tmp_path / name
    path.write_bytes(content)
    outcome = _run(command, world, path)
    assert outcome.code == 1
    assert f"error: {path}{complaint}" in outcome.error
    assert "loaded weights" not in outcome.output  # nobody waits for the model first


@pytest.mark.parametrize(
    ("command", "name"),
    [*(("prepare", name) for name in RECORDS), *((command, "half.jsonl") for command in OTHERS)],
)
def test_a_bad_record_is_left_out_and_counted_where_that_is_asked(
    world: Path, tmp_path: Path, command: str, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(BAD[name][0])
    outcome = _run(command, world, path, data__on_bad_record="skip")
    assert outcome.code == 0, outcome.output
    if command != "tokenizer":  # it sets up no log; Python itself prints the warning, but not under pytest
        assert "left out 1 bad" in outcome.output or "left out: 1 bad" in outcome.output


@pytest.mark.parametrize("name", WHOLE)
def test_a_mark_windows_line_ends_and_a_very_long_line_are_no_damage(world: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(WHOLE[name])
    outcome = _run("prepare", world, path)
    assert outcome.code == 0, outcome.output
    assert f"{13 if name == 'long.jsonl' else 12} records -> " in outcome.output
