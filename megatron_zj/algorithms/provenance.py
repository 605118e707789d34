"""Proof that the reward model which scores is the one that was trained: a checksum of its head.

A reward model whose head was not loaded scores with a random vector, and nothing else in a run shows it.
"""

from __future__ import annotations

import hashlib

import torch

from megatron_zj.roles.role import Role
from megatron_zj.roles.world import gather_in_order


class RewardHeadError(ValueError):
    """The reward role's head is not the head its training stored.  Raised on every rank."""


def head_checksum(role: Role) -> dict[str, str]:
    """``sha256`` of a scalar head's weights in their ``dtype``, the same on every rank.  Collective over the world."""
    mine: list[tuple[str, str]] = []
    if role.engine is not None:
        role.engine.reload()
        role.engine.gather_weights()
        if role.engine.groups.is_last_stage:
            digest, dtype = hashlib.sha256(), torch.float32
            for name, parameter in sorted(role.engine.chunks[-1].output_layer.named_parameters()):
                values, dtype = parameter.detach().cpu().contiguous(), parameter.dtype
                digest.update(f"{name} {list(values.shape)}".encode())
                digest.update(values.view(torch.uint8).numpy().tobytes())
            mine = [(digest.hexdigest(), str(dtype).removeprefix("torch."))]
    found = {tuple(entry) for entry in gather_in_order(mine)}
    if len(found) != 1:
        raise RewardHeadError(f"the ranks of role {role.name!r} hold {len(found)} different heads; report this")
    [(sha256, dtype_name)] = found
    return {"sha256": sha256, "dtype": dtype_name}


def require_head(role: Role, stored: dict[str, str] | None, source: str) -> str:
    """Compare with what the training of ``source`` stored; says what was found, in words.

    Raises RewardHeadError where they differ.  Another precision has other bits, and a converted checkpoint stores no
    checksum: then there is nothing to compare.
    """
    found = head_checksum(role)
    name = f"reward head {found['sha256'][:16]} ({found['dtype']}) of {source}"
    if stored is None:
        return f"{name}: its checkpoint stores no checksum to compare with"
    if stored["dtype"] != found["dtype"]:
        return f"{name}: trained in {stored['dtype']}, so not compared"
    if stored["sha256"] != found["sha256"]:
        raise RewardHeadError(
            f"the reward role's head is not the one that {source} was trained to: sha256 {found['sha256'][:16]} is "
            f"loaded, {stored['sha256'][:16]} was stored. Name the reward run itself as algorithm.reward.load, and its "
            "role as algorithm.reward.load_role"
        )
    return f"{name}: the very head that was trained"
