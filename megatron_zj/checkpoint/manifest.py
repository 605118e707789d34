"""manifest.json: what a checkpoint is and what every file in it must look like.  It is written last."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

from megatron_zj.checkpoint.errors import CheckpointError
from megatron_zj.checkpoint.files import FileRecord, read_json, record_of, write_json
from megatron_zj.config.model import HeadKind, ModelConfig, RopeScalingConfig
from megatron_zj.data.tokenizer import Tokenizer, load_tokenizer
from megatron_zj.runtime.files import fsync

MANIFEST = "manifest.json"
SAVING = ".saving"  # in the folder of a save that has not ended: without it and without a manifest, one was lost
FORMAT = "megatron_zj checkpoint"
FORMAT_VERSION = 1
TOKENIZER = "tokenizer"  # folder of the tokenizer inside a checkpoint
_USE_ANOTHER = "use another checkpoint (an earlier step_* folder beside it), or copy this one again from its source"


@dataclass(frozen=True)
class ManifestInfo:
    """What the run adds to every manifest it writes."""

    config: Mapping[str, Any]  # the resolved run configuration, JSON types
    tokenizer: Tokenizer | None = None  # saved into every checkpoint; its fingerprint is compared at load


@dataclass(frozen=True)
class RoleInfo:
    """One model in a checkpoint."""

    model: ModelConfig
    head: HeadKind
    has_optimizer: bool
    layout: Mapping[str, int]  # axis sizes it was written under; any other can read it

    def to_json(self) -> dict[str, Any]:
        """JSON types."""
        return {
            "model": dataclasses.asdict(self.model),
            "head": self.head,
            "has_optimizer": self.has_optimizer,
            "layout": dict(self.layout),
        }

    @classmethod
    def from_json(cls, value: Any) -> RoleInfo:
        """The inverse of ``to_json``."""
        shape = dict(value["model"])
        if shape.get("rope_scaling") is not None:
            shape["rope_scaling"] = RopeScalingConfig(**shape["rope_scaling"])
        if value["head"] not in get_args(HeadKind):
            raise ValueError(f"unknown head {value['head']!r}")
        return cls(ModelConfig(**shape), value["head"], bool(value["has_optimizer"]), dict(value["layout"]))


@dataclass(frozen=True)
class Manifest:
    """The whole of manifest.json."""

    step: int
    roles: Mapping[str, RoleInfo]
    files: Mapping[str, FileRecord]  # by path inside the checkpoint, with /
    config: Mapping[str, Any]
    tokenizer: str | None = None  # fingerprint
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""  # UTC, ISO 8601

    def to_json(self) -> dict[str, Any]:
        """JSON types, with a checksum of all the rest."""
        body = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "created": self.created,
            "versions": dict(self.versions),
            "tokenizer": self.tokenizer,
            "roles": {name: role.to_json() for name, role in self.roles.items()},
            "config": dict(self.config),
            "files": {name: dataclasses.asdict(record) for name, record in sorted(self.files.items())},
        }
        return {"checksum": _checksum(body), **body}


def pick_role(folder: Path, manifest: Manifest, wanted: str | None) -> str:
    """The role to use of a checkpoint: the one ``wanted``, else the only one, else the actor.  CheckpointError."""
    name = wanted or (next(iter(manifest.roles)) if len(manifest.roles) == 1 else "actor")
    if name not in manifest.roles:
        raise CheckpointError(f"{folder} has no role {name!r}; choose one of {', '.join(sorted(manifest.roles))}")
    return name


def new_manifest(
    step: int, roles: Mapping[str, RoleInfo], files: Mapping[str, FileRecord], info: ManifestInfo
) -> Manifest:
    """A manifest of now, by these versions."""
    fingerprint = info.tokenizer.fingerprint() if info.tokenizer else None
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return Manifest(step, roles, files, info.config, fingerprint, _versions(), created)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """The last act of a save: from here on the folder counts."""
    write_json(folder / MANIFEST, manifest.to_json())
    (folder / SAVING).unlink(missing_ok=True)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete checkpoint.  CheckpointError when it is absent, foreign, damaged or too new."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(not_a_checkpoint(folder))
    value = read_json(path, _USE_ANOTHER)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by megatron_zj: {_what_it_is(folder)}")
    if isinstance(number := value.get("format_version"), int) and number > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {number}, this program reads up to {FORMAT_VERSION}; "
            "install a newer megatron-zj"
        )
    checksum = value.pop("checksum", None)
    if checksum != _checksum(value):
        raise CheckpointError(f"{path} is damaged (its checksum does not match); {_USE_ANOTHER}")
    try:
        return Manifest(
            step=value["step"],
            roles={name: RoleInfo.from_json(role) for name, role in value["roles"].items()},
            files={name: FileRecord(**record) for name, record in value["files"].items()},
            config=value["config"],
            tokenizer=value["tokenizer"],
            versions=value["versions"],
            created=value["created"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} does not describe a model this version knows ({error}); it was written by megatron-zj "
            f"{value.get('versions', {}).get('megatron_zj')}"
        ) from None


def verify(folder: Path, manifest: Manifest, names: Iterable[str] | None = None, *, contents: bool = True) -> None:
    """Compare files (``names``, or all) with the manifest.  CheckpointError names the first that differs.

    ``contents``: their checksums too, not only their sizes.
    """
    for name in manifest.files if names is None else names:
        expected = manifest.files.get(name)
        path = folder / name
        if expected is None:
            raise CheckpointError(f"{path} is not listed in {MANIFEST}; {_USE_ANOTHER}")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {_USE_ANOTHER}")
        size = path.stat().st_size
        if size != expected.size:
            raise CheckpointError(
                f"{path} is truncated or changed: {size} bytes, {expected.size} expected; {_USE_ANOTHER}"
            )
        if contents and record_of(path).sha256 != expected.sha256:
            raise CheckpointError(f"{path} is damaged: its SHA-256 does not match {MANIFEST}; {_USE_ANOTHER}")


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> dict[str, FileRecord]:
    """Put the tokenizer into the checkpoint ``folder``, durably; what the manifest must list."""
    target = folder / TOKENIZER
    tokenizer.save(target)
    paths = sorted(target.iterdir())
    for path in (*paths, target):
        fsync(path)
    return {f"{TOKENIZER}/{path.name}": record_of(path) for path in paths}


def read_tokenizer(folder: Path, manifest: Manifest, special_tokens: Sequence[str] = ()) -> Tokenizer:
    """A checkpoint's tokenizer, and ``special_tokens``.  Its files are verified first: a changed one can be silent."""
    verify(folder, manifest, [name for name in manifest.files if name.startswith(f"{TOKENIZER}/")])
    return load_tokenizer(folder / TOKENIZER, special_tokens)


