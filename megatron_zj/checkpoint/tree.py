"""Nested Python state as JSON and safetensors: no pickle.

Dicts, lists, tuples, strings, numbers, booleans, None, dtypes and tensors come back as they went in, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from megatron_zj.checkpoint.errors import CheckpointError
from megatron_zj.checkpoint.files import FileRecord, read_json, write_bytes, write_json

_TAG = "__zj__"  # a dict with this key is not a dict but what the tag says


def save_tree(folder: Path, name: str, tree: Any) -> dict[str, FileRecord]:
    """Write ``tree`` as ``name.json`` and ``name.safetensors``; the records of both, by file name."""
    tensors: dict[str, Tensor] = {}
    encoded = encode(tree, tensors)
    blob = safetensors.torch.save(tensors)
    return {
        f"{name}.safetensors": write_bytes(folder / f"{name}.safetensors", blob),
        f"{name}.json": write_json(folder / f"{name}.json", encoded),
    }


def load_tree(folder: Path, name: str) -> Any:
    """What ``save_tree`` wrote.  CheckpointError names a missing or damaged file."""
    advice = "the checkpoint is incomplete, use another one"
    encoded = read_json(folder / f"{name}.json", advice)
    path = folder / f"{name}.safetensors"
    try:
        tensors = safetensors.torch.load(path.read_bytes())
        return decode(encoded, tensors)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; {advice}") from None
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} does not match {name}.json ({error}); {advice}") from None


def encode(value: Any, tensors: dict[str, Tensor], path: str = "state") -> Any:
    """``value`` as JSON types; tensors move into ``tensors`` by a name.  CheckpointError names what cannot be saved."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {_TAG: "tensor", "name": name}
    if isinstance(value, torch.dtype):
        return {_TAG: "dtype", "name": str(value).removeprefix("torch.")}
    if isinstance(value, list | tuple):
        items = [encode(item, tensors, f"{path}[{index}]") for index, item in enumerate(value)]
        return items if isinstance(value, list) else {_TAG: "tuple", "items": items}
    if isinstance(value, dict):
        pairs = [(encode(key, tensors, path), encode(item, tensors, f"{path}.{key}")) for key, item in value.items()]
        if all(isinstance(key, str) and key != _TAG for key in value):
            return dict(pairs)
        return {_TAG: "dict", "items": [list(pair) for pair in pairs]}
    raise CheckpointError(
        f"{path} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold; "
        "state_dict() must return dicts, lists, numbers, strings and tensors"
    )


def decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of ``encode``."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    match value.get(_TAG):
        case None:
            return {key: decode(item, tensors) for key, item in value.items()}
        case "tensor":
            return tensors[value["name"]]
        case "tuple":
            return tuple(decode(item, tensors) for item in value["items"])
        case "dict":
            return {decode(key, tensors): decode(item, tensors) for key, item in value["items"]}
        case "dtype":
            dtype = getattr(torch, value["name"])
            if isinstance(dtype, torch.dtype):
                return dtype
    raise ValueError(f"unknown tag {value.get(_TAG)!r}")


def fingerprint(tree: Any) -> str:
    """A hash of ``tree``, tensors included: equal on ranks whose state is equal."""
    tensors: dict[str, Tensor] = {}
    digest = hashlib.sha256(json.dumps(encode(tree, tensors), sort_keys=True).encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
