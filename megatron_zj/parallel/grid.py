"""Rank arithmetic: which ranks form which group.  Pure; needs no process group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from types import MappingProxyType

from megatron_zj.config.parallel import ParallelConfig

AXES = ("pp", "dp", "cp", "tp")  # outermost first: tensor-parallel peers are neighbours, on one node


@dataclass(frozen=True)
class RankGrid:
    """``ranks`` laid out row-major over ``AXES``."""

    sizes: Mapping[str, int]  # ranks along each axis
    ranks: tuple[int, ...]  # global ranks

    def __post_init__(self) -> None:
        if set(self.sizes) != set(AXES):
            raise ValueError(f"a grid has the axes {AXES}, got {tuple(self.sizes)}")
        object.__setattr__(self, "sizes", MappingProxyType({axis: self.sizes[axis] for axis in AXES}))
        if prod(self.sizes.values()) != len(self.ranks):
            raise ValueError(f"{self.describe()} needs {prod(self.sizes.values())} ranks, got {len(self.ranks)}")

    @classmethod
    def from_config(cls, parallel: ParallelConfig, first_rank: int, num_ranks: int) -> RankGrid:
        """Ranks ``first_rank`` .. ``first_rank + num_ranks - 1``; data parallelism takes what is left over.

        Raises ValueError when tp x pp x cp does not divide ``num_ranks``.
        """
        if first_rank < 0 or num_ranks < 1:
            raise ValueError(f"need first_rank >= 0 and num_ranks >= 1, got {first_rank} and {num_ranks}")
        if num_ranks % parallel.model_size:
            raise ValueError(
                f"{num_ranks} ranks are not divisible by tp x pp x cp = {parallel.tp} x {parallel.pp} x {parallel.cp} "
                f"= {parallel.model_size}; change the number of ranks or the layout"
            )
        sizes = {
            "pp": parallel.pp,
            "dp": num_ranks // parallel.model_size,
            "cp": parallel.cp,
            "tp": parallel.tp,
        }
        return cls(sizes, tuple(range(first_rank, first_rank + num_ranks)))

    def describe(self) -> str:
        """For messages: ``pp2 dp1 cp1 tp4``."""
        return " ".join(f"{axis}{self.sizes[axis]}" for axis in AXES)

    def coordinates(self, rank: int) -> dict[str, int] | None:
        """Where the global ``rank`` sits, or None when this grid does not hold it."""
        if rank not in self.ranks:
            return None
        index = self.ranks.index(rank)
        place: dict[str, int] = {}
        for axis in reversed(AXES):
            index, place[axis] = divmod(index, self.sizes[axis])
        return {axis: place[axis] for axis in AXES}

    def groups(self, *axes: str) -> list[tuple[int, ...]]:
        """All the groups whose members differ only along ``axes``, in a fixed order, members in rank order."""
        unknown = set(axes) - set(AXES)
        if unknown:
            raise ValueError(f"unknown axes {sorted(unknown)}; there are {AXES}")
        fixed = [axis for axis in AXES if axis not in axes]
        members: dict[tuple[int, ...], list[int]] = {
            key: [] for key in product(*(range(self.sizes[axis]) for axis in fixed))
        }
        for rank, place in zip(self.ranks, product(*(range(self.sizes[axis]) for axis in AXES)), strict=True):
            coordinate = dict(zip(AXES, place, strict=True))
            members[tuple(coordinate[axis] for axis in fixed)].append(rank)
        return [tuple(ranks) for ranks in members.values()]
