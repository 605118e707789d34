"""Where a run's weights come from, looked at before any model is built: a slip costs a second, not minutes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_zj.checkpoint.errors import CheckpointError, everywhere, gather, this_rank
from megatron_zj.checkpoint.load import files_of, newest, require_fit
from megatron_zj.checkpoint.manifest import Manifest, read_manifest, verify
from megatron_zj.checkpoint.retention import require_own_name
from megatron_zj.config import derived
from megatron_zj.config.loader import ConfigError
from megatron_zj.config.model import HeadKind, ModelConfig
from megatron_zj.config.run import RunConfig
from megatron_zj.data.stream import Stream


@dataclass(frozen=True)
class _Wanted:
    """A model that will be built."""

    model: ModelConfig
    head: HeadKind
    trainable: bool


def starting_checkpoints(config: RunConfig, fingerprint: str) -> dict[str, Path]:
    """The step folder of each role that starts from another run's weights; ``fingerprint`` is the tokenizer's.

    Each is complete, and fits in role, shape, head and tokenizer; its files have their sizes.  Rank 0 looks and every
    rank learns what it found: on a network file system ranks may see differing folders.  Collective over the world.
    Raises ConfigError with the problems of all roles.
    """
    found: dict[str, Path] = {}
    problems: dict[str, None] = {}  # in order, each once: several roles start from one checkpoint
    with everywhere("looking at the checkpoints to start from"):
        for name in config.algorithm.role_kinds if this_rank() == 0 else ():
            key, path = derived.starting_key(config, name), derived.starting_point(config, name)
            if path is not None:
                try:
                    found[name] = _checked(config, name, path, fingerprint)
                except CheckpointError as error:
                    problems[f"{key}: {error}"] = None
            elif config.algorithm.role_kinds[name].needs_weights:
                problems[f"{key}: the {name} needs weights; give a checkpoint"] = None
    found, problems = gather((found, problems))[0]
    if problems:
        raise ConfigError(list(problems))
    return found


def require_resumable(config: RunConfig, folder: Path, fingerprint: str) -> None:
    """CheckpointError on all ranks unless every model of the run can go on from ``folder``.  Collective."""
    with everywhere(f"looking at the checkpoint {folder}"):
        if this_rank() == 0:
            wanted = {name: _wanted(config, name) for name in config.algorithm.role_kinds}
            manifest = read_manifest(folder)
            require_own_name(folder, manifest.step)
            _require(folder, manifest, wanted, {}, fingerprint, weights_only=False)


def require_position(stream: Stream, state: Mapping[str, Any]) -> None:
    """DataError unless ``stream`` goes on from the algorithm's ``state``: the same data, the same seed."""
    own = stream.state_dict()
    for part in state.values():
        if isinstance(part, Mapping) and part.keys() == own.keys():
            stream.load_state_dict(dict(part))


def _checked(config: RunConfig, name: str, path: Path, fingerprint: str) -> Path:
    """The newest complete step at ``path``.  CheckpointError when there is none, or it is not for this role."""
    folder = newest(path) or path  # reading the manifest says what is there instead
    manifest, source = read_manifest(folder), derived.roles(config)[name].load_role
    _require_same_head(config, name, folder, manifest, source)
    renamed = {name: source} if source else {}
    _require(folder, manifest, {name: _wanted(config, name)}, renamed, fingerprint, weights_only=True)
    return folder


def _wanted(config: RunConfig, name: str) -> _Wanted:
    return _Wanted(config.model, derived.head_of(config, name), derived.is_trained(config, name))


def _require(
    folder: Path,
    manifest: Manifest,
    wanted: Mapping[str, _Wanted],
    renamed: Mapping[str, str],
    fingerprint: str,
    *,
    weights_only: bool,
) -> None:
    sources = require_fit(folder, manifest, wanted, renamed, weights_only=weights_only, tokenizer=fingerprint)
    verify(folder, manifest, files_of(manifest, set(sources.values()), weights_only), contents=False)


def _require_same_head(config: RunConfig, name: str, folder: Path, manifest: Manifest, source: str | None) -> None:
    """A head that nobody trained would be random: only a value or score head that learns here may start fresh."""
    kind, stored = config.algorithm.role_kinds[name], manifest.roles
    source = source or (name if name in stored else next(iter(stored)))
    fresh = kind.trains and kind.head != "lm"
    if not fresh and source in stored and stored[source].head != kind.head:
        raise CheckpointError(
            f"{folder} holds a model with a {stored[source].head!r} head as {source!r}, and the {name} needs a "
            f"{kind.head!r} head; name the checkpoint of a run that trained one"
        )
