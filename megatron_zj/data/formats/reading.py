"""Files to raw items: containers (json, jsonl, csv, tsv, txt, each also .gz; parquet) and encodings."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import pyarrow
import pyarrow.parquet

from megatron_zj.data.errors import BadRecord, DataError

CONTAINERS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
_CHUNK = 1 << 20
_MAX_CELL = 1 << 28  # characters of a csv cell; the default of 131,072 is less than a long record


@dataclass(frozen=True)
class Item:
    """One raw record, or what is wrong with it.  ``line`` is where it starts, from 1 (a parquet row: its number)."""

    line: int
    value: Any
    error: BadRecord | None = None


def container(path: Path) -> str:
    """The kind of file by its name, ``.gz`` taken off.  Raises DataError, listing the known ones."""
    *_, before, last = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    kind = before if last == ".gz" else last
    if kind not in CONTAINERS:
        raise DataError(
            f"{path}: unknown kind of file\n  -> rename or convert it to one of {', '.join(CONTAINERS)} (.gz)"
        )
    if kind == ".parquet" and last == ".gz":
        raise DataError(f"{path}: parquet is compressed inside and not read from .gz\n  -> gunzip it")
    return kind


def is_known(path: Path) -> bool:
    """Whether ``path`` is a file, not a hidden one, of a kind that can be read."""
    try:
        container(path)
    except DataError:
        return False
    return path.is_file() and not path.name.startswith(".")


def read_items(path: Path) -> Iterator[Item]:
    """The raw records of a structured file (all but ``.txt``).  Raises DataError when the file cannot be read."""
    kind = container(path)
    check_file(path)
    if kind == ".txt":
        raise DataError(f"{path}: records are wanted, and a .txt file holds plain text\n  -> give json, jsonl or csv")
    if kind == ".parquet":
        yield from _parquet_items(path)
    elif kind in (".csv", ".tsv"):
        yield from _csv_items(path, "," if kind == ".csv" else "\t")
    elif kind == ".jsonl" or _looks_like_lines(path):
        yield from _json_lines(path)
    else:
        yield from _json_document(path)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a text file with their numbers from 1, without line ends."""
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            yield number, line.rstrip("\r\n")


def check_file(path: Path) -> None:
    """Raises DataError when ``path`` is no file or is empty."""
    if not path.is_file():
        raise DataError(f"{path} {'is no file' if path.exists() else 'does not exist'}\n  -> check data.files")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty\n  -> remove it from data.files")


def open_text(path: Path) -> io.TextIOWrapper:
    """The file as text: UTF-8 (with or without a byte order mark) or else GB18030, decompressed where it is .gz."""
    return io.TextIOWrapper(_open_bytes(path), encoding=detect_encoding(path), errors="strict", newline="")


def detect_encoding(path: Path) -> str:
    """``utf-8-sig`` or ``gb18030``: the first that decodes the whole file.  Raises DataError when neither does.

    A few GB18030 words are valid UTF-8 by chance (the two bytes of each character look like one Greek or Coptic
    letter); a file of nothing but such words is taken for UTF-8.
    """
    failures = []
    for encoding in ("utf-8-sig", "gb18030"):
        problem = _undecodable(path, encoding)
        if problem is None:
            return encoding
        failures.append(f"{encoding}: {problem}")
    raise DataError(
        f"{path} is neither UTF-8 nor GB18030 text ({'; '.join(failures)})\n"
        "  -> convert it to UTF-8; of a file put together from several, convert each part before"
    )


def _undecodable(path: Path, encoding: str) -> str | None:
    """Why the file is not text in this encoding; None when it is."""
    decoder = codecs.getincrementaldecoder(encoding)()
    offset, lines = 0, 0
    try:
        with _open_bytes(path) as file:
            while chunk := file.read(_CHUNK):
                if "\0" in decoder.decode(chunk):
                    return f"a zero byte near offset {offset}, as in UTF-16 or a binary file"
                offset += len(chunk)
                lines += chunk.count(b"\n")
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        return f"{error.reason} in line {1 + lines + error.object[: error.start].count(10)}"
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is no complete gzip file: {error}\n  -> fetch or compress it again") from error
    return None


