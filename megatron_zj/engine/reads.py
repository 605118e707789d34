"""Which slots of a pack have outputs that are read: the last layer and the head compute nothing for the others.

An SFT loss reads the assistant's words, a score one token a row.  Of a model of L layers the last one's output
projection and MLP, some 3/4 of a layer, are spared for every slot that is not read, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_zj.config.model import Want
from megatron_zj.data.packing import PackedBatch
from megatron_zj.engine.microbatches import MicroBatches
from megatron_zj.engine.objective import Objective, Selective

Asked = Callable[[PackedBatch], Tensor]  # [T] bool


def asked_by(objective: Objective) -> Asked | None:
    """The slots whose outputs an objective reads; None: all."""
    if isinstance(objective, Selective):
        return lambda packed: packed.targets & (objective.needs(packed) != 0)
    return asked_for(objective.wants)


def asked_for(wants: Sequence[Want], at: str | None = None) -> Asked | None:
    """The slots that ``wants`` need; None: all.

    Scores: each row's last token.  Else the predictions of the tokens where the per-token field ``at`` is not 0.
    """
    if tuple(wants) == ("scores",):
        return lambda packed: torch.zeros_like(packed.targets).index_fill_(0, packed.last[packed.last >= 0], True)
    return None if at is None else lambda packed: packed.targets & (_field(packed, at) != 0)


def _field(packed: PackedBatch, name: str) -> Tensor:
    if name not in packed.per_token:
        raise ValueError(f"the rows have no per-token field {name!r}; theirs are {', '.join(sorted(packed.per_token))}")
    return packed.per_token[name]


def narrowed(micro: MicroBatches, asked: Asked | None) -> MicroBatches:
    """The same packs with the slots of ``asked`` named.

    How many they are the host must know: on a device this waits for it, and so it comes before anything is queued.
    """
    if asked is None:
        return micro
    return replace(micro, packs=tuple(replace(one, read=asked(one).nonzero().squeeze(1)) for one in micro.packs))
