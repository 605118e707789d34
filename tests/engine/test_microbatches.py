"""Rows into packs and back: nothing lost, nothing twice, shapes that every layout accepts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.data.batch import GROUP, Batch, Rows
from megatron_zj.engine.microbatches import rows_from_packs, scores_from_packs, slot_multiple, split
from megatron_zj.parallel.grid import RankGrid
from megatron_zj.parallel.groups import ParallelGroups

lengths_lists = st.lists(st.integers(1, 20), max_size=9)


def _groups(**axes: Any) -> ParallelGroups:
    parallel = ParallelConfig(**axes)
    grid = RankGrid.from_config(parallel, 0, parallel.model_size)
    return ParallelGroups(grid, parallel, None, None, {"pp": 0, "dp": 0, "cp": 0, "tp": 0}, 0, 60)  # type: ignore[arg-type]


def _batch(lengths: list[int]) -> Batch:
    tokens = Rows.of([torch.arange(length) + 100 * row for row, length in enumerate(lengths)], torch.int64)
    return Batch(tokens, {"mark": tokens}, {"row": torch.arange(len(lengths))})


LAYOUTS = [
    {},
    {"tp": 2, "sequence_parallel": True},
    {"cp": 2},
    {"pp": 2},
    {"pp": 4, "vpp": 2},
    {"tp": 4, "cp": 2, "pp": 2, "sequence_parallel": True},
]


@pytest.mark.parametrize("axes", LAYOUTS)
@settings(max_examples=25)
@given(lengths=lengths_lists, budget=st.integers(1, 50))
def test_every_row_is_packed_once_and_shapes_fit_the_layout(axes: Any, lengths: list[int], budget: int) -> None:
    groups = _groups(**axes)
    micro = split(_batch(lengths), groups, budget)
    assert sorted(row for packed in micro.packs for row in packed.row_ids) == list(range(len(lengths)))
    totals = [packed.cu_seqlens_list[-1] for packed in micro.packs]
    assert max(totals) == micro.length
    for packed, total in zip(micro.packs, totals, strict=True):
        assert total > 0
        assert total % slot_multiple(groups) == 0
        assert packed.tokens.shape[0] == total // groups.cp_size
        assert packed.tokens.shape[0] % (groups.tp_size if groups.parallel.sequence_parallel else 1) == 0
        if len(packed.row_ids) > 1:
            assert sum(packed.lengths) <= budget
    if groups.pp_size > 1:
        assert set(totals) == {micro.length}
    if groups.vpp_size > 1:
        assert len(micro.packs) % groups.pp_size == 0


@pytest.mark.parametrize("axes", LAYOUTS)
@pytest.mark.parametrize("lengths", [[], [1], [16], [5, 9, 17, 1]])
def test_for_fp8_every_ranks_share_is_a_multiple_of_sixteen(axes: Any, lengths: list[int]) -> None:
    groups = _groups(**axes)
    for packed in split(_batch(lengths), groups, 20, fp8=True).packs:
        shards = groups.tp_size if groups.parallel.sequence_parallel else 1
        assert packed.tokens.shape[0] % (16 * shards) == 0


@given(lengths=lengths_lists, budget=st.integers(1, 50))
def test_outputs_come_back_in_row_order_at_the_tokens_own_index(lengths: list[int], budget: int) -> None:
    groups, batch = _groups(tp=2, sequence_parallel=True), _batch(lengths)
    micro = split(batch, groups, budget)
    rows = rows_from_packs([packed.per_token["mark"] for packed in micro.packs], micro, groups)
    assert rows.lengths.tolist() == lengths
    for index, row in enumerate(rows.split()):
        assert row.tolist() == [0] + [100 * index + token for token in range(1, lengths[index])]
    scores = scores_from_packs([packed.per_row["row"] for packed in micro.packs], micro)
    assert scores.tolist() == list(range(len(lengths)))


@given(lengths=lengths_lists, budget=st.integers(1, 50))
def test_a_whole_pack_is_what_the_shares_of_context_parallelism_are_cut_from(lengths: list[int], budget: int) -> None:
    groups, batch = _groups(tp=2, cp=2, sequence_parallel=True), _batch(lengths)
    micro = split(batch, groups, budget)
    for packed in micro.packs:
        whole = micro.whole(packed, groups)
        assert whole.slots.tolist() == list(range(packed.cu_seqlens_list[-1]))
        assert (whole.cu_seqlens_list, whole.row_ids) == (packed.cu_seqlens_list, packed.row_ids)
        for name in ("tokens", "labels", "targets", "positions"):
            assert getattr(whole, name)[packed.slots].equal(getattr(packed, name))
        assert whole.per_token["mark"][packed.slots].equal(packed.per_token["mark"])
        assert whole.tokens[whole.last].tolist() == [100 * row + lengths[row] - 1 for row in packed.row_ids]


def test_groups_of_rows_that_are_not_neighbours_stay_together_and_come_back_in_order() -> None:
    batch = _batch([4, 5, 6, 3]).with_fields(per_row={GROUP: torch.tensor([7, 8, 7, 8])})
    micro = split(batch, _groups(), 12)
    assert [packed.row_ids for packed in micro.packs] == [(0, 2), (1, 3)]
    assert scores_from_packs([packed.per_row["row"] for packed in micro.packs], micro).tolist() == [0, 1, 2, 3]


def test_without_a_pipeline_there_is_no_padding() -> None:
    micro = split(_batch([3, 5, 9]), _groups(), 8)
    assert [packed.cu_seqlens_list for packed in micro.packs] == [(0, 3, 8), (0, 9)]


def test_a_shard_without_rows_gets_one_dummy_pack() -> None:
    (packed,) = split(_batch([]), _groups(cp=2), 8).packs
    assert packed.num_rows == 0
    assert packed.cu_seqlens_list == (0, 4)
    assert not packed.targets.any()
