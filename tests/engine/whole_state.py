"""A distributed checkpoint in memory: megatron-core's own preparation and merging, without its writer processes."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from torch import Tensor

from megatron_zj.engine.engine import Engine
from megatron_zj.parallel.collectives import gather_objects
from megatron_zj.parallel.groups import placement_world


def _box(tensor: ShardedTensor) -> tuple[slice, ...]:
    """Where the shard stands in the whole tensor."""
    shape = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
    return tuple(slice(start, start + size) for start, size in zip(tensor.global_offset, shape, strict=True))


def save_whole(engine: Engine, optimizer: bool = True) -> tuple[dict[str, Tensor], Any]:
    """Every whole tensor by key, and the unsharded state; the same on all ranks."""
    with placement_world(engine.groups):
        sharded, common = save_preprocess(engine.sharded_state(optimizer=optimizer, loading=False), True)
    mine = [
        (entry.key, tuple(entry.global_shape), _box(entry), entry.data.detach().clone())
        for entry in nested_values(sharded)
        if isinstance(entry, ShardedTensor) and is_main_replica(entry.replica_id)
    ]
    whole: dict[str, Tensor] = {}
    for pieces in gather_objects(mine, engine.groups.world):
        for key, shape, box, data in pieces:  # type: ignore[attr-defined]
            whole.setdefault(key, torch.full(shape, float("nan"), dtype=data.dtype))[box] = data.reshape(
                [part.stop - part.start for part in box]
            )
    assert not any(tensor.isnan().any() for tensor in whole.values()), "some part was saved by no rank"
    return whole, common


def load_whole(engine: Engine, saved: tuple[dict[str, Tensor], Any], optimizer: bool = True) -> None:
    """Into an engine of any layout."""
    whole, common = saved
    with placement_world(engine.groups):
        sharded, local, factories = load_preprocess(engine.sharded_state(optimizer=optimizer, loading=True))

    def fill(entry: Any) -> Any:
        if not isinstance(entry, ShardedTensor):
            return entry
        assert whole[entry.key].shape == tuple(entry.global_shape), entry.key
        return whole[entry.key][_box(entry)].reshape(entry.local_shape).to(entry.dtype)

    state: dict[str, Any] = {}
    for part in (common, local, dict_list_map_inplace(fill, sharded)):
        merge(state, part)
    engine.load_sharded_state(apply_factory_merges(state, factories))
