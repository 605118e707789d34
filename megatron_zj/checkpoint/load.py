"""Reading a checkpoint under any layout, after its files were checked against the manifest."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedObject,
    ShardedTensor,
)
from megatron.core.dist_checkpointing.strategies.base import LoadCommonStrategy, LoadShardedStrategy

from megatron_zj.checkpoint import retention, tree
from megatron_zj.checkpoint.errors import CheckpointError, everywhere, gather, this_rank, world_size
from megatron_zj.checkpoint.manifest import MANIFEST, TOKENIZER, Manifest, read_manifest, verify
from megatron_zj.checkpoint.save import ALGORITHM, COMMON, EXTRA_STATE, ROLES, Saveable, make_room
from megatron_zj.checkpoint.shards import ShardReader
from megatron_zj.config.model import HeadKind, ModelConfig
from megatron_zj.parallel.groups import placement_world

log = logging.getLogger(__name__)
newest = retention.newest

_FREE = {"preset", "kernels", "fp8", "init_std", "dropout", "max_position_embeddings", "vocab_multiple", "vocab_size"}
_NUMERIC = {"rope_theta", "rope_scaling", "norm_eps"}  # change results, not shapes
HEAD_WORDS = ("value_head", "score_head")  # in the key of a scalar head's tensors
LM_HEAD = "output_layer"


class Described(Protocol):
    """What a role of a checkpoint is compared with: an engine, or what one will be."""

    @property
    def model(self) -> ModelConfig:
        """Its shape."""

    @property
    def head(self) -> HeadKind:
        """What it ends in."""

    @property
    def trainable(self) -> bool:
        """Whether it has optimizer state."""


def load(
    path: Path,
    engines: Mapping[str, Saveable | None],
    *,
    roles: Mapping[str, str] | None = None,
    weights_only: bool = False,
    tokenizer: str | None = None,
) -> dict[str, Any]:
    """Fill ``engines`` from the newest complete checkpoint at ``path``; returns the algorithm's state.

    ``path`` is a step, checkpoints or run folder.  ``roles`` maps a role of ``engines`` to the role in the checkpoint;
    without an entry it is the role of the same name or, for weights, the only one.  ``weights_only`` leaves optimizer
    and algorithm state alone and returns {}: another stage's checkpoint.  A scalar head that the checkpoint's model
    does not have keeps its fresh values; it is never filled from another kind of head.  ``tokenizer`` is the
    fingerprint of the tokenizer in use, compared with the checkpoint's.

    Collective over the world: ``engines`` has the same roles on every rank (None: not here).  Raises CheckpointError
    on all ranks, and names the file: missing, damaged, foreign, another shape, NaN.
    """
    folder = agreed_newest(path) or path  # reading the manifest says what is there instead
    manifest: Manifest | None = None
    sources: dict[str, str] = {}
    with everywhere(f"reading {folder / MANIFEST}"):
        manifest = read_manifest(folder)
        sources = require_fit(folder, manifest, engines, roles or {}, weights_only=weights_only, tokenizer=tokenizer)
    assert manifest is not None  # everywhere() raised otherwise
    with everywhere(f"checking the files of {folder}"):
        _verify_share(folder, manifest, sorted(set(sources.values())), weights_only)
    for role, engine in engines.items():
        with everywhere(f"loading role {role!r} from {folder}"):
            if engine is not None:
                fresh_head = engine.head != manifest.roles[sources[role]].head
                _load_role(folder / ROLES / sources[role], engine, weights_only, fresh_head)
    state: dict[str, Any] = {}
    with everywhere(f"loading the algorithm's state from {folder}"):
        if not weights_only:
            state = tree.load_tree(folder, ALGORITHM)
    if not sources:
        return state  # a look at it: what it is for may still be refused
    what = "weights" if weights_only else "everything"
    names = ", ".join(role if role == source else f"{role} (from {source})" for role, source in sources.items())
    log.info("loaded %s of %s from %s (step %d)", what, names, folder, manifest.step)
    return state


def require_fit(
    folder: Path,
    manifest: Manifest,
    wanted: Mapping[str, Described | None],
    roles: Mapping[str, str],
    *,
    weights_only: bool,
    tokenizer: str | None,
) -> dict[str, str]:
    """The role of the checkpoint for each role that is ``wanted`` (None: not compared); arguments as in ``load``.

    Looks at nothing but the manifest.  CheckpointError: no such role, another shape, head or tokenizer.
    """
    _check_tokenizer(folder, manifest, tokenizer)
    sources = {role: _source(folder, manifest, role, roles, weights_only) for role in wanted}
    for role, one in wanted.items():
        if one is not None:
            _check_model(folder, manifest, role, sources[role], one, weights_only)
    return sources


def agreed_newest(path: Path) -> Path | None:
    """``newest`` as rank 0 sees it, on every rank: on a network file system ranks may see differing folders.

    Collective over the world.
    """
    found: Path | None = None
    with everywhere(f"looking for a checkpoint in {path}"):
        found = newest(path) if this_rank() == 0 else None
    first: Path | None = gather(found)[0]
    return first


def _source(folder: Path, manifest: Manifest, role: str, mapping: Mapping[str, str], weights_only: bool) -> str:
    """The role of the checkpoint that ``role`` is filled from."""
    source = mapping.get(role, role)
    if source in manifest.roles:
        return source
    if weights_only and role not in mapping and len(manifest.roles) == 1:
        return next(iter(manifest.roles))
    raise CheckpointError(
        f"{folder} has no role {source!r} for {role!r}, it has {sorted(manifest.roles)}; set algorithm.{role}.load_role"
    )


def _check_tokenizer(folder: Path, manifest: Manifest, fingerprint: str | None) -> None:
    if fingerprint and manifest.tokenizer and fingerprint != manifest.tokenizer:
        raise CheckpointError(
            f"{folder} was trained with another tokenizer ({manifest.tokenizer[:12]}; in use: {fingerprint[:12]}), so "
            "its embedding rows mean other pieces; set tokenizer.path and tokenizer.special_tokens to what it was "
            f"trained with ({folder / 'tokenizer'})"
        )


def _check_model(
    folder: Path, manifest: Manifest, role: str, source: str, engine: Described, weights_only: bool
) -> None:
    stored = manifest.roles[source]
    differing = _differences(engine.model, stored.model)
    if weights_only and (numeric := {name: pair for name, pair in differing.items() if name in _NUMERIC}):
        log.warning("role %r: %s", role, _list_of(numeric))
        differing = {name: pair for name, pair in differing.items() if name not in _NUMERIC}
    if differing:
        raise CheckpointError(
            f"{folder}: role {source!r} has another model than {role!r}: {_list_of(differing)}; set the model's "
            "fields to the checkpoint's"
        )
    if weights_only:
        if engine.head == "lm" and stored.head != "lm":
            raise CheckpointError(
                f"{folder}: role {source!r} has a {stored.head} head, so there is no language-model head for {role!r}; "
                "load a pretrain, sft or actor checkpoint"
            )
        return
    if engine.head != stored.head:
        raise CheckpointError(
            f"{folder}: role {source!r} has a {stored.head} head and {role!r} a {engine.head} head; this is another "
            "stage's checkpoint: give it as checkpoint.load instead of resuming from it"
        )
    if engine.trainable and not stored.has_optimizer:
        raise CheckpointError(
            f"{folder}: role {source!r} has no optimizer state to resume from; give it as checkpoint.load"
        )


def _differences(ours: ModelConfig, theirs: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Fields that decide shapes or results, with both values."""
    pairs: dict[str, tuple[Any, Any]] = {
        name: (_effective(ours, name), _effective(theirs, name))
        for name in (f.name for f in dataclasses.fields(ModelConfig))
        if name not in _FREE
    }
    pairs["padded_vocab_size"] = (ours.padded_vocab_size, theirs.padded_vocab_size)
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _effective(model: ModelConfig, name: str) -> Any:
    derived = {"num_query_groups": model.kv_heads, "head_dim": model.head_size}
    return derived.get(name, getattr(model, name))


