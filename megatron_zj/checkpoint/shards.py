"""A role's folder: megatron-core's ``torch_dist`` layout, written and read without its writer processes and pickles.

``<group>_<rank>.distcp`` holds tensors one after another, each as ``torch.save`` writes it; ``index.json`` says which
piece of which tensor lies where.  For megatron-core's and torch's own tools the same index is also written as
``.metadata`` (a pickle) with ``common.pt``; this package never opens those two.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_zj.checkpoint.errors import CheckpointError
from megatron_zj.checkpoint.files import FileRecord, HashingFile, read_json, write_bytes, write_json

INDEX = "index.json"
_CHECKED_AT_ONCE = 1 << 24  # values; the check's own memory stays small beside a large tensor
_ADVICE = "the checkpoint is damaged, use another one"


@dataclass(frozen=True)
class Place:
    """Where a piece lies."""

    file: str  # name inside the role's folder
    start: int  # bytes
    length: int  # bytes


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: ``offsets`` and ``sizes`` have one entry a dim of the whole tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Place


@dataclass
class StoredTensor:
    """A whole tensor as the index knows it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[Chunk] = field(default_factory=list)


@dataclass
class Index:
    """Everything in a role's folder."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    objects: dict[str, Place] = field(default_factory=dict)

    def merge(self, other: Index) -> None:
        """Add another rank's pieces."""
        for key, stored in other.tensors.items():
            mine = self.tensors.setdefault(key, StoredTensor(stored.dtype, stored.shape))
            mine.chunks.extend(stored.chunks)
        self.objects.update(other.objects)

    def to_json(self) -> dict[str, Any]:
        """JSON types, as in index.json."""
        return {
            "tensors": {
                key: {
                    "dtype": str(t.dtype).removeprefix("torch."),
                    "shape": list(t.shape),
                    "chunks": [
                        [list(c.offsets), list(c.sizes), c.place.file, c.place.start, c.place.length] for c in t.chunks
                    ],
                }
                for key, t in self.tensors.items()
            },
            "objects": {key: [p.file, p.start, p.length] for key, p in self.objects.items()},
        }

    @classmethod
    def from_json(cls, value: Any) -> Index:
        """The inverse of ``to_json``.  ValueError, KeyError or TypeError where ``value`` is not one."""
        index = cls()
        for key, item in value["tensors"].items():
            dtype = getattr(torch, item["dtype"])
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{item['dtype']} is no dtype")
            chunks = [Chunk(tuple(o), tuple(s), _place(*rest)) for o, s, *rest in item["chunks"]]
            index.tensors[key] = StoredTensor(dtype, tuple(item["shape"]), chunks)
        index.objects = {key: _place(*item) for key, item in value["objects"].items()}
        return index


def _place(file: str, start: int, length: int) -> Place:
    if "/" in file or "\\" in file or not file.endswith(".distcp"):
        raise ValueError(f"{file!r} is not a file of this folder")
    return Place(file, int(start), int(length))


class ShardWriter:
    """Writes one rank's pieces into the folder, one file a group of keys."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.index = Index()
        self._files: dict[str, HashingFile] = {}

    def add_tensor(
        self, group: str, key: str, tensor: Tensor, shape: Sequence[int], offsets: Sequence[int] | None = None
    ) -> None:
        """Append a box of ``key`` whose whole shape is ``shape``; ``tensor`` has as many dims."""
        tensor = tensor.detach().cpu()
        if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size() or not tensor.is_contiguous():
            tensor = tensor.clone(memory_format=torch.contiguous_format)  # torch.save writes the whole storage
        place = self._append(group, lambda file: torch.save(tensor, file))
        stored = self.index.tensors.setdefault(key, StoredTensor(tensor.dtype, tuple(shape)))
        stored.chunks.append(Chunk(tuple(offsets or [0] * tensor.ndim), tuple(tensor.shape), place))

    def add_object(self, group: str, key: str, data: Any) -> None:
        """Append a picklable object; it must load with ``weights_only``."""
        buffer = io.BytesIO()
        torch.save([data], buffer)  # a list of one: megatron-core's form
        try:
            torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"the state of {key} holds more than tensors and plain values: {error}") from None
        self.index.objects[key] = self._append(group, lambda file: file.write(buffer.getbuffer()))

    def _append(self, group: str, write: Any) -> Place:
        name = f"{group}_{self.rank:05d}.distcp"
        if name not in self._files:
            self._files[name] = HashingFile(self.folder / name)
        file = self._files[name]
        start = file.position
        try:
            write(file)
        except Exception:
            if file.error is not None:
                raise file.error from None  # torch's writer hides the cause
            raise
        return Place(name, start, file.position - start)

    def close(self) -> dict[str, FileRecord]:
        """Reach the disk; the records by file name."""
        return {name: file.close() for name, file in self._files.items()}

    def abort(self) -> None:
        """Close after an error, without a word."""
        for file in self._files.values():
            file.__exit__(CheckpointError, CheckpointError(""), None)


def write_index(folder: Path, index: Index) -> dict[str, FileRecord]:
    """index.json, and the same as torch's ``.metadata``."""
    metadata = Metadata(state_dict_metadata={}, planner_data={}, storage_data={}, version="1.0.0")
    for key, stored in index.tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in stored.chunks]
        properties = TensorProperties(dtype=stored.dtype)
        metadata.state_dict_metadata[key] = TensorStorageMetadata(properties, torch.Size(stored.shape), chunks)
        for number, chunk in enumerate(stored.chunks):
            info = _StorageInfo(chunk.place.file, chunk.place.start, chunk.place.length)
            metadata.storage_data[MetadataIndex(key, chunk.offsets, number)] = info
    for key, place in index.objects.items():
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex(key)] = _StorageInfo(place.file, place.start, place.length)
    return {
        INDEX: write_json(folder / INDEX, index.to_json()),
        ".metadata": write_bytes(folder / ".metadata", pickle.dumps(metadata)),
    }


