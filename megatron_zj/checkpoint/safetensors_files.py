"""Safetensors folders, a tensor at a time: neither reading nor writing ever holds a whole shard.

Format: https://github.com/huggingface/safetensors#format (8 bytes of header length, a JSON header, the bytes).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
from torch import Tensor

from megatron_zj.checkpoint.errors import CheckpointError
from megatron_zj.checkpoint.files import read_json, write_json
from megatron_zj.runtime.files import fsync, named

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_ADVICE = "download or copy the folder again"


@dataclass(frozen=True)
class Outgoing:
    """A tensor to be written; ``produce`` is called once, when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    produce: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFolder:
    """The tensors of ``model.safetensors``, or of the shards that the index names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}  # by tensor name
        if (folder / INDEX).is_file():
            index = read_json(folder / INDEX, _ADVICE)
            weight_map = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{folder / INDEX} has no weight_map of tensor names to files; {_ADVICE}")
            for name, file in weight_map.items():
                if not isinstance(file, str) or "/" in file or not file.endswith(".safetensors"):
                    raise CheckpointError(f"{folder / INDEX} names {file!r}, which is not a safetensors file beside it")
                self.files[name] = folder / file
        elif (folder / SINGLE).is_file():
            self.files = dict.fromkeys(list_tensors(folder / SINGLE), folder / SINGLE)
        else:
            raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}{_pickles(folder)}")

    def read(self, name: str) -> Tensor:
        """One tensor.  CheckpointError names a missing tensor or a damaged file."""
        if name not in self.files:
            raise CheckpointError(f"{self.folder} has no tensor {name}; {_ADVICE}")
        return read_tensor(self.files[name], name)


def _pickles(folder: Path) -> str:
    pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(pattern))]
    if not pickles:
        return "; give the folder that holds the weights"
    return (
        f"; {pickles[0]} is a pickle, which can run code when it is opened, and is refused. Save the model as "
        "safetensors where you trust it (transformers: save_pretrained(..., safe_serialization=True))"
    )


def list_tensors(path: Path) -> list[str]:
    """Names in one file."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({error}); {_ADVICE}") from None


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of one file, on the CPU."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or damaged at {name} ({error}); {_ADVICE}") from None
    if tensor.dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name} is {tensor.dtype}; only float32, float16 and bfloat16 can be imported")
    return tensor


def write_folder(folder: Path, tensors: Sequence[Outgoing], max_shard_bytes: int) -> None:
    """Write shards of at most ``max_shard_bytes`` (or one tensor) and, where there are several, the index."""
    shards: list[list[Outgoing]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(one.size for one in shards[-1]) + tensor.size > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard)
        weight_map.update(dict.fromkeys((tensor.name for tensor in shard), name))
    total = sum(tensor.size for tensor in tensors)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_file(path: Path, tensors: Sequence[Outgoing]) -> None:
    """One safetensors file, tensor by tensor."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + tensor.size
        header[tensor.name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with named(path), open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            data = tensor.produce()
            if tuple(data.shape) != tensor.shape or data.dtype != tensor.dtype:
                raise CheckpointError(f"{tensor.name} is {data.dtype} {tuple(data.shape)}, not as announced")
            file.write(memoryview(cast(Any, data.contiguous().reshape(-1).view(torch.uint8).numpy())))
            del data
        file.flush()
        os.fsync(file.fileno())
    fsync(path.parent)