def _list_of(differing: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name} is {a} here and {b} in the checkpoint" for name, (a, b) in differing.items())


def _verify_share(folder: Path, manifest: Manifest, roles: list[str], weights_only: bool) -> None:
    """Check this rank's share of the files that will be read, largest first in turn."""
    names = files_of(manifest, roles, weights_only)
    names.sort(key=lambda name: (-manifest.files[name].size, name))
    verify(folder, manifest, names[this_rank() :: world_size()])


def files_of(manifest: Manifest, roles: Collection[str], weights_only: bool) -> list[str]:
    """The files that are read for these roles."""
    names = [name for name in manifest.files if any(name.startswith(f"{ROLES}/{role}/") for role in roles)]
    names += [name for name in manifest.files if name.startswith(f"{TOKENIZER}/")]
    if weights_only:
        names = [name for name in names if not Path(name).name.startswith("optimizer_")]
    else:
        names += [name for name in manifest.files if Path(name).stem == ALGORITHM]
    return names


def _load_role(folder: Path, engine: Saveable, weights_only: bool, fresh_head: bool) -> None:
    with placement_world(engine.groups), ShardReader(folder) as reader:
        state = engine.sharded_state(optimizer=engine.trainable and not weights_only, loading=True)
        if fresh_head:
            _keep_head(state)
        _leave_extra_state(state, reader, weights_only)
        loaded = dist_checkpointing.load(
            state,
            str(folder),
            sharded_strategy=_ShardedLoader(reader),
            common_strategy=_CommonLoader(),
            validate_access_integrity=False,
        )
        engine.load_sharded_state(loaded)
        make_room(engine)


