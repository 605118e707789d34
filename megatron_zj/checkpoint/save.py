"""Writing a checkpoint: complete or absent, now or in the background.

``step_N/`` gets ``roles/<role>/`` (written under that role's own groups), ``algorithm.json`` and
``algorithm.safetensors``, ``tokenizer/``, and at the very end ``manifest.json``.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from torch import Tensor

from megatron_zj.checkpoint import retention, tree
from megatron_zj.checkpoint.errors import CheckpointError, agree, everywhere, explain, gather, this_rank
from megatron_zj.checkpoint.files import FileRecord, read_json, require_space, write_json
from megatron_zj.checkpoint.manifest import ManifestInfo, RoleInfo, new_manifest, write_manifest, write_tokenizer
from megatron_zj.checkpoint.shards import Index, ShardWriter, require_finite, write_foreign_common, write_index
from megatron_zj.config.checkpoint import CheckpointConfig
from megatron_zj.config.model import HeadKind, ModelConfig
from megatron_zj.config.optim import EngineConfig
from megatron_zj.parallel.groups import ParallelGroups, placement_world
from megatron_zj.runtime.files import fsync

log = logging.getLogger(__name__)
ROLES, ALGORITHM, COMMON = retention.ROLES, "algorithm", "common"
EXTRA_STATE = "._extra_state"  # end of the key of what a module adds to its tensors; None but for FP8
_VISIBLE_SECONDS = 120.0  # how long a file of another node may stay invisible on a shared file system


class Saveable(Protocol):
    """One model on one placement: an Engine."""

    groups: ParallelGroups
    model: ModelConfig
    head: HeadKind

    @property
    def trainable(self) -> bool:
        """Whether there is optimizer state."""

    def sharded_state(self, *, optimizer: bool, loading: bool) -> dict[str, Any]:
        """megatron-core's sharded state; entries whose name starts with ``model`` are weights."""

    def load_sharded_state(self, state: dict[str, Any]) -> None:
        """Take over what ``sharded_state(loading=True)`` asked for, filled in."""


@runtime_checkable
class Idles(Protocol):
    """A Saveable that can give its device memory up; it comes back by itself."""

    config: EngineConfig

    def offload(self) -> None:
        """Weights and optimizer state to the host."""


@dataclass(frozen=True)
class _Piece:
    """What this rank writes of one tensor, or of one object (``shape`` is then None)."""

    group: str  # model | optimizer: the file it goes to
    key: str
    data: Any
    shape: tuple[int, ...] | None = None
    offsets: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return self.data.numel() * self.data.element_size() if isinstance(self.data, Tensor) else 0


@dataclass(frozen=True)
class _Part:
    """This rank's share of one role."""

    role: str
    rank: int  # in the role's placement
    pieces: list[_Piece]
    common: Any  # unsharded state, same on all the placement's ranks; rank 0 writes it


@dataclass
class _Save:
    """One checkpoint in the making, as this rank sees it."""

    step: int
    folder: Path
    parts: list[_Part]
    roles: dict[str, RoleInfo]
    ranks: dict[str, int]  # how many ranks write each role
    files: dict[str, FileRecord] = field(default_factory=dict)  # rank 0: written so far
    thread: threading.Thread | None = None
    written: threading.Event = field(default_factory=threading.Event)
    error: str | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    deadline: float = float("inf")  # monotonic seconds; for receipts of other ranks