def write_foreign_common(folder: Path, common: Any) -> dict[str, FileRecord]:
    """``common.pt`` and ``metadata.json``: what megatron-core's own loader wants to see."""
    buffer = io.BytesIO()
    torch.save(common, buffer)
    config = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    return {
        "common.pt": write_bytes(folder / "common.pt", buffer.getvalue()),
        "metadata.json": write_json(folder / "metadata.json", config),
    }


class ShardReader:
    """Reads boxes of tensors from a role's folder, opening only what is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.index = Index.from_json(read_json(folder / INDEX, _ADVICE))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{folder / INDEX} is malformed ({error}); {_ADVICE}") from None
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def read_box(self, key: str, target: Tensor, offsets: Sequence[int]) -> None:
        """Fill ``target`` (as many dims as the whole tensor) from the box of ``key`` that starts at ``offsets``.

        Raises CheckpointError for NaN or Inf, a gap, or a file that is not what the index says.
        """
        filled = 0
        for chunk in self.index.tensors[key].chunks:
            starts = [max(a, b) for a, b in zip(offsets, chunk.offsets, strict=True)]
            ends = [
                min(a + n, b + m) for a, n, b, m in zip(offsets, target.shape, chunk.offsets, chunk.sizes, strict=True)
            ]
            if any(a >= b for a, b in zip(starts, ends, strict=True)):
                continue
            piece = self._load_chunk(chunk, key)
            box = piece[_box(starts, ends, chunk.offsets)]
            require_finite(key, box, str(self.folder / chunk.place.file))
            target[_box(starts, ends, offsets)].copy_(box)
            filled += box.numel()
        if filled != target.numel():
            raise CheckpointError(f"{self.folder / INDEX}: {key} has {filled} of {target.numel()} values; {_ADVICE}")

    def read_whole(self, key: str, layer: int | None = None) -> Tensor:
        """The whole tensor; with ``layer``, the slice of a tensor that is stacked over layers in dim 0."""
        stored = self.index.tensors[key]
        shape, offsets = list(stored.shape), [0] * len(stored.shape)
        if layer is not None:
            shape[0], offsets[0] = 1, layer
        whole = [c for c in stored.chunks if list(c.sizes) == shape and list(c.offsets) == offsets]
        if whole:  # as it lies, without a copy
            piece = self._load_chunk(whole[0], key)
            require_finite(key, piece, str(self.folder / whole[0].place.file))
            return piece if layer is None else piece[0]
        target = torch.empty(shape, dtype=stored.dtype)
        self.read_box(key, target, offsets)
        return target if layer is None else target[0]

    def read_object(self, key: str) -> Any:
        """The object of a unique key."""
        return self._load(self.index.objects[key], key)[0]

    def _load_chunk(self, chunk: Chunk, key: str) -> Tensor:
        piece = self._load(chunk.place, key)
        if not isinstance(piece, Tensor) or tuple(piece.shape) != chunk.sizes:
            raise CheckpointError(f"{self.folder / chunk.place.file} does not hold {key} as indexed; {_ADVICE}")
        return piece

    def _load(self, place: Place, key: str) -> Any:
        path = self.folder / place.file
        try:
            if place.file not in self._files:
                self._files[place.file] = open(path, "rb")  # noqa: SIM115  closed by __exit__
            part = _FilePart(self._files[place.file], place.start, place.length)
            return torch.load(cast(IO[bytes], part), map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing; {_ADVICE}") from None
        except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{path} is damaged at {key} ({error}); {_ADVICE}") from None


class _FilePart(io.RawIOBase):
    """A part of an open file as a file of its own, so that torch reads straight into the tensor's memory."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._position)]
        self._file.seek(self._start + self._position)
        count = self._file.readinto(view)  # type: ignore[attr-defined]
        self._position += count
        return int(count)


def _box(starts: Iterable[int], ends: Iterable[int], origin: Iterable[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(starts, ends, origin, strict=True))


def require_finite(key: str, tensor: Tensor, where: str) -> None:
    """CheckpointError where ``tensor`` holds NaN or Inf."""
    if not tensor.is_floating_point():
        return
    flat = tensor.reshape(-1)
    for part in torch.split(flat, _CHECKED_AT_ONCE):
        if bool(torch.isfinite(part).all()):
            continue
        raise CheckpointError(
            f"{where}: {key} holds NaN or Inf; a model in this state is of no use. Go back to an earlier checkpoint "
            "and look for the step whose loss or gradient norm exploded"
        )
