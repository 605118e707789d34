"""Records of raw files as they are, for who needs their texts rather than ids: generation and evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import megatron_zj.data.formats  # noqa: F401  (registers the formats)
from megatron_zj.config.data import OnBadRecord
from megatron_zj.data.chat import check_order
from megatron_zj.data.errors import BadRecord, DataError
from megatron_zj.data.formats.reading import CONTAINERS, Item, is_known, read_items
from megatron_zj.data.formats.registry import choose_format, convert_item, raw_items
from megatron_zj.data.prepared import is_prepared
from megatron_zj.data.records import DialogueRecord, Kind, PromptRecord, Record

T = TypeVar("T")
_log = logging.getLogger(__name__)


def raw_files(names: Sequence[str]) -> list[str]:
    """The files that are meant: a folder stands for its files of known kinds, in the order of their names.

    Raises DataError at a folder that holds none, or that ``zj prepare`` wrote.
    """
    found: list[str] = []
    for name in names:
        folder = Path(name)
        inside = sorted(str(path) for path in folder.iterdir() if is_known(path)) if folder.is_dir() else [name]
        if is_prepared(folder):
            raise DataError(f"{folder} is a prepared folder\n  -> name the raw files it was made from")
        if not inside:
            raise DataError(f"{folder} holds no file of a known kind\n  -> such as {', '.join(CONTAINERS)}")
        found += inside
    return found


def usable(path: Path, items: Iterable[Item], convert: Callable[[Item], T], on_bad_record: OnBadRecord) -> Iterator[T]:
    """What ``convert`` makes of the raw records of a file.

    A record that cannot be used raises DataError with file and line, or is left out, counted and told.
    """
    left_out: list[DataError] = []
    for item in items:
        try:
            yield convert(item)
        except BadRecord as error:
            left_out.append(error.located(path, item.line))
            if on_bad_record == "error":
                raise left_out[0] from error
    if left_out:
        first = str(left_out[0]).splitlines()[0]
        _log.warning("left out %d bad records of %s, such as: %s", len(left_out), path, first)


def read_raw(
    files: Sequence[str], kind: Kind, form: str, on_bad_record: OnBadRecord, places: list[str] | None = None
) -> list[Record]:
    """The records of ``files`` in order, as ``kind`` (a dialogue read as a prompt loses its last answer).

    ``form``: a name of data/formats, or auto.  ``places`` takes file and line of each record.  Raises DataError at a
    record that cannot be used, or leaves it out, as ``on_bad_record`` says, and where no record is left.
    """
    found: list[Record] = []
    for path in map(Path, raw_files(files)):
        chosen = choose_format(path, form)

        def convert(item: Item, chosen: Any = chosen, path: Path = path) -> Record:
            record = convert_item(item, chosen, kind)
            if isinstance(record, PromptRecord | DialogueRecord):
                check_order(record.messages, "user" if isinstance(record, PromptRecord) else "assistant", record.source)
            if places is not None:
                places.append(f"{path}:{item.line}")
            return record

        found += usable(path, raw_items(path, chosen), convert, on_bad_record)
    if not found:
        raise DataError(f"no usable record in {', '.join(files)}\n  -> check the files and data.format")
    return found


def read_table(path: Path, convert: Callable[[dict[str, Any]], T], on_bad_record: OnBadRecord) -> list[T]:
    """What ``convert`` makes of the objects (or rows) of a file that has a layout of its own, such as an exam.

    Raises DataError with file and line as ``on_bad_record`` says, and where no record is left.
    """

    def checked(item: Item) -> T:
        if item.error is not None:
            raise item.error
        if not isinstance(item.value, dict):
            raise BadRecord(f"expected an object or a row under column names, found {type(item.value).__name__}")
        return convert(item.value)

    found = list(usable(path, read_items(path), checked, on_bad_record))
    if not found:
        raise DataError(f"{path}: no usable record\n  -> check that the file is what its name says")
    return found