class Checkpointer:
    """Saves into ``root/step_*``.  ``save`` and ``wait`` are collective over the world."""

    def __init__(self, root: Path, config: CheckpointConfig, manifest: ManifestInfo) -> None:
        self.root, self.config, self.info = root, config, manifest
        self._pending: _Save | None = None

    def save(self, step: int, engines: Mapping[str, Saveable | None], algorithm_state: dict[str, Any]) -> None:
        """Write the checkpoint of ``step``.

        ``engines`` has the same roles in the same order on every rank; None where the role is elsewhere.  With
        ``async_save`` this returns when the state is copied; the writing is waited for by the next ``save`` or
        ``wait``, which also raise what went wrong in it.  Raises CheckpointError on all ranks: no space left,
        NaN weights, state that differs between ranks.  The previous checkpoints are then untouched.
        """
        self.wait()
        folder: Path | None = None
        advice = _advice(self.root)
        with everywhere(f"starting a checkpoint in {self.root}", advice):
            folder = retention.begin(self.root, step) if this_rank() == 0 else None
        folder = Path(gather(str(folder))[0])
        try:
            save = self._prepare(step, folder, engines, algorithm_state)
            if self.config.async_save:
                save.thread = threading.Thread(target=_run, args=(save, self), name="checkpoint", daemon=True)
                save.thread.start()
                self._pending = save
                return
            with everywhere(f"writing {folder}", advice):
                _write(save)
            save.deadline = time.monotonic() + _VISIBLE_SECONDS
            with everywhere(f"finishing {folder}", advice):
                self._finish(save)
        except CheckpointError:
            _discard(folder)
            raise

    def wait(self) -> None:
        """Finish an asynchronous save; raises CheckpointError on every rank if any rank's writing failed."""
        save, self._pending = self._pending, None
        if save is None or save.thread is None:
            return
        save.written.wait()
        try:
            agree(save.error)
            save.deadline = time.monotonic() + _VISIBLE_SECONDS
            save.thread.join()
            agree(save.error)
        except CheckpointError:
            save.cancelled.set()
            save.thread.join()
            _discard(save.folder)
            raise

    def wait_alone(self, seconds: float) -> None:
        """Let an asynchronous save finish after the run has failed, without a collective: ranks may be gone.

        Every rank stays until the manifest is written, because a launcher ends all ranks when the first one leaves; at
        most ``seconds``.  Without what a dead rank should have written it does not count.  Logs only.
        """
        save, self._pending = self._pending, None
        if save is None or save.thread is None:
            return
        log.info("finishing %s before leaving", save.folder)
        save.deadline = time.monotonic() + seconds
        while save.error is None and not _settled(save.folder) and time.monotonic() < save.deadline:
            time.sleep(0.02)
        if not _settled(save.folder):
            log.warning("%s does not count: %s", save.folder, save.error or f"not complete within {seconds:.0f} s")

    def _prepare(
        self, step: int, folder: Path, engines: Mapping[str, Saveable | None], algorithm_state: dict[str, Any]
    ) -> _Save:
        """Copy or reference all state, make the folders, write what is small."""
        parts: list[_Part] = []
        mark = ""
        with everywhere(f"collecting the state for {folder}"):
            mark = tree.fingerprint(algorithm_state)
            parts = _snapshots(engines, copying=self.config.async_save)
        size = sum(piece.size for part in parts for piece in part.pieces)
        described = gather((size, mark, {role: _describe(e) for role, e in engines.items() if e is not None}))
        roles: dict[str, RoleInfo] = {}
        for *_, infos in described:
            roles.update(infos)
        ranks = {role: sum(role in infos for *_, infos in described) for role in roles}
        save = _Save(step, folder, parts, roles, ranks)
        with everywhere(f"writing {folder}", advice := _advice(self.root)):
            missing = sorted(set(engines) - set(roles))
            if missing:
                raise CheckpointError(f"no rank holds an engine for the roles {missing}")
            if mark != described[0][1]:
                raise CheckpointError("the algorithm's state_dict() differs from rank 0's; it must be the same on all")
            if this_rank() == 0:
                require_space(self.root, sum(size for size, *_ in described), advice)
                self._write_small(save, algorithm_state)
        return save

    def _write_small(self, save: _Save, algorithm_state: dict[str, Any]) -> None:
        for role in save.roles:
            (save.folder / ROLES / role).mkdir(parents=True)
        save.files.update(tree.save_tree(save.folder, ALGORITHM, algorithm_state))
        if self.info.tokenizer is not None:
            save.files.update(write_tokenizer(save.folder, self.info.tokenizer))
        fsync(save.folder / ROLES)

    def _finish(self, save: _Save) -> None:
        """Rank 0: indices, manifest, retention.  Needs every rank's receipt."""
        if this_rank() != 0:
            return
        for role, world_size in save.ranks.items():
            folder = save.folder / ROLES / role
            index = Index()
            for receipt in _receipts(save, folder, world_size):
                index.merge(Index.from_json(receipt["index"]))
                for name, record in receipt["files"].items():
                    save.files[f"{ROLES}/{role}/{name}"] = FileRecord(**record)
            for name, record in write_index(folder, index).items():
                save.files[f"{ROLES}/{role}/{name}"] = record
            for rank in range(world_size):
                _receipt_path(folder, rank).unlink()
            fsync(folder)
        write_manifest(save.folder, new_manifest(save.step, save.roles, save.files, self.info))
        final = retention.promote(save.folder)
        log.info("saved %s", final)
        self._prune(save.step)

    def _prune(self, saved: int) -> None:
        try:
            deleted = retention.prune(self.root, saved, self.config.keep_last, self.config.keep_every)
        except OSError as error:  # the new checkpoint is complete, so the save has succeeded
            log.warning("older checkpoints in %s could not be deleted: %s", self.root, error)
        else:
            if deleted:
                log.info("deleted %s", [path.name for path in deleted])


def require_room(root: Path, needed: int) -> None:
    """Refuse a run whose checkpoints, of ``needed`` bytes each, do not fit below ``root``.  Collective over the world.

    To be asked before the first step: the first save may be hours away.
    """
    with everywhere(f"looking for room in {root}"):
        if this_rank() == 0:
            require_space(root, needed, _advice(root))


def _advice(root: Path) -> str:
    """What to do about a full disk, and what is not lost."""
    if not retention.complete_steps(root):
        return "Free some space, or set run.dir to a larger disk"
    return (
        "The checkpoints saved before are complete: free some space, lower checkpoint.keep_last, or set run.dir to a "
        "larger disk"
    )


