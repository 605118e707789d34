"""The registry of input formats, and the choice of one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_zj.config.loader import suggestion
from megatron_zj.data.errors import BadRecord, DataError
from megatron_zj.data.formats.reading import Item, check_file, container, read_items, read_lines
from megatron_zj.data.records import Kind, Record, derive

Lines = Iterable[tuple[int, str]]
_SAMPLE_LINES = 50  # lines of a text file that detection looks at
_SAMPLE_ITEMS = 20  # records that detection looks at, until one is good
_MAX_KEYS = 200  # characters of a record's keys in a message


@dataclass(frozen=True)
class Format:
    """One input format.

    ``matches`` decides ``auto`` from the first record (for text files: the first lines as one string); ``convert``
    makes the canonical record or raises BadRecord; ``items`` groups the lines of a text file into raw records.
    """

    name: str
    shape: str  # what a record looks like, for messages and documentation
    matches: Callable[[Any], bool]
    convert: Callable[[Any], Record]
    items: Callable[[Lines], Iterator[Item]] | None = None  # None: a structured file


def has_keys(*keys: str) -> Callable[[Any], bool]:
    """For ``matches``: an object with all these keys."""
    return lambda value: isinstance(value, dict) and all(key in value for key in keys)


FORMATS: dict[str, Format] = {}  # by name, in the order in which ``auto`` tries them


def register(item: Format) -> None:
    """Add a format; ``auto`` tries formats in the order of registration, so the specific come first."""
    if item.name in FORMATS or item.name == "auto":
        raise ValueError(f"format {item.name!r} is already registered")
    FORMATS[item.name] = item


def choose_format(path: Path, name: str) -> Format:
    """The format of a file: the one named, or with ``auto`` the first that matches its first good record."""
    is_text = container(path) == ".txt"
    check_file(path)
    fitting = [known for known in FORMATS.values() if (known.items is not None) == is_text]
    if name != "auto":
        if name not in FORMATS:
            raise DataError(f"data.format: no format {name!r}{suggestion(name, ['auto', *FORMATS])}")
        if FORMATS[name] not in fitting:
            raise DataError(
                f"{path}: format {name!r} does not read {container(path)} files\n"
                f"  -> for this file one of: {', '.join(known.name for known in fitting)}"
            )
        return FORMATS[name]
    return _detect(path, is_text, fitting)


def _detect(path: Path, is_text: bool, fitting: list[Format]) -> Format:
    """The format of the first record that one matches and converts, or else of the first that one matches."""
    matching: list[Format] = []
    unknown: list[Item] = []
    for item in _samples(path, is_text):
        known = next((form for form in fitting if item.error is None and form.matches(item.value)), None)
        if known is None:
            unknown.append(item)
        elif is_text or _converts(item, known):
            return known
        else:
            matching.append(known)
    if matching:
        return matching[0]
    if not unknown:
        raise DataError(f"{path} holds no record\n  -> remove it from data.files")
    first = next((item for item in unknown if item.error is None), unknown[0])
    where = f"{path}, record at line {first.line}"
    if first.error is not None:
        raise DataError(f"{where}: {first.error.reason}\n  -> correct the file: none of its first records can be read")
    shapes = "\n".join(f"     {form.name}: {form.shape}" for form in fitting)
    raise DataError(
        f"{where}: no format matches it ({_kind_of(first.value)}) or the records after it\n"
        f"  -> set data.format to one of\n{shapes}"
    )


def _converts(item: Item, form: Format) -> bool:
    try:
        convert_any(item, form)
    except BadRecord:
        return False
    return True


def _kind_of(value: Any) -> str:
    if not isinstance(value, dict):
        return f"a {type(value).__name__}"
    keys = ", ".join(map(str, value))
    return f"keys {keys}" if len(keys) <= _MAX_KEYS else f"{len(value)} keys {keys[:_MAX_KEYS]}..."


def _samples(path: Path, is_text: bool) -> Iterable[Item]:
    """What ``auto`` looks at: the first records, or the first lines of a text as one."""
    if is_text:
        return [Item(1, "\n".join(line for _, line in itertools.islice(read_lines(path), _SAMPLE_LINES)))]
    return itertools.islice(read_items(path), _SAMPLE_ITEMS)


def raw_items(path: Path, form: Format) -> Iterator[Item]:
    """The raw records of a file under a format."""
    if form.items is None:
        return read_items(path)
    check_file(path)
    return form.items(read_lines(path))


def convert_item(item: Item, form: Format, kind: Kind) -> Record:
    """The canonical record a stream of this kind needs.  Raises BadRecord."""
    return derive(convert_any(item, form), kind)


def convert_any(item: Item, form: Format) -> Record:
    """The canonical record of the format's own kind.  Raises BadRecord."""
    if item.error is not None:
        raise item.error
    try:
        return form.convert(item.value)
    except BadRecord:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        reason = f"the record is not shaped as {form.name}: {error}"
        if isinstance(error, KeyError):
            reason = f"the record has no {error}"
        elif item.value is None:
            reason = "the record is null"
        choice = "data.format chooses another, data.on_bad_record=skip leaves such records out"
        raise BadRecord(reason, hint=f"records of {form.name} are {form.shape}; {choice}") from error
