"""Proof that the reward model which scores is the one that was trained: a checksum of its head.

A reward model whose head was not loaded scores with a random vector, and nothing else in a run shows it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_zj.roles.role import Role
from megatron_zj.roles.world import gather_in_order

_PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


class RewardHeadError(ValueError):
    """The reward role's head is not the head its training stored.  Raised on every rank."""


def head_checksum(role: Role) -> dict[str, Any]:
    """Of a scalar head's weights, the same on every rank.  Collective over the world.

    ``sha256`` in their own ``dtype``; ``casts``: by precision, of the weights as a model of that precision holds them
    once it has loaded them, for a checkpoint stores them as they are and loading casts each number by itself.
    """
    mine: list[dict[str, Any]] = []
    if role.engine is not None:
        role.engine.reload()
        role.engine.gather_weights()
        if role.engine.groups.is_last_stage:
            weights = [(name, weight.detach().cpu()) for name, weight in _head(role.engine.chunks[-1])]
            casts = {_name_of(dtype): _digest(weights, dtype) for dtype in _PRECISIONS}
            own = _name_of(weights[0][1].dtype)
            mine = [{"sha256": casts[own], "dtype": own, "casts": casts}]
    found = gather_in_order(mine)
    different = len({tuple(one["casts"].values()) for one in found})
    if different != 1:
        raise RewardHeadError(f"the ranks of role {role.name!r} hold {different} different heads; report this")
    checksum: dict[str, Any] = found[0]
    return checksum


def _head(stage: Any) -> list[tuple[str, Tensor]]:
    return sorted(stage.output_layer.named_parameters())


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digest(weights: Sequence[tuple[str, Tensor]], dtype: torch.dtype) -> str:
    digest = hashlib.sha256()
    for name, weight in weights:
        digest.update(f"{name} {list(weight.shape)}".encode())
        digest.update(weight.to(dtype).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def require_head(role: Role, stored: Mapping[str, Any] | None, source: str) -> str:
    """Compare with what the training of ``source`` stored; says what was found, in words.

    Raises RewardHeadError where they differ.  A converted checkpoint stores no checksum, and an old one only that of
    its own precision: then there may be nothing to compare.
    """
    found = head_checksum(role)
    dtype, loaded = found["dtype"], found["sha256"]
    name = f"reward head {loaded[:16]} ({dtype}) of {source}"
    if stored is None:
        return f"{name}: its checkpoint stores no checksum to compare with"
    expected = stored.get("casts", {stored["dtype"]: stored["sha256"]}).get(dtype)
    if expected is None:
        return f"{name}: its checkpoint stores a checksum in {stored['dtype']} alone, so not compared"
    if expected != loaded:
        raise RewardHeadError(
            f"the reward role's head is not the one that {source} was trained to: sha256 {loaded[:16]} ({dtype}) is "
            f"loaded, {expected[:16]} was stored. Name the reward run itself as algorithm.reward.load, and its "
            "role as algorithm.reward.load_role"
        )
    rounded = "" if stored["dtype"] == dtype else f", cast from {stored['dtype']}"
    return f"{name}: the very head that was trained{rounded}"
