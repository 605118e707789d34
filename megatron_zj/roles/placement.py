"""Placements of a run: blocks of ranks with a layout each, and the groups on them."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_zj.config.derived import ALL
from megatron_zj.config.parallel import ParallelConfig, PlacementConfig
from megatron_zj.engine.engine import Engine
from megatron_zj.parallel.grid import RankGrid
from megatron_zj.parallel.groups import ParallelGroups, create_groups


class Placement:
    """A named block of ranks; ``groups`` is None on a rank outside it."""

    def __init__(self, name: str, grid: RankGrid, groups: ParallelGroups | None) -> None:
        self.name = name
        self.grid = grid
        self.groups = groups
        self.engines: list[Engine] = []  # of the roles that live here, on this rank

    @property
    def shards(self) -> list[tuple[int, ...]]:
        """Global ranks of each model replica, by data-parallel index."""
        return self.grid.groups("pp", "cp", "tp")

    @property
    def answering_ranks(self) -> list[int]:
        """By data-parallel index: the rank whose results go home (last stage, first of tp and cp)."""
        answers = []
        for ranks in self.shards:
            for rank in ranks:
                at = self.grid.coordinates(rank)
                if at is not None and at["pp"] == self.grid.sizes["pp"] - 1 and at["tp"] == at["cp"] == 0:
                    answers.append(rank)
        return answers


def build_placements(
    parallel: ParallelConfig,
    named: Mapping[str, PlacementConfig],
    used: set[str],
    world_size: int,
    timeout_seconds: int,
) -> dict[str, Placement]:
    """The placements that roles use.  Collective over the world: groups are created in one order on every rank."""
    configs = {name: config for name, config in sorted(named.items()) if name in used}
    if ALL in used and ALL not in configs:
        configs[ALL] = PlacementConfig(parallel=parallel)
    unknown = used - set(configs)
    if unknown:
        raise ValueError(f"roles use placements that do not exist: {sorted(unknown)}; there are {sorted(configs)}")
    grids = {
        name: RankGrid.from_config(
            config.parallel,
            config.first_rank,
            world_size - config.first_rank if config.num_ranks is None else config.num_ranks,
        )
        for name, config in configs.items()
    }
    groups = create_groups(grids, {name: config.parallel for name, config in configs.items()}, timeout_seconds)
    return {name: Placement(name, grids[name], groups[name]) for name in grids}