def _describe(engine: Saveable) -> RoleInfo:
    layout = {**engine.groups.grid.sizes, "vpp": engine.groups.parallel.vpp}
    return RoleInfo(engine.model, engine.head, engine.trainable, layout)


def make_room(engine: Saveable) -> bool:
    """Free an idle engine's device memory where its configuration says so; whether it does."""
    idles = isinstance(engine, Idles) and engine.config.offload_idle
    if idles:
        cast(Idles, engine).offload()
    return idles


def _snapshots(engines: Mapping[str, Saveable | None], copying: bool) -> list[_Part]:
    """This rank's pieces of all roles.  Models that make room when idle are on the device one at a time; what is to be
    written of them is then a copy on the host, whether ``copying`` or not.
    """
    here = {role: engine for role, engine in engines.items() if engine is not None}
    idle = {role for role, engine in here.items() if len(here) > 1 and make_room(engine)}
    parts = []
    for role, engine in here.items():
        parts.append(_snapshot(role, engine, copying or role in idle))
        if role in idle:
            make_room(engine)
    return parts


def _snapshot(role: str, engine: Saveable, copying: bool) -> _Part:
    """This rank's pieces of a role; with ``copying`` they no longer change when training goes on."""
    with placement_world(engine.groups):
        rank = dist.get_rank()
        state = engine.sharded_state(optimizer=engine.trainable, loading=False)
        sharded, common = save_preprocess(state, validate_access_integrity=True)
    pieces: list[_Piece] = []
    for entry, part in sharded.items():
        group = "model" if entry.startswith("model") else "optimizer"
        for item in nested_values({entry: part}):
            if not is_main_replica(item.replica_id):
                continue
            if isinstance(item, ShardedObject):
                if item.data is None and item.key.endswith(EXTRA_STATE):
                    continue
                data = copy.deepcopy(item.data) if copying else item.data
                pieces.append(_Piece(group, item.unique_key, data))
            else:
                pieces.append(_tensor_piece(role, group, item, copying))
    return _Part(role, rank, pieces, copy.deepcopy(common) if copying and rank == 0 else common)


def _tensor_piece(role: str, group: str, item: ShardedTensor, copying: bool) -> _Piece:
    data = item.data.detach()
    require_finite(item.key, data, f"role {role!r} was not saved")
    if copying:
        data = data.to("cpu", copy=True)
    data = data.reshape((1,) * item.prepend_axis_num + tuple(item.local_shape))
    return _Piece(group, item.key, data, tuple(item.global_shape), tuple(item.global_offset))


def _write(save: _Save) -> None:
    """This rank's files, then a receipt for each role: what was written, or what went wrong."""
    for part in save.parts:
        folder = save.folder / ROLES / part.role
        writer = ShardWriter(folder, part.rank)
        try:
            files: dict[str, FileRecord] = {}
            for piece in part.pieces:
                if piece.shape is None:
                    writer.add_object(piece.group, piece.key, piece.data)
                else:
                    writer.add_tensor(piece.group, piece.key, piece.data, piece.shape, piece.offsets)
            files.update(writer.close())
            if part.rank == 0:
                files.update(tree.save_tree(folder, COMMON, part.common))
                files.update(write_foreign_common(folder, part.common))
            records = {name: dataclasses.asdict(record) for name, record in files.items()}
            write_json(_receipt_path(folder, part.rank), {"index": writer.index.to_json(), "files": records})
        except BaseException:
            writer.abort()
            raise


def _run(save: _Save, checkpointer: Checkpointer) -> None:
    """The background thread.  It communicates by files only, so it cannot disturb the training's collectives."""
    try:
        _write(save)
        save.written.set()
        checkpointer._finish(save)
    except BaseException as error:  # the thread ends here; wait() raises it
        save.error = explain(error, f"writing {save.folder} in the background", _advice(save.folder.parent))
    finally:
        save.written.set()


def _receipt_path(folder: Path, rank: int) -> Path:
    return folder / f"receipt_{rank:05d}.json"


def _receipts(save: _Save, folder: Path, world_size: int) -> list[Any]:
    """All ranks' receipts; waits for those that are still writing."""
    missing = list(range(world_size))
    while True:
        missing = [rank for rank in missing if not _receipt_path(folder, rank).is_file()]
        if not missing:
            return [read_json(_receipt_path(folder, rank), "save again") for rank in range(world_size)]
        if save.cancelled.is_set() or time.monotonic() > save.deadline:
            raise CheckpointError(
                f"{folder} has no files of the placement's ranks {missing}, as rank 0 sees it; run.dir must lie on a "
                "file system that all nodes share"
            )
        time.sleep(0.02)


def _settled(folder: Path) -> bool:
    """Whether rank 0 has completed the checkpoint; a second save of its step has then been renamed."""
    return retention.is_complete(folder) or not folder.exists()


def _discard(folder: Path) -> None:
    """Free the space of a failed save; a checkpoint that is complete stays, whatever went wrong after it."""
    if this_rank() == 0 and not retention.is_complete(folder):
        shutil.rmtree(folder, ignore_errors=True)
