"""Prepared folders: shards, the tokenizer that made them, and a manifest, written last, that says so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_zj.data.errors import DataError
from megatron_zj.data.tokenizer import Tokenizer
from megatron_zj.runtime.files import write_json

MANIFEST = "manifest.json"
JOB = "job.json"
TOKENIZER = "tokenizer"
SHARDS = "shards"
VERSION = 1


@dataclass(frozen=True)
class ShardInfo:
    """One finished shard; also the sidecar whose existence means that the shard is whole."""

    name: str
    job: str  # identity of the preparation that wrote it
    counts: dict[str, Any]
    files: dict[str, dict[str, Any]]  # suffix -> {"bytes", "sha256"}; empty when the shard has no unit


@dataclass(frozen=True)
class PreparedManifest:
    """What a prepared folder holds."""

    version: int
    job: str
    kind: str
    conversion: dict[str, Any]
    tokenizer: str  # fingerprint
    vocab_size: int
    inputs: list[dict[str, Any]]  # path, bytes, sha256
    counts: dict[str, Any]
    shards: list[ShardInfo]


def write_manifest(folder: Path, manifest: PreparedManifest) -> None:
    """The last file of a preparation."""
    write_json(folder / MANIFEST, asdict(manifest))


def read_manifest(folder: Path) -> PreparedManifest:
    """The manifest of a finished preparation.  Raises DataError when there is none or it is no manifest."""
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder} is not a finished preparation ({MANIFEST} is missing)\n  -> run zj prepare again")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        shards = [ShardInfo(**shard) for shard in found.pop("shards")]
        manifest = PreparedManifest(**found, shards=shards)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is damaged: {error}\n  -> prepare the data again into another folder") from error
    if manifest.version != VERSION:
        raise DataError(f"{path} has version {manifest.version}, this program reads {VERSION}\n  -> prepare it again")
    return manifest


def open_prepared(folder: Path, kinds: Sequence[str], tokenizer: Tokenizer) -> tuple[PreparedManifest, list[Path]]:
    """The manifest and the prefixes of the shards that hold units.

    Raises DataError when the folder is of another kind or another tokenizer, or a shard's file has another size.
    """
    manifest = read_manifest(folder)
    if manifest.kind not in kinds:
        raise DataError(f"{folder} was prepared with data.kind={manifest.kind}, not {' or '.join(kinds)}")
    if manifest.tokenizer != tokenizer.fingerprint():
        raise DataError(
            f"{folder} was prepared with another tokenizer (checksum {manifest.tokenizer[:12]}, the run's is "
            f"{tokenizer.fingerprint()[:12]})\n  -> set tokenizer.path={folder / TOKENIZER}, or prepare the data again"
        )
    prefixes = []
    for shard in manifest.shards:
        prefix = folder / SHARDS / shard.name
        for suffix, info in shard.files.items():
            path = Path(f"{prefix}{suffix}")
            size = path.stat().st_size if path.is_file() else None
            if size != info["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes, not {info['bytes']}"
                raise DataError(f"{path} {found}\n  -> delete {prefix}.json and run zj prepare again")
        if shard.files:
            prefixes.append(prefix)
    return manifest, prefixes


def is_prepared(path: Path) -> bool:
    """Whether this is the folder of a preparation, finished or not."""
    return path.is_dir() and ((path / MANIFEST).is_file() or (path / JOB).is_file())
