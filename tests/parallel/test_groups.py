"""Process groups of one and of two placements, and the default-group swap."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.parallel.collectives import broadcast_floats, gather_objects
from megatron_zj.parallel.grid import AXES, RankGrid
from megatron_zj.parallel.groups import ParallelGroups, create_groups, placement_world
from tests.helpers.ranks import run_ranks

HOST = torch.device("cpu")


def _placements() -> dict[str, ParallelGroups | None]:
    layouts = {"a": ParallelConfig(tp=2), "b": ParallelConfig(pp=2, tp=2)}
    grids = {"a": RankGrid.from_config(layouts["a"], 0, 2), "b": RankGrid.from_config(layouts["b"], 2, 4)}
    return create_groups(grids, layouts, 30)


def _two_placements() -> dict[str, object]:
    placements = _placements()
    name, groups = next((name, groups) for name, groups in placements.items() if groups is not None)
    rank = dist.get_rank()
    members = {
        axis: dist.get_process_group_ranks(getattr(groups.pgc, axis)) for axis in ("tp", "pp", "dp", "mp", "embd")
    }
    with placement_world(groups):
        inside = {
            "rank": dist.get_rank(),
            "size": dist.get_world_size(),
            "all": [None] * dist.get_world_size(),
            "tp": dist.get_rank(groups.pgc.tp),
        }
        dist.all_gather_object(inside["all"], rank)
        # A source given by its number in the swapped world
        value = torch.tensor([float(rank)])
        dist.broadcast(value, dist.get_global_rank(groups.pgc.tp, 0), group=groups.pgc.tp)
        inside["from_tp0"] = value.item()
        if groups.pp_size == 2:  # one placement alone meets: this hangs if the world is anything else
            dist.barrier()
    assert dist.get_rank() == rank
    assert dist.get_world_size() == 6
    return {
        "name": name,
        "holds": [key for key, value in placements.items() if value is not None],
        "members": members,
        "inside": inside,
        "place": dict(groups.coordinates),
        "last": groups.last_stage_rank,
        "broadcast": broadcast_floats([rank], groups.last_stage_rank, groups.pgc.pp, HOST),
        "objects": gather_objects(rank, groups.pgc.tp),
        "outside": dist.get_process_group_ranks(groups.pgc.tp),
    }


def test_two_placements_with_different_layouts() -> None:
    results = run_ranks(6, _two_placements, timeout=60)
    assert [result["name"] for result in results] == ["a", "a", "b", "b", "b", "b"]
    assert all(result["holds"] == [result["name"]] for result in results)
    last = results[5]
    assert last["place"] == {"pp": 1, "dp": 0, "cp": 0, "tp": 1}
    assert last["members"] == {"tp": [4, 5], "pp": [3, 5], "dp": [5], "mp": [2, 3, 4, 5], "embd": [3, 5]}
    assert last["inside"] == {"rank": 3, "size": 4, "all": [2, 3, 4, 5], "tp": 1, "from_tp0": 4.0}
    assert results[1]["inside"]["all"] == [0, 1]
    assert last["outside"] == [4, 5]  # the numbers are global again
    assert results[3]["broadcast"] == [5.0]
    assert results[4]["objects"] == [4, 5]


def _every_field() -> int:
    layout = ParallelConfig(tp=2)
    groups = create_groups({"all": RankGrid.from_config(layout, 0, 2)}, {"all": layout}, 30)["all"]
    assert groups is not None
    assert [getattr(groups, f"{axis}_size") for axis in AXES] == [1, 1, 1, 2]
    assert groups.is_first_stage
    assert groups.is_last_stage
    for field in ("tp", "pp", "cp", "dp", "dp_cp", "mp", "embd", "pos_embd", "ep", "expt_dp", "tp_ep_pp"):
        assert getattr(groups.pgc, field).rank() >= 0
    for bad, match in (
        (
            {"a": RankGrid.from_config(layout, 0, 2), "b": RankGrid.from_config(ParallelConfig(pp=2), 0, 2)},
            "one placem",
        ),
        ({"a": RankGrid.from_config(layout, 2, 2)}, "the world has 2 ranks"),
    ):
        with pytest.raises(ValueError, match=match):
            create_groups(bad, dict.fromkeys(bad, layout), 30)
    return groups.tp_rank


def test_groups_carry_what_megatron_core_asks_for_and_refuse_the_impossible() -> None:
    assert run_ranks(2, _every_field, timeout=60) == [0, 1]
