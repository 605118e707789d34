"""Small collectives on host numbers, over a group given by argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


def broadcast_floats(
    values: Sequence[float], source: int, group: dist.ProcessGroup, device: torch.device
) -> list[float]:
    """The values of the global rank ``source``; every rank gives as many values."""
    tensor = torch.tensor(list(values), dtype=torch.float64, device=device)
    if group.size() > 1:
        dist.broadcast(tensor, source, group=group)
    return [float(value) for value in tensor.tolist()]


def gather_objects(value: object, group: dist.ProcessGroup) -> list[object]:
    """The picklable values of all the group's ranks, in rank order."""
    gathered: list[object] = [None] * group.size()
    dist.all_gather_object(gathered, value, group=group)
    return gathered
