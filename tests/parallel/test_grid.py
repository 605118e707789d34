"""Rank arithmetic against worked examples and its defining properties."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.parallel.grid import AXES, RankGrid

sizes = st.fixed_dictionaries({axis: st.integers(1, 3) for axis in AXES})


def test_eight_ranks_tp2_pp2_dp2_by_hand() -> None:
    grid = RankGrid.from_config(ParallelConfig(tp=2, pp=2), 0, 8)
    assert grid.sizes == {"pp": 2, "dp": 2, "cp": 1, "tp": 2}
    assert grid.groups("tp") == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert grid.groups("dp") == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert grid.groups("pp") == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert grid.groups("pp", "tp") == [(0, 1, 4, 5), (2, 3, 6, 7)]
    assert grid.coordinates(6) == {"pp": 1, "dp": 1, "cp": 0, "tp": 0}


def test_a_placement_may_start_anywhere() -> None:
    grid = RankGrid.from_config(ParallelConfig(pp=2), 4, 4)
    assert grid.groups("pp") == [(4, 6), (5, 7)]
    assert grid.coordinates(3) is None


@given(sizes, st.integers(0, 5), st.sets(st.sampled_from(AXES)))
def test_groups_partition_the_ranks_and_members_differ_only_along_the_axes(
    sizes: dict[str, int], first: int, axes: set[str]
) -> None:
    count = math.prod(sizes.values())
    grid = RankGrid(sizes, tuple(range(first, first + count)))
    groups = grid.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(grid.ranks)
    for group in groups:
        assert len(group) == math.prod(sizes[axis] for axis in axes)
        places = [grid.coordinates(rank) for rank in group]
        for axis in set(AXES) - axes:
            assert len({place[axis] for place in places if place}) == 1


@pytest.mark.parametrize(("first", "count", "match"), [(0, 6, "not divisible by tp x pp x cp"), (-1, 4, "first_rank")])
def test_an_impossible_layout_is_refused(first: int, count: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        RankGrid.from_config(ParallelConfig(tp=4), first, count)
