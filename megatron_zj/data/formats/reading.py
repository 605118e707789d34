"""Files to raw items: containers (json, jsonl, csv, tsv, txt, each also .gz; parquet) and encodings."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

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
    lines = 0
    try:
        with _open_bytes(path) as file:
            while chunk := file.read(_CHUNK):
                if "\0" in decoder.decode(chunk):  # in both encodings a zero byte is that character and nothing else
                    before = lines + chunk.count(b"\n", 0, chunk.index(b"\0"))
                    return f"a zero byte in line {1 + before}, as in UTF-16 or a binary file"
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
                yield Item(number, _DECODER.decode(line))
            except BadRecord as error:
                yield Item(number, None, error)
            except json.JSONDecodeError as error:
                yield Item(number, None, BadRecord(f"the line is not JSON ({error.msg} at column {error.colno})"))
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting without end
                yield Item(number, None, BadRecord(f"the line is JSON beyond all measure ({error})"))


def _json_document(path: Path) -> Iterator[Item]:
    """The elements of one array, the values of one object whose values are all objects, or one value."""
    with open_text(path) as file:
        text = file.read()
    document = _Document(path, text)
    if document.peek() == "[":
        yield from document.members("[", "]")
        return
    if document.peek() == "{":
        records = list(document.members("{", "}"))
        if records and all(isinstance(item.value, dict) or item.error for item in records):
            yield from records
            return
        document = _Document(path, text)
    yield document.item()
    document.end()


class _Document:
    """A JSON text, read value by value with the line of each.  What is not JSON raises DataError."""

    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._text = text
        self._position = 0
        self._line = 1

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        position = self._position
        while position < len(self._text) and self._text[position] in " \t\r\n":
            position += 1
        self._move(position)
        return self._text[position : position + 1]

    def item(self) -> Item:
        """The next value."""
        self.peek()
        line, value, problem = self._line, None, None
        try:
            try:
                value, end = _DECODER.raw_decode(self._text, self._position)
            except BadRecord as error:
                problem, (_, end) = error, json.JSONDecoder().raw_decode(self._text, self._position)
        except json.JSONDecodeError as error:
            raise _no_json(self._path, f"{error.lineno}, column {error.colno}", error.msg) from error
        except (ValueError, RecursionError) as error:
            raise _no_json(self._path, line, error) from error
        self._move(end)
        return Item(line, value, problem)

    def members(self, opening: str, closing: str) -> Iterator[Item]:
        """The elements of an array or the values of an object, which must be all there is."""
        self._take(opening)
        while self.peek() != closing:
            if opening == "{":
                name = self.item()
                if not isinstance(name.value, str):
                    raise _no_json(self._path, name.line, "a name in double quotes must stand before each value")
                self._take(":")
            yield self.item()
            if self.peek() != closing:
                self._take(",", closing)
        self._take(closing)
        self.end()

    def end(self) -> None:
        """Nothing may follow."""
        if self.peek():
            raise DataError(
                f"{self._path}, line {self._line}: there is more after the end of the JSON value\n"
                "  -> make one array of it all, or a .jsonl file with one record a line"
            )

    def _take(self, *wanted: str) -> None:
        if self.peek() not in wanted:
            expected = " or ".join(map(repr, wanted))
            raise _no_json(self._path, self._line, f"expected {expected}, found {self.peek() or 'the end'!r}")
        self._move(self._position + 1)

    def _move(self, position: int) -> None:
        self._line += self._text.count("\n", self._position, position)
        self._position = position


def _no_json(path: Path, line: int | str, reason: object) -> DataError:
    return DataError(f"{path}, line {line}: {reason}\n  -> mend the JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, where each key stands once: of two, json keeps the last and tells nobody."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise BadRecord(f"the key {twice!r} stands twice in one object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


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
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = _parquet_columns(path, file.schema_arrow)
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.select(columns).to_pylist():
                    number += 1
                    yield Item(number, value)
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no readable parquet file: {error}\n  -> fetch or write it again") from error
    except (ValueError, OverflowError) as error:  # of a time inside a list or struct
        where = f"{path}, in a row after {number}"
        raise DataError(f"{where}: {error}\n  -> leave out the column, or write it as text") from error


def _parquet_columns(path: Path, schema: pyarrow.Schema) -> list[int]:
    """All columns but times and dates: no format reads one, and not every one has a value in Python."""
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise DataError(f"{path}: two columns are called {twice[0]!r}\n  -> rename or remove one")
    return [place for place, field in enumerate(schema) if not pyarrow.types.is_temporal(field.type)]