def _open_bytes(path: Path) -> BinaryIO:
    check_file(path)
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


def _looks_like_lines(path: Path) -> bool:
    """Whether a ``.json`` file holds one value a line: its first line that is not blank is a whole object."""
    with open_text(path) as file:
        first = next((line for line in file if line.strip()), "")
        if not first.lstrip().startswith("{"):
            return False
        try:
            json.loads(first)
        except (ValueError, RecursionError):
            return False
        return any(line.strip() for line in file) or not _is_mapping_of_records(json.loads(first))


def _json_lines(path: Path) -> Iterator[Item]:
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield Item(number, json.loads(line))
            except json.JSONDecodeError as error:
                yield Item(number, None, BadRecord(f"the line is not JSON ({error.msg} at column {error.colno})"))
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting without end
                yield Item(number, None, BadRecord(f"the line is JSON beyond all measure ({error})"))


def _json_document(path: Path) -> Iterator[Item]:
    """The elements of one array, the values of one object whose values are all objects, or one object."""
    with open_text(path) as file:
        text = file.read()
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] != "[":
        whole = _parse(path, text)
        values = list(whole.values()) if _is_mapping_of_records(whole) else [whole]
        yield from (Item(number, value) for number, value in enumerate(values, start=1))
        return
    decoder = json.JSONDecoder()
    position, line = start + 1, 1 + text.count("\n", 0, start + 1)
    while True:
        begin = _skip_space(text, position)
        line += text.count("\n", position, begin)
        if text[begin : begin + 1] == "]":
            return
        try:
            value, end = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError) as error:
            _refuse(path, line, error)
        yield Item(line, value)
        line += text.count("\n", begin, end)
        position = _skip_space(text, end)
        line += text.count("\n", end, position)
        if text[position : position + 1] not in (",", "]"):
            raise DataError(f"{path}, line {line}: expected ',' or ']' after a record\n  -> mend the JSON")
        position += text[position] == ","


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _parse(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        _refuse(path, 1, error)


def _refuse(path: Path, line: int, error: Exception) -> NoReturn:
    """A document that is no JSON; ``line``: where the value begins, when the error does not know better."""
    where, reason = f"line {line}", str(error)
    if isinstance(error, json.JSONDecodeError):
        where, reason = f"line {error.lineno}, column {error.colno}", error.msg
    raise DataError(f"{path}, {where}: {reason}\n  -> mend the JSON") from error


def _is_mapping_of_records(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(inner, dict) for inner in value.values())


def _csv_items(path: Path, delimiter: str) -> Iterator[Item]:
    csv.field_size_limit(_MAX_CELL)
    with open_text(path) as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            names = next(reader)
            twice = sorted({name for name in names if name and names.count(name) > 1})
            if twice:
                raise DataError(f"{path}, line 1: two columns are called {twice[0]!r}\n  -> rename or remove one")
            before = reader.line_num
            for cells in reader:
                line, before = before + 1, reader.line_num
                if not cells:
                    continue
                if len(cells) != len(names):
                    reason = f"{len(cells)} cells under {len(names)} column names ({', '.join(names)})"
                    yield Item(line, None, BadRecord(reason))
                else:
                    yield Item(line, dict(zip(names, cells, strict=True)))
        except (csv.Error, StopIteration) as error:
            where = f"{path}, line {max(reader.line_num, 1)}"
            raise DataError(f"{where}: {str(error) or 'no header'}\n  -> mend the quoting") from error


def _parquet_items(path: Path) -> Iterator[Item]:
    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield Item(number, value)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no readable parquet file: {error}\n  -> fetch or write it again") from error