def not_a_checkpoint(folder: Path) -> str:
    """What stands in a place where no complete checkpoint is, and what to do about it."""
    return f"{folder} is no complete checkpoint of this framework: {_what_it_is(folder)}"


def _what_it_is(folder: Path) -> str:
    if not folder.exists():
        return "it does not exist; check the path"
    if folder.is_file():
        return "it is a file; give the checkpoint's folder"
    if (folder / "config.json").is_file() and not (folder / "roles").exists():
        return f"it looks like a Hugging Face folder; run: zj convert --from {folder} --to NEW_FOLDER"
    if (folder / ".metadata").is_file() or (folder / "latest_checkpointed_iteration.txt").is_file():
        return "it looks like a checkpoint of another Megatron; export it to Hugging Face there, then use zj convert"
    if (folder / "roles").exists():
        return f"it has no {MANIFEST}, so its save was interrupted; {_USE_ANOTHER}"
    if partial := sorted((*folder.glob("step_*"), *folder.glob("*/step_*")), key=lambda path: path.name):
        cut = f"{partial[-1]} has no {MANIFEST}, so its save was interrupted or its copy is not whole"
        return f"{cut}; run that training again, or copy the checkpoint again from its source"
    if (folder / "config.yaml").is_file() or not any(folder.iterdir()):
        what = "the folder of a run that saved no checkpoint" if any(folder.iterdir()) else "empty"
        return f"it is {what}; give a run that has ended, or one of its step_* folders"
    return f"it has no {MANIFEST}; give a step_* folder, or the checkpoints or run folder around it"


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name, distribution in (("torch", "torch"), ("megatron_core", "megatron-core"), ("megatron_zj", "megatron-zj")):
        try:
            versions[name] = version(distribution)
        except PackageNotFoundError:
            versions[name] = "not installed as a distribution"
    return versions
