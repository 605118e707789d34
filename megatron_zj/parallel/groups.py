"""Process groups of the placements: created once, passed by argument, never looked up globally."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import distributed_c10d

from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.parallel.grid import AXES, RankGrid

# Fields of ProcessGroupCollection that are plain axis products.  Without experts ``ep`` and ``expt_tp`` are this rank
# alone, and with one optimizer instance ``intra_dist_opt`` is the whole placement.
_AXES_OF_FIELD: dict[str, tuple[str, ...]] = {
    "tp": ("tp",),
    "pp": ("pp",),
    "cp": ("cp",),
    "dp": ("dp",),
    "mp": ("pp", "tp"),
    "tp_ep_pp": ("pp", "tp"),
    "tp_cp": ("cp", "tp"),
    "dp_cp": ("dp", "cp"),
    "intra_dp_cp": ("dp", "cp"),
    "tp_dp_cp": ("dp", "cp", "tp"),
    "ep": (),
    "expt_tp": (),
    "tp_ep": ("tp",),
    "expt_dp": ("dp", "cp"),
    "intra_expt_dp": ("dp", "cp"),
    "intra_dist_opt": AXES,
}


@dataclass(frozen=True)
class ParallelGroups:
    """This rank's groups in one placement."""

    grid: RankGrid
    parallel: ParallelConfig
    pgc: ProcessGroupCollection
    world: dist.ProcessGroup  # the whole placement
    coordinates: Mapping[str, int]  # of this rank, an axis each
    last_stage_rank: int  # global rank of the last stage of this rank's pipeline
    timeout_seconds: float  # how long a collective waits

    @property
    def tp_size(self) -> int:
        """Tensor-parallel ranks."""
        return self.grid.sizes["tp"]

    @property
    def pp_size(self) -> int:
        """Pipeline stages."""
        return self.grid.sizes["pp"]

    @property
    def cp_size(self) -> int:
        """Context-parallel ranks."""
        return self.grid.sizes["cp"]

    @property
    def dp_size(self) -> int:
        """Data-parallel shards."""
        return self.grid.sizes["dp"]

    @property
    def vpp_size(self) -> int:
        """Model chunks a stage."""
        return self.parallel.vpp

    @property
    def tp_rank(self) -> int:
        """Index along tp."""
        return self.coordinates["tp"]

    @property
    def pp_rank(self) -> int:
        """Index along pp: the stage."""
        return self.coordinates["pp"]

    @property
    def cp_rank(self) -> int:
        """Index along cp."""
        return self.coordinates["cp"]

    @property
    def dp_rank(self) -> int:
        """Index along dp: which shard of the rows."""
        return self.coordinates["dp"]

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the head."""
        return self.pp_rank == self.pp_size - 1


def create_groups(
    grids: Mapping[str, RankGrid], parallels: Mapping[str, ParallelConfig], timeout_seconds: int
) -> dict[str, ParallelGroups | None]:
    """Create the groups of all placements; collective over the world, alike on every rank.

    Groups with the same ranks are made once.  None for a placement that does not hold this rank.
    Raises ValueError when a rank would belong to two placements, or is outside the world.
    """
    _check(grids, parallels)
    made: dict[tuple[int, ...], dist.ProcessGroup] = {}
    timeout = timedelta(seconds=timeout_seconds)
    rank = dist.get_rank()

    def make(all_ranks: Sequence[tuple[int, ...]]) -> dist.ProcessGroup | None:
        mine = None
        for ranks in all_ranks:
            if ranks not in made:
                made[ranks] = dist.new_group(list(ranks), timeout=timeout)
            if rank in ranks:
                mine = made[ranks]
        return mine

    result: dict[str, ParallelGroups | None] = {}
    for name, grid in grids.items():
        pipelines = grid.groups("pp")
        fields = {field: make(grid.groups(*axes)) for field, axes in _AXES_OF_FIELD.items()}
        # First and last stage share tied embeddings; the grid has no expression for it.
        fields["embd"] = make([tuple(sorted({ranks[0], ranks[-1]})) for ranks in pipelines])
        fields["pos_embd"] = make([(ranks[0],) for ranks in pipelines])
        coordinates = grid.coordinates(rank)
        world = fields["intra_dist_opt"]
        if coordinates is None or world is None:
            result[name] = None
            continue
        pgc = ProcessGroupCollection(**fields, hcp=None, inter_dist_opt=None)
        own = next(ranks for ranks in pipelines if rank in ranks)
        result[name] = ParallelGroups(grid, parallels[name], pgc, world, coordinates, own[-1], timeout_seconds)
    _share_memory_buffer()
    return result


def _check(grids: Mapping[str, RankGrid], parallels: Mapping[str, ParallelConfig]) -> None:
    if set(grids) != set(parallels):
        raise ValueError(f"placements {sorted(grids)} and layouts {sorted(parallels)} differ")
    owner: dict[int, str] = {}
    for name, grid in grids.items():
        if max(grid.ranks) >= dist.get_world_size():
            raise ValueError(
                f"placement {name!r} needs rank {max(grid.ranks)}, the world has {dist.get_world_size()} ranks"
            )
        for rank in grid.ranks:
            other = owner.setdefault(rank, name)
            if grids[other] != grid:
                raise ValueError(
                    f"rank {rank} is in placements {other!r} and {name!r}; a rank belongs to one placement"
                )


def _share_memory_buffer() -> None:
    """Sequence parallelism takes its all-gather space from a buffer of the process, not of a group."""
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()


@contextlib.contextmanager
def placement_world(groups: ParallelGroups) -> Iterator[None]:
    """For megatron-core calls that have no group argument: they meet this placement, and nothing else.

    Inside, the default process group is the placement's, its ranks count from 0, and the two groups that
    checkpointing still reads from ``parallel_state`` (tensor, and data with context) are the placement's.  Without
    it, optimizer construction and distributed checkpoints wait for ranks of other placements, or mix with them.
    """
    bound = {"_TENSOR_MODEL_PARALLEL_GROUP": groups.pgc.tp, "_DATA_PARALLEL_GROUP_WITH_CP": groups.pgc.dp_cp}
    before = {name: getattr(parallel_state, name) for name in bound}
    for name, group in bound.items():
        setattr(parallel_state, name, group)
    try:
        with _default_group(groups):
            yield
    finally:
        for name, group in before.items():
            setattr(parallel_state, name, group)


@contextlib.contextmanager
def _default_group(groups: ParallelGroups) -> Iterator[None]:
    """Swap torch's default group.  Private torch API, here and nowhere else."""
    default = distributed_c10d._get_default_group()
    if groups.world.size() == default.size():
        yield  # the placement is the world
        return
    renumber = {rank: index for index, rank in enumerate(groups.grid.ranks)}
    maps = distributed_c10d._world.pg_group_ranks
    inside = {group: ranks for group, ranks in maps.items() if ranks.keys() <= renumber.keys()}
    # Torch finds a rank in a group through its number in the default group: renumber every group of the placement.
    maps.update({group: {renumber[rank]: own for rank, own in ranks.items()} for group, ranks in inside.items()})
    distributed_c10d._update_default_pg(groups.world)
    try:
        yield
    finally:
        distributed_c10d._update_default_pg(default)
        maps.update(inside)
