"""What can be wrong with a checkpoint, said in one sentence, and said on every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException

from megatron_zj.runtime.files import NO_SPACE, room


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or must not be read.  The message names the file and what to do."""


def explain(error: BaseException, doing: str, advice: str = "free some space") -> str:
    """``error`` as a sentence for the user.  ``doing`` names the action and the file; ``advice`` is for a full disk."""
    if isinstance(error, CheckpointError):
        return str(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in NO_SPACE:
            file = f"{cause.filename}: " if cause.filename else ""
            where = f"; {room(Path(cause.filename), cause.errno)}" if cause.filename else ""
            return f"no space left while {doing} ({file}{cause.strerror}{where}). {advice}"
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__} while {doing}: {error}"


def gather(value: Any, group: ProcessGroup | None = None) -> list[Any]:
    """Every rank's ``value``, in rank order.  Collective over ``group`` (None: the world)."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def agree(error: str | None, cause: BaseException | None = None) -> None:
    """Raise the same CheckpointError on every rank as soon as one rank has an ``error``.  Collective over
    the world.  ``cause`` is this rank's own exception.

    Without it the rank with the error raises and the others wait in the next collective until it times out.
    """
    errors = gather(error)
    failed = [rank for rank, message in enumerate(errors) if message]
    if not failed:
        return
    where = "" if len(errors) == 1 else f"rank {failed[0]}: "
    more = "" if len(failed) == 1 else f" (ranks {failed} failed)"
    raise CheckpointError(f"{where}{errors[failed[0]]}{more}") from cause


@contextlib.contextmanager
def everywhere(doing: str, advice: str = "free some space") -> Iterator[None]:
    """Run the block on every rank, then agree: what goes wrong on one rank is raised on all.  Collective.
    ``advice`` is for a full disk.

    ``CheckpointException`` of torch is a BaseException, so ``except Exception`` would let it through.
    """
    error, cause = None, None
    try:
        yield
    except (Exception, CheckpointException) as caught:
        error, cause = explain(caught, doing, advice), caught
    agree(error, cause)


def this_rank() -> int:
    """Rank in the default group; 0 in a process without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Ranks in the default group; 1 in a process without one."""
    return dist.get_world_size() if dist.is_initialized() else 1
