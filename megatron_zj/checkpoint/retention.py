"""Step folders: their names, which of them are complete, and which are deleted."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from pathlib import Path

from megatron_zj.checkpoint.errors import CheckpointError
from megatron_zj.checkpoint.manifest import MANIFEST, SAVING
from megatron_zj.runtime.files import fsync

log = logging.getLogger(__name__)
_STEP = re.compile(r"step_(\d{8,})(\.new)?")
CHECKPOINTS = "checkpoints"  # of a run folder
ROLES = "roles"  # of a step folder: its models


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lives."""
    return root / f"step_{step:08d}"


def is_complete(folder: Path) -> bool:
    """Whether the save reached its last act."""
    return (folder / MANIFEST).is_file()


def complete_steps(root: Path) -> dict[int, Path]:
    """The complete checkpoints under ``root`` by step, in order.

    ``step_N.new`` exists while step N is saved a second time; once complete it is the one that counts.
    """
    found: dict[int, Path] = {}
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        match = _STEP.fullmatch(folder.name)
        if match and is_complete(folder):
            found[int(match[1])] = folder  # N.new sorts after N
    return dict(sorted(found.items()))


def newest(path: Path) -> Path | None:
    """The newest complete checkpoint: ``path`` itself, or under a checkpoints folder, or under a run folder."""
    if is_complete(path):
        return path
    for root in (path, path / CHECKPOINTS):
        if steps := complete_steps(root):
            return list(steps.values())[-1]
    return None


def damaged(root: Path) -> list[Path]:
    """Step folders whose save ended and whose manifest was lost since.  What a killed save leaves is none of them."""
    steps = sorted(folder for folder in root.iterdir() if _STEP.fullmatch(folder.name)) if root.is_dir() else []
    lost = [folder for folder in steps if not is_complete(folder) and not (folder / SAVING).exists()]
    return [folder for folder in lost if (folder / ROLES).is_dir()]  # killed while made or removed, it has none


def require_own_name(folder: Path, step: int) -> None:
    """CheckpointError unless a folder that holds ``step`` is called so: a renamed copy would count as the newest."""
    if folder.name.removesuffix(".new") != (own := step_folder(folder.parent, step).name):
        raise CheckpointError(
            f"{folder} holds step {step}, so it was copied or renamed; move it out of {folder.parent}, or call it {own}"
        )


def begin(root: Path, step: int) -> Path:
    """An empty folder for the checkpoint of ``step``; a complete one of the same step is left in place."""
    root.mkdir(parents=True, exist_ok=True)
    folder = step_folder(root, step)
    second = folder.with_name(folder.name + ".new")
    if is_complete(second):  # killed between its manifest and its renaming
        promote(second)
    if is_complete(folder):
        folder = second
    remove(folder)
    folder.mkdir()
    (folder / SAVING).touch()
    fsync(folder)
    fsync(root)
    return folder


def promote(folder: Path) -> Path:
    """Give a complete ``step_N.new`` its final name, in the place of the older one.  Safe to interrupt anywhere."""
    final = folder.with_name(folder.name.removesuffix(".new"))
    if final != folder:
        remove(final)
        folder.rename(final)
        fsync(final.parent)
    return final


def remove(folder: Path) -> None:
    """Delete a checkpoint, manifest first, then the models: interrupted, what is left does not count."""
    with contextlib.suppress(FileNotFoundError):
        (folder / MANIFEST).unlink()
        fsync(folder)
    if (folder / ROLES).exists():
        shutil.rmtree(folder / ROLES)
    if folder.exists():
        shutil.rmtree(folder)


def prune(root: Path, saved: int, keep_last: int, keep_every: int) -> list[Path]:
    """Delete what need not be kept, and the remains of interrupted saves; returns what was deleted.

    Kept are the newest ``keep_last`` (0: all), every step that ``keep_every`` (0: none) divides, and always the
    newest and the one just ``saved``.  What cannot be deleted is logged and left.
    """
    steps = complete_steps(root)
    last = max(steps, default=saved)
    kept = set(list(steps)[-keep_last:] if keep_last else steps) | {last, saved}
    kept |= {step for step in steps if keep_every and step % keep_every == 0}
    deleted = [folder for step, folder in steps.items() if step not in kept]
    for folder in root.iterdir():
        match = _STEP.fullmatch(folder.name)
        if match and int(match[1]) < last and not is_complete(folder):
            deleted.append(folder)
    return [folder for folder in deleted if _removed(folder)]


def _removed(folder: Path) -> bool:
    try:
        remove(folder)
    except OSError as error:
        log.warning("%s could not be deleted and takes up space: %s", folder, error)
        return False
    return True
