"""Prepared folders: shards, the tokenizer that made them, and a manifest, written last, that says so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_zj.data.errors import DataError
from megatron_zj.data.rows import Counts
from megatron_zj.data.tokenizer import Tokenizer
from megatron_zj.runtime.files import write_json

MANIFEST = "manifest.json"
JOB = "job.json"
TOKENIZER = "tokenizer"
SHARDS = "shards"
VERSION = 1
QUIET_SECONDS = 3.0  # a check that takes no longer shows no bar


@dataclass(frozen=True)
class ShardInfo:
    """One finished shard; also the sidecar whose existence means that the shard is whole."""

    name: str
    job: str  # identity of the preparation that wrote it
    counts: dict[str, Any]
    files: dict[str, dict[str, Any]]  # suffix -> {"bytes", "sha256"}; empty when the shard has no unit

    @classmethod
    def of(cls, value: dict[str, Any]) -> ShardInfo:
        """From JSON.  Raises TypeError, LookupError or AttributeError where it is none."""
        shard = cls(**value)
        Counts(**shard.counts)
        if not all(isinstance(info["bytes"], int) and isinstance(info["sha256"], str) for info in shard.files.values()):
            raise TypeError("a file without its size and checksum")
        return shard


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
    """The last file of a preparation, with a checksum of all the rest of it."""
    body = asdict(manifest)
    write_json(folder / MANIFEST, {"checksum": _checksum_of(body), **body})


def read_manifest(folder: Path) -> PreparedManifest:
    """The manifest of a finished preparation.  Raises DataError when there is none or it is no manifest."""
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder} is not a finished preparation ({MANIFEST} is missing)\n  -> run zj prepare again")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version = found["version"]
        manifest = _checked(found) if version == VERSION else None
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise DataError(
            f"{path} is damaged: {error}\n  -> run the same zj prepare again, which keeps the shards and writes it anew"
        ) from error
    if manifest is None:
        raise DataError(f"{path} has version {version}, this program reads {VERSION}\n  -> prepare it again")
    return manifest


def _checked(found: dict[str, Any]) -> PreparedManifest:
    """From JSON.  Raises ValueError, TypeError, LookupError or AttributeError where it is not what was written."""
    written = found.pop("checksum", None)
    if written not in (None, _checksum_of(found)):  # None: of an early preparation
        raise ValueError("its checksum does not match")
    shards = [ShardInfo.of(shard) for shard in found.pop("shards")]
    manifest = PreparedManifest(**found, shards=shards)
    if sum(shard.counts["units"] for shard in shards) != manifest.counts["units"]:
        raise ValueError("shards are missing from it")
    if not isinstance(manifest.tokenizer, str):
        raise TypeError("it names no tokenizer")
    return manifest


def _checksum_of(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


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
    for file in _files(folder, manifest):
        size = file.path.stat().st_size if file.path.is_file() else None
        if size != file.size:
            raise file.bad("is missing" if size is None else f"has {size} bytes, not {file.size}")
    return manifest, [folder / SHARDS / shard.name for shard in manifest.shards if shard.files]


def verify(folders: Iterable[Path], rank: int = 0, world_size: int = 1, *, progress: bool = False) -> None:
    """Read the shards' files and compare checksums: this rank's share of the files, largest first in turn.

    A flipped bit of a token is another token, which nothing else can see.  200 MB take 0.16 s of one core with SHA
    instructions from the page cache (1.3 GB/s), so a disk or network file system is what one waits for.  Raises
    DataError naming the first damaged file and what to do.  ``progress``: a bar where it takes seconds.
    """
    files = [file for folder in folders for file in _files(folder, read_manifest(folder))]
    mine = sorted(files, key=lambda file: -file.size)[rank::world_size]
    total = sum(file.size for file in mine)
    with tqdm(
        desc="checking data", total=total, unit="B", unit_scale=True, delay=QUIET_SECONDS, disable=not progress
    ) as bar:
        for file in mine:
            if not file.path.is_file() or checksum(file.path) != file.sha256:
                raise file.bad("is damaged or missing: it is not what zj prepare wrote")
            bar.update(file.size)


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class _File:
    """One file of a shard as the manifest has it."""

    path: Path
    size: int  # bytes
    sha256: str
    sidecar: Path

    def bad(self, found: str) -> DataError:
        """What to say of it."""
        return DataError(f"{self.path} {found}\n  -> delete {self.sidecar} and run the same zj prepare again")


def _files(folder: Path, manifest: PreparedManifest) -> Iterator[_File]:
    for shard in manifest.shards:
        prefix = folder / SHARDS / shard.name
        for suffix, info in shard.files.items():
            yield _File(Path(f"{prefix}{suffix}"), info["bytes"], info["sha256"], Path(f"{prefix}.json"))


def is_prepared(path: Path) -> bool:
    """Whether this is the folder of a preparation, finished or not."""
    return path.is_dir() and ((path / MANIFEST).is_file() or (path / JOB).is_file())
