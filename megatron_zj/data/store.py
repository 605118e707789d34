"""Units of token rows at rest: in memory, or in shards on disk that are mapped, not loaded.

On disk a row is a document of megatron-core's IndexedDataset and its spans (context, target, context ...) are the
document's sequences, so the loss mask needs no file of its own.  ``X.units.npy`` says which rows form a unit, their
ranks, and which record of the input each came from.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from numpy.typing import NDArray
from torch import Tensor

from megatron_zj.data.errors import DataError
from megatron_zj.data.rows import Unit

UNITS_SUFFIX = ".units.npy"
_UNIT, _RANK, _RECORD = 0, 1, 2  # columns of X.units.npy: [rows, 3] int64
_HEADER = struct.Struct("<9sQBQQ")  # of an index: magic, version, code of the ids' type, sequences, documents + 1
_MAGIC = (b"MMIDIDX\0\0", 1)
_BAD_INDEX = "{}.idx is not a readable index: {}\n  -> prepare the data again"


@dataclass(frozen=True)
class StoredRow:
    """One row as tensors."""

    tokens: Tensor  # [T] int64
    loss_mask: Tensor  # [T] int64: 1 on targets
    prompt_length: int  # tokens of the first span
    rank: int


class UnitStore(Protocol):
    """Units by index."""

    @property
    def num_units(self) -> int:
        """How many units."""

    @property
    def checksum(self) -> str:
        """Of the content: a resumed run must meet the same units."""

    def unit(self, index: int) -> list[StoredRow]:
        """The rows of one unit."""

    def record(self, index: int) -> int:
        """The number of the input record the unit came from."""

    def origin(self, index: int) -> str:
        """Where the unit came from, for messages."""


class MemoryStore:
    """Units held in memory as flat arrays: 4 bytes a token."""

    def __init__(self, units: Iterable[tuple[Unit, int, str]]) -> None:
        """``units``: with the number of their record and its place in the input."""
        tokens: list[NDArray[np.int32]] = []
        self._spans: list[tuple[tuple[int, ...], ...]] = []
        self._ranks: list[tuple[int, ...]] = []
        self._records: list[int] = []
        self._origins: list[str] = []
        starts = [0]
        digest = hashlib.sha256()
        for unit, record, origin in units:
            ids = np.array([i for row in unit.rows for span in row for i in span.ids], dtype=np.int32)
            lengths = tuple(tuple(len(span.ids) for span in row) for row in unit.rows)
            digest.update(repr((lengths, unit.ranks)).encode() + ids.tobytes())
            tokens.append(ids)
            self._spans.append(lengths)
            self._ranks.append(unit.ranks)
            self._records.append(record)
            self._origins.append(origin)
            starts.append(starts[-1] + ids.size)
        self._tokens = np.concatenate(tokens) if tokens else np.zeros(0, np.int32)
        self._starts = starts
        self._checksum = digest.hexdigest()

    @property
    def num_units(self) -> int:
        return len(self._ranks)

    @property
    def checksum(self) -> str:
        return self._checksum

    def unit(self, index: int) -> list[StoredRow]:
        rows = []
        start = self._starts[index]
        for lengths, rank in zip(self._spans[index], self._ranks[index], strict=True):
            end = start + sum(lengths)
            rows.append(_row(self._tokens[start:end], lengths, rank))
            start = end
        return rows

    def record(self, index: int) -> int:
        return self._records[index]

    def origin(self, index: int) -> str:
        return self._origins[index]


class ShardStore:
    """Units of the shards of a prepared folder, in order.  Tokens stay on disk until a unit is asked for."""

    def __init__(self, prefixes: Sequence[Path], checksum: str) -> None:
        self._prefixes = list(prefixes)
        self._shards = [open_indexed(prefix) for prefix in prefixes]
        tables = [_load_units(prefix) for prefix in prefixes]
        self._tables = tables
        self._first_rows = [np.flatnonzero(np.diff(table[:, _UNIT], prepend=-1)) for table in tables]
        self._ends = np.cumsum([rows.size for rows in self._first_rows])
        self._checksum = checksum

    @property
    def num_units(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def checksum(self) -> str:
        return self._checksum

    def unit(self, index: int) -> list[StoredRow]:
        shard, local = self._locate(index)
        firsts, table = self._first_rows[shard], self._tables[shard]
        last = int(firsts[local + 1]) if local + 1 < firsts.size else table.shape[0]
        return [self._stored_row(shard, row) for row in range(int(firsts[local]), last)]

    def record(self, index: int) -> int:
        shard, local = self._locate(index)
        return int(self._tables[shard][self._first_rows[shard][local], _RECORD])

    def origin(self, index: int) -> str:
        shard, _ = self._locate(index)
        return f"{self._prefixes[shard]}, record {self.record(index)}"

    def _locate(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)

    def _stored_row(self, shard: int, row: int) -> StoredRow:
        dataset = self._shards[shard]
        first, last = (int(i) for i in dataset.document_indices[row : row + 2])
        lengths = tuple(int(n) for n in dataset.sequence_lengths[first:last])
        ids = read_tokens(dataset, int(dataset.index.sequence_pointers[first]), sum(lengths))
        return _row(ids, lengths, int(self._tables[shard][row, _RANK]))


def write_shard(prefix: Path, units: Sequence[tuple[Unit, int]], vocab_size: int) -> None:
    """Write units (each with the number of its record) as ``prefix``.bin, .idx and .units.npy."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    table = []
    try:
        for number, (unit, record) in enumerate(units):
            for row, rank in zip(unit.rows, unit.ranks, strict=True):
                ids = [token_id for span in row for token_id in span.ids]
                builder.add_document(torch.tensor(ids), [len(span.ids) for span in row])
                table.append((number, rank, record))
        builder.finalize(f"{prefix}.idx")
    finally:
        builder.data_file.close()
    np.save(f"{prefix}{UNITS_SUFFIX}", np.array(table, dtype=np.int64).reshape(-1, 3), allow_pickle=False)