def _keep_head(state: dict[str, Any]) -> None:
    """Turn the head's entries into what they hold now, so that nothing is read for them."""

    def keep(value: Any) -> Any:
        if isinstance(value, ShardedTensor) and any(word in value.key for word in (*HEAD_WORDS, LM_HEAD)):
            return LocalNonpersistentObject(value.data)
        return value

    dict_list_map_inplace(keep, state)


def _leave_extra_state(state: dict[str, Any], reader: ShardReader, weights_only: bool) -> None:
    """A module's extra state (FP8 scales) is None where there is none, and is not taken from another run.

    Transformer Engine unpickles it, so it is read only when a run goes on from its own checkpoint.
    """

    def leave(value: Any) -> Any:
        extra = isinstance(value, ShardedObject) and value.key.endswith(EXTRA_STATE)
        if extra and (weights_only or value.unique_key not in reader.index.objects):
            return LocalNonpersistentObject(None)
        return value

    dict_list_map_inplace(leave, state)


class _CommonLoader(LoadCommonStrategy):
    """Unsharded state from JSON and safetensors; ``common.pt`` is not opened."""

    can_handle_sharded_objects = False

    def load_common(self, checkpoint_dir: str | Path) -> Any:
        return tree.load_tree(Path(checkpoint_dir), COMMON)

    def load_sharded_objects(self, sharded_objects_state_dict: Any, checkpoint_dir: str | Path) -> Any:
        raise NotImplementedError

    def check_backend_compatibility(self, loaded_version: Any) -> None:
        pass

    def check_version_compatibility(self, loaded_version: Any) -> None:
        pass


class _ShardedLoader(LoadShardedStrategy):
    """Fills sharded tensors from the boxes that overlap them; ``.metadata`` is not opened."""

    can_handle_sharded_objects = True

    def __init__(self, reader: ShardReader) -> None:
        self.reader = reader

    def load(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> Any:
        extracted, _ = extract_matching_values(sharded_state_dict, lambda value: isinstance(value, ShardedBase))
        for value in nested_values(extracted):
            self._check(value)
        return dict_list_map_inplace(self._fill, extracted)

    def _check(self, value: ShardedBase) -> None:
        """Name what does not fit before anything is overwritten."""
        index, where = self.reader.index, self.reader.folder
        if isinstance(value, ShardedTensor):
            stored = index.tensors.get(value.key)
            if stored is None:
                raise CheckpointError(
                    f"{where} has no tensor {value.key}; it was written by another kind of model or optimizer"
                )
            if stored.shape != tuple(value.global_shape):
                raise CheckpointError(
                    f"{where}: {value.key} has shape {stored.shape}, the model needs {tuple(value.global_shape)}"
                )
        elif value.unique_key not in index.objects:
            raise CheckpointError(f"{where} has no {value.unique_key}; it was written by another version or layout")

    def _fill(self, value: Any) -> Any:
        if isinstance(value, ShardedObject):
            return self.reader.read_object(value.unique_key)
        if not isinstance(value, ShardedTensor):
            return value
        if value.data is None:
            value.init_data("cpu")
        data = value.data.detach()
        boxed = data.view((1,) * value.prepend_axis_num + tuple(value.local_shape))
        with torch.no_grad():
            self.reader.read_box(value.key, boxed, value.global_offset)
        return data

    def load_tensors_metadata(self, checkpoint_dir: str | Path) -> Any:
        raise NotImplementedError

    def check_backend_compatibility(self, loaded_version: Any) -> None:
        pass

    def check_version_compatibility(self, loaded_version: Any) -> None:
        pass


__all__ = ["agreed_newest", "load", "newest"]
