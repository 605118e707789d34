"""Hugging Face LLaMA folders to checkpoints and back: safetensors only, a tensor at a time, bit for bit.

Names are those of ``models/canonical.py``.  What Hugging Face has no place for (rows that pad the vocabulary, a score
head's bias) travels in ``zj_extra.safetensors``, which its own loaders do not look at.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_zj.checkpoint import retention, tree
from megatron_zj.checkpoint.errors import CheckpointError, explain
from megatron_zj.checkpoint.files import FileRecord, copy_file, read_json, write_json
from megatron_zj.checkpoint.hf_config import read_config, write_config
from megatron_zj.checkpoint.manifest import (
    TOKENIZER,
    ManifestInfo,
    RoleInfo,
    new_manifest,
    pick_role,
    read_manifest,
    verify,
    write_manifest,
    write_tokenizer,
)
from megatron_zj.checkpoint.safetensors_files import (
    Outgoing,
    SafetensorsFolder,
    list_tensors,
    read_tensor,
    write_file,
    write_folder,
)
from megatron_zj.checkpoint.save import ALGORITHM, COMMON, ROLES
from megatron_zj.checkpoint.shards import ShardReader, ShardWriter, require_finite, write_foreign_common, write_index
from megatron_zj.config.model import HeadKind, ModelConfig
from megatron_zj.data.tokenizer import TOKENIZER_FILES, SentencePieceTokenizer, Tokenizer, load_tokenizer
from megatron_zj.data.vocabulary import mean_of_pieces, pieces_of_new_ids
from megatron_zj.models.canonical import (
    EMBEDDING,
    canonical_names,
    canonical_tensors,
    fuse_gate_up,
    fuse_qkv,
    split_gate_up,
    split_qkv,
)

log = logging.getLogger(__name__)
EXTRA = "zj_extra.safetensors"
LM_HEAD = "lm_head.weight"
_ELSEWHERE = "Free some space, or give --to a folder on another disk"
ORIGINAL = "hugging_face"  # folder of the imported config.json inside a checkpoint
_KEPT_FILES = ("config.json", "generation_config.json")
_LAYER_KEYS = (
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)


@dataclass(frozen=True)
class _Stored:
    """A tensor of a checkpoint (``layer``: a slice of a stacked one) and the canonical tensors it is made of."""

    key: str
    layer: int | None
    names: tuple[str, ...]


def _stored(model: ModelConfig, head: HeadKind) -> Iterator[_Stored]:
    """Every stored tensor, in canonical order."""

    def names(parameter: str, layer: int = 0) -> tuple[str, ...]:
        return canonical_names(parameter, layer, model, head)

    yield _Stored("embedding.word_embeddings.weight", None, (EMBEDDING,))
    for layer in range(model.num_layers):
        for key in _LAYER_KEYS:
            yield _Stored(f"decoder.layers.{key}", layer, names(f"decoder.layers.0.{key}", layer))
    yield _Stored("decoder.final_layernorm.weight", None, names("decoder.final_layernorm.weight"))
    if head == "lm" and not model.tie_embeddings:
        yield _Stored("output_layer.weight", None, (LM_HEAD,))
    for part in ("weight", "bias") if head == "score" else ("weight",) if head == "value" else ():
        yield _Stored(f"{head}_head.{part}", None, names(f"output_layer.{part}"))


def _hf_name(name: str) -> str:
    return "score.weight" if name in ("score_head.weight", "value_head.weight") else name


# Import -------------------------------------------------------------------------------------------------------------


def import_hf(
    source: Path, target: Path, *, tokenizer: Path | None = None, special_tokens: tuple[str, ...] = ()
) -> Path:
    """Write the checkpoint ``target`` (one role, ``model``; weights only) from a Hugging Face folder.

    ``tokenizer``: one that extends the folder's own (as ``zj tokenizer extend`` makes it), also by
    ``special_tokens``; each new embedding row starts as the mean of the rows of its old pieces.  Raises
    CheckpointError: not a LLaMA, a pickle, a missing or surplus tensor, a damaged file, NaN.
    """
    model, head, raw = read_config(source)
    incoming = _Incoming(source, model, head)
    kept: Tokenizer | None = None
    if any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        kept = load_tokenizer(source)
    if tokenizer is not None or special_tokens:
        kept = _extend(incoming, kept, load_tokenizer(tokenizer or source, special_tokens))
    elif kept is not None and kept.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {source} has {kept.vocab_size} ids and the model {model.vocab_size} vocabulary rows; "
            "put the tokenizer there that the model was trained with; --tokenizer and --special-tokens add rows"
        )
    role = RoleInfo(incoming.model, head, has_optimizer=False, layout={"pp": 1, "dp": 1, "cp": 1, "tp": 1, "vpp": 1})

    def write(folder: Path) -> None:
        files = _write_role(folder, incoming)
        files |= tree.save_tree(folder, ALGORITHM, {})
        files |= _copy(source, folder, ORIGINAL, _KEPT_FILES)
        if kept is not None and incoming.pieces is None:
            files |= _copy(source, folder, TOKENIZER, TOKENIZER_FILES)
        elif kept is not None:
            files |= write_tokenizer(folder, kept)
        config = {"model": dataclasses.asdict(incoming.model), "imported_from": raw.get("_name_or_path", source.name)}
        write_manifest(folder, new_manifest(0, {"model": role}, files, ManifestInfo(config, kept)))

    return _complete_or_absent(target, write)


class _Incoming:
    """Whole canonical tensors of a Hugging Face folder, with the rows that pad the vocabulary."""

    def __init__(self, folder: Path, model: ModelConfig, head: HeadKind) -> None:
        self.model, self.head = model, head
        self.pieces: list[list[int]] | None = None  # old pieces of each new vocabulary row
        self._old_rows = model.vocab_size
        self._weights = SafetensorsFolder(folder)
        self._extra = folder / EXTRA
        self._extra_names = set(list_tensors(self._extra)) if self._extra.is_file() else set()
        self._check_names()

    def _check_names(self) -> None:
        """Neither a tensor missing nor one whose effect would be lost."""
        needed = {_hf_name(tensor.name) for tensor in canonical_tensors(self.model, self.head)}
        needed -= {"score_head.bias"}
        present = {name for name in self._weights.files if not name.endswith("rotary_emb.inv_freq")}
        optional = {LM_HEAD} if self.model.tie_embeddings else set()
        optional |= {"score.bias"} if self.head == "value" else set()
        if missing := sorted(needed - present):
            raise CheckpointError(f"{self._weights.folder} has no tensor {missing[0]} ({len(missing)} missing)")
        if surplus := sorted(present - needed - optional):
            raise CheckpointError(
                f"{self._weights.folder} has a tensor {surplus[0]} that a LLaMA with a {self.head} head has no place "
                f"for ({len(surplus)} such)"
            )
        for name in sorted(optional & present):
            value = self._weights.read(name)
            same = not value.any() if name == "score.bias" else torch.equal(value, self._weights.read(EMBEDDING))
            if not same:
                raise CheckpointError(f"{self._weights.files[name]}: {name} differs from what config.json says of it")

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The whole tensor in its padded ``shape``; CheckpointError for another shape, NaN or Inf."""
        if name == "score_head.bias":
            return self._read_extra(name, (1,), torch.float32)
        value = self._weights.read(_hf_name(name))
        where = self._weights.files[_hf_name(name)]
        require_finite(name, value, str(where))
        rows = self._old_rows if name in (EMBEDDING, LM_HEAD) else shape[0]
        if tuple(value.shape) != (rows, *shape[1:]):
            raise CheckpointError(f"{where}: {name} has shape {tuple(value.shape)}, not {(rows, *shape[1:])}")
        if name not in (EMBEDDING, LM_HEAD):
            return value
        if self.pieces is not None:
            return mean_of_pieces(value, self.pieces, shape[0])
        padding = self._read_extra(f"padding.{name}", (shape[0] - rows, shape[1]), value.dtype)
        return torch.cat([value, padding]) if len(padding) else value

    def _read_extra(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if name in self._extra_names:
            value = read_tensor(self._extra, name)
            require_finite(name, value, str(self._extra))
            if tuple(value.shape) == shape:
                return value
        return torch.zeros(shape, dtype=dtype)


def _extend(incoming: _Incoming, old: Tokenizer | None, new: Tokenizer) -> Tokenizer:
    if not isinstance(old, SentencePieceTokenizer):
        raise CheckpointError("the model's folder has no SentencePiece tokenizer.model, so its rows cannot be extended")
    if old.vocab_size != incoming.model.vocab_size:
        raise CheckpointError(
            f"the model has {incoming.model.vocab_size} vocabulary rows and its tokenizer {old.vocab_size} ids; they "
            "must be as many for the vocabulary to be extended"
        )
    incoming.pieces = pieces_of_new_ids(old, new)
    incoming.model = dataclasses.replace(incoming.model, vocab_size=new.vocab_size)
    return new


def _write_role(folder: Path, incoming: _Incoming) -> dict[str, FileRecord]:
    model, head = incoming.model, incoming.head
    shapes = {tensor.name: tensor.shape for tensor in canonical_tensors(model, head)}
    role = folder / ROLES / "model"
    role.mkdir(parents=True)
    writer = ShardWriter(role, 0)
    try:
        for stored in _stored(model, head):
            parts = [incoming.read(name, shapes[name]) for name in stored.names]
            whole = _fuse(parts, model)
            if stored.layer is None:
                writer.add_tensor("model", stored.key, whole, whole.shape)
            else:
                shape, offsets = (model.num_layers, *whole.shape), (stored.layer, *[0] * whole.ndim)
                writer.add_tensor("model", stored.key, whole[None], shape, offsets)
        files = writer.close()
    except BaseException:
        writer.abort()
        raise
    files |= tree.save_tree(role, COMMON, {}) | write_foreign_common(role, {}) | write_index(role, writer.index)
    return {f"{ROLES}/model/{name}": record for name, record in files.items()}


def _fuse(parts: list[Tensor], model: ModelConfig) -> Tensor:
    """Canonical tensors -> the stored one they make."""
    if len(parts) == 3:
        query, key, value = parts
        return fuse_qkv(query, key, value, model.kv_heads)
    return fuse_gate_up(*parts) if len(parts) == 2 else parts[0]


# Export -------------------------------------------------------------------------------------------------------------


def export_hf(source: Path, target: Path, *, role: str | None = None, max_shard_bytes: int = 2 << 30) -> Path:
    """Write the Hugging Face folder ``target`` from one role of the newest checkpoint at ``source``.

    A scalar head becomes the ``score`` of LlamaForSequenceClassification (a reward model) or
    LlamaForTokenClassification (a critic).  Raises CheckpointError: damaged, no such role (``pick_role``), NaN.
    """
    folder = retention.newest(source) or source
    manifest = read_manifest(folder)
    chosen = pick_role(folder, manifest, role)
    info = manifest.roles[chosen]
    prefix = f"{ROLES}/{chosen}/"
    names = [n for n in manifest.files if not n.startswith(f"{ROLES}/") or n.startswith(prefix)]
    verify(folder, manifest, [n for n in names if not n.startswith(f"{prefix}optimizer_")])

    def write(target: Path) -> None:
        with ShardReader(folder / ROLES / chosen) as reader:
            tensors, extra = _outgoing(reader, info)
            write_folder(target, tensors, max_shard_bytes)
            if extra:
                write_file(target / EXTRA, extra)
            dtype = str(tensors[0].dtype).removeprefix("torch.")
        original: dict[str, Any] = {}
        if f"{ORIGINAL}/config.json" in manifest.files:
            original = read_json(folder / ORIGINAL / "config.json", "use another checkpoint")
        write_json(target / "config.json", write_config(info.model, info.head, dtype, original))
        for name in manifest.files:
            part, _, file = name.partition("/")
            if part == TOKENIZER or (part == ORIGINAL and file != "config.json"):
                copy_file(folder / name, target / file)

    return _complete_or_absent(target, write)


def _outgoing(reader: ShardReader, info: RoleInfo) -> tuple[list[Outgoing], list[Outgoing]]:
    """What goes into the weights, and what into the extra file."""
    model, head = info.model, info.head
    shapes = {tensor.name: tensor.shape for tensor in canonical_tensors(model, head)}
    tensors: list[Outgoing] = []
    extra: list[Outgoing] = []
    cache = _LastRead(reader, model)
    for stored in _stored(model, head):
        if stored.key not in reader.index.tensors:
            raise CheckpointError(f"{reader.folder} has no tensor {stored.key}; it is not a LLaMA with a {head} head")
        dtype = reader.index.tensors[stored.key].dtype
        for name in stored.names:
            shape = shapes[name]

            def produce(stored: _Stored = stored, name: str = name, rows: slice = slice(None)) -> Tensor:
                return cache.part(stored, name)[rows]

            if name == "score_head.bias":
                extra.append(Outgoing(name, shape, dtype, produce))
            elif name in (EMBEDDING, LM_HEAD) and shape[0] > model.vocab_size:
                kept, padding = slice(0, model.vocab_size), slice(model.vocab_size, None)
                tensors.append(Outgoing(name, (model.vocab_size, shape[1]), dtype, _bind(produce, kept)))
                rest = (shape[0] - model.vocab_size, shape[1])
                extra.append(Outgoing(f"padding.{name}", rest, dtype, _bind(produce, padding)))
            else:
                tensors.append(Outgoing(_hf_name(name), shape, dtype, produce))
    if head == "value":
        dtype = tensors[-1].dtype
        tensors.append(Outgoing("score.bias", (1,), dtype, lambda: torch.zeros(1, dtype=dtype)))
    return tensors, extra


def _bind(produce: Callable[..., Tensor], rows: slice) -> Callable[[], Tensor]:
    return lambda: produce(rows=rows)


class _LastRead:
    """Parts of stored tensors; the last one read stays, because its parts are asked for in turn."""

    def __init__(self, reader: ShardReader, model: ModelConfig) -> None:
        self._reader, self._model = reader, model
        self._stored: _Stored | None = None
        self._parts: tuple[Tensor, ...] = ()

    def part(self, stored: _Stored, name: str) -> Tensor:
        """The canonical tensor ``name`` of ``stored``."""
        if stored != self._stored:
            self._stored, self._parts = None, ()  # free before the next is read
            whole = self._reader.read_whole(stored.key, stored.layer)
            if len(stored.names) == 3:
                self._parts = split_qkv(whole, self._model.kv_heads, self._model.head_size)
            else:
                self._parts = split_gate_up(whole) if len(stored.names) == 2 else (whole,)
            self._stored = stored
        return self._parts[stored.names.index(name)]


# Both ---------------------------------------------------------------------------------------------------------------


def _copy(source: Path, folder: Path, into: str, names: tuple[str, ...]) -> dict[str, FileRecord]:
    present = [name for name in names if (source / name).is_file()]
    if present:
        (folder / into).mkdir()
    return {f"{into}/{name}": copy_file(source / name, folder / into / name) for name in present}


def _complete_or_absent(target: Path, write: Callable[[Path], None]) -> Path:
    """Write beside ``target`` and rename; an interrupted conversion leaves no folder under that name."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists already; give a new folder to --to, or delete that one")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write(partial)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except OSError as error:
        raise CheckpointError(explain(error, f"writing {target}", _ELSEWHERE)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