def open_indexed(prefix: Path) -> IndexedDataset:
    """An indexed dataset, mapped.

    Raises DataError when a file is missing or cut short, or the index is none or does not describe the ids one
    sequence after the other, as every reader here takes them.
    """
    for suffix in (".bin", ".idx"):
        if not os.path.isfile(f"{prefix}{suffix}"):
            raise DataError(f"{prefix}{suffix} is missing\n  -> prepare the data again (zj prepare)")
    if problem := _header_problem(Path(f"{prefix}.idx")):
        raise DataError(_BAD_INDEX.format(prefix, problem))
    size = os.path.getsize(f"{prefix}.bin")
    try:
        dataset = IndexedDataset(str(prefix), mmap=size > 0)
    except (AssertionError, ValueError, OSError) as error:
        problem = str(error) or "its documents do not end with its sequences"
        raise DataError(_BAD_INDEX.format(prefix, problem)) from error
    lengths, documents = dataset.sequence_lengths, dataset.document_indices
    item = np.dtype(dataset.index.dtype).itemsize
    ends = np.cumsum(lengths, dtype=np.int64)
    expected = int(ends[-1]) * item if ends.size else 0
    if size != expected:
        raise DataError(
            f"{prefix}.bin has {size} bytes where its index expects {expected}\n"
            "  -> the file was damaged or cut short: prepare the data again"
        )
    in_order = lengths.min(initial=0) >= 0 and np.array_equal(dataset.index.sequence_pointers, (ends - lengths) * item)
    if not in_order or documents[0] != 0 or np.diff(documents).min(initial=0) < 0:
        raise DataError(_BAD_INDEX.format(prefix, "its sequences or documents do not follow each other"))
    return dataset


def _header_problem(path: Path) -> str | None:
    """Why a file cannot be megatron-core's index of token ids; None: it begins as one and is as long as it says."""
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return f"it ends within its header, after {len(header)} bytes"
    *magic, code, sequences, documents = _HEADER.unpack(header)
    if tuple(magic) != _MAGIC:
        return "it does not begin as one"
    if code not in {kind.value for kind in DType} or not np.issubdtype(DType.dtype_from_code(code), np.integer):
        return f"its ids are no integers (type {code})"
    expected, size = _HEADER.size + 12 * sequences + 8 * documents, path.stat().st_size
    if documents == 0 or size != expected:
        return f"it has {size} bytes where its header announces {expected}"
    return None


def read_tokens(dataset: IndexedDataset, pointer: int, count: int) -> NDArray[Any]:
    """``count`` ids from byte ``pointer`` on."""
    return np.asarray(dataset.bin_reader.read(dtype=dataset.index.dtype, count=count, offset=pointer))


def _load_units(prefix: Path) -> NDArray[np.int64]:
    path = Path(f"{prefix}{UNITS_SUFFIX}")
    if not path.is_file():
        raise DataError(f"{path} is missing\n  -> prepare the data again (zj prepare)")
    table: NDArray[np.int64] = np.load(path, mmap_mode="r", allow_pickle=False)
    return table


def _row(ids: NDArray[Any], lengths: Sequence[int], rank: int) -> StoredRow:
    mask = np.repeat(np.arange(len(lengths)) % 2, lengths)
    return StoredRow(torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(mask.astype(np.int64)), lengths[0], rank)
