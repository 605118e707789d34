"""Which slots of a pack have outputs that are read: the last layer and the head compute nothing for the others.

An SFT loss reads the assistant's words, a score one token a row.  The last layer's output projection and MLP, some 3/4
of a layer, are spared for every slot that is not read, forward and backward.
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
        return _asked(objective.wants, objective.needs)
    return asked_for(objective.wants)


def asked_for(wants: Sequence[Want], at: str | None = None) -> Asked | None:
    """The slots that ``wants`` need; None: all.

    Scores: each row's last token.  Else the predictions of the tokens where the per-token field ``at`` is not 0.
    """
    if tuple(wants) == ("scores",):
        return _last
    return None if at is None else _asked(wants, lambda packed: packed.per_token[at])


def _asked(wants: Sequence[Want], needs: Callable[[PackedBatch], Tensor]) -> Asked:
    def asked(packed: PackedBatch) -> Tensor:
        found = packed.targets & (needs(packed) != 0)
        return found | _last(packed) if "scores" in wants else found

    return asked


def _last(packed: PackedBatch) -> Tensor:
    return torch.zeros_like(packed.targets).index_fill_(0, packed.last[packed.last >= 0], True)


def narrowed(micro: MicroBatches, asked: Asked | None) -> MicroBatches:
    """The same packs with the slots of ``asked`` named.

    How many they are the host must know: on a device this waits for it, and so it comes before anything is queued.
    """
    if asked is None:
        return micro
    return replace(micro, packs=tuple(replace(one, read=asked(one).nonzero().squeeze(1)) for one in micro.packs))
