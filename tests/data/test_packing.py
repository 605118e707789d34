"""Rows and packs: packing shifts by one and loses nothing."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zj.data.batch import GROUP, Batch, Rows
from megatron_zj.data.packing import pack, padded_length, plan_packs, unpack

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def batch_of(sizes: list[int]) -> Batch:
    """Row r holds 100 r + t + 1; ``field`` is its negative, ``row`` its number."""
    rows = [[100 * r + t + 1 for t in range(size)] for r, size in enumerate(sizes)]
    field = Rows.of([[-float(token) for token in row] for row in rows], torch.float64)
    return Batch(Rows.of(rows, torch.int64), {"field": field}, {"row": torch.arange(len(sizes))})


@settings(max_examples=100)
@given(sizes=lengths, cp=st.sampled_from([1, 2, 4]), more=st.integers(0, 2), data=st.data())
def test_pack_is_prediction_aligned_on_every_context_parallel_rank(
    sizes: list[int], cp: int, more: int, data: st.DataObject
) -> None:
    """Slot by slot against the definition: token t stands at its sequence's t-th slot and speaks of token t + 1."""
    batch = batch_of(sizes)
    row_ids = data.draw(st.lists(st.sampled_from(range(len(sizes))), unique=True, min_size=1))
    unit = 2 * cp if cp > 1 else 1
    real = [sizes[row] for row in row_ids]
    length = padded_length(real, cp) + more * unit if more else None
    starts, total = [], 0
    for size in real:
        starts.append(total)
        total += -(-size // unit) * unit
    packs = [pack(batch, row_ids, cp=cp, cp_rank=rank, length=length) for rank in range(cp)]
    slots = [slot for packed in packs for slot in packed.slots.tolist()]
    assert sorted(slots) == list(range(length or total))
    whole = {
        name: dict(zip(slots, torch.cat([values(packed) for packed in packs]).tolist(), strict=True))
        for name, values in {
            "tokens": lambda p: p.tokens,
            "labels": lambda p: p.labels,
            "targets": lambda p: p.targets,
            "positions": lambda p: p.positions,
            "field": lambda p: p.per_token["field"],
        }.items()
    }
    covered = set()
    for row, start, size in zip(row_ids, starts, real, strict=True):
        tokens = batch.tokens.split()[row].tolist()
        for t in range(size):
            slot = start + t
            covered.add(slot)
            is_last = t == size - 1
            assert whole["tokens"][slot] == tokens[t]
            assert whole["positions"][slot] == t
            assert whole["targets"][slot] is not is_last
            assert whole["labels"][slot] == (0 if is_last else tokens[t + 1])
            assert whole["field"][slot] == (0 if is_last else -tokens[t + 1])
    for slot in set(slots) - covered:  # padding says nothing
        assert not whole["targets"][slot]
        assert whole["tokens"][slot] == whole["labels"][slot] == whole["field"][slot] == 0
    for place, (start, size) in enumerate(zip(starts, real, strict=True)):
        found = [(p.slots[p.last[place]].item()) for p in packs if p.last[place] >= 0]
        assert found == [start + size - 1]  # on exactly one rank
    assert packs[0].per_row["row"].tolist() == row_ids


@settings(max_examples=100)
@given(sizes=lengths, cp=st.sampled_from([1, 2]), more=st.integers(0, 3))
def test_unpack_undoes_the_shift(sizes: list[int], cp: int, more: int) -> None:
    batch = batch_of(sizes)
    unit = 2 * cp if cp > 1 else 1
    length = padded_length(sizes, cp) + more * unit
    packs = [pack(batch, range(len(sizes)), cp=cp, cp_rank=rank, length=length) for rank in range(cp)]
    whole = torch.zeros(length, dtype=torch.float64)
    for packed in packs:
        whole[packed.slots] = packed.per_token["field"]
    rows = unpack(whole, packs[0])
    for got, given_row in zip(rows.split(), batch.per_token["field"].split(), strict=True):
        assert got[0] == 0
        assert got[1:].tolist() == given_row[1:].tolist()


@settings(max_examples=100)
@given(sizes=st.lists(st.integers(1, 30), max_size=12), budget=st.integers(1, 40), data=st.data())
def test_plan_keeps_order_units_and_the_budget(sizes: list[int], budget: int, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(sizes) - 1)))) | {0, len(sizes)})
    cuts = [cut for cut in cuts if cut <= len(sizes)]
    units = [list(range(a, b)) for a, b in itertools.pairwise(cuts) if b > a]
    packs = plan_packs(sizes, units, budget)
    assert [row for packed in packs for row in packed] == list(range(len(sizes)))
    of_row = {row: number for number, packed in enumerate(packs) for row in packed}
    for unit in units:
        assert len({of_row[row] for row in unit}) == 1
    for packed in packs:
        is_one_unit = packed in units
        assert is_one_unit or sum(sizes[row] for row in packed) <= budget
    for first, second in itertools.pairwise(packs):  # greedy: the next unit did not fit
        unit = next(unit for unit in units if unit[0] == second[0])
        assert sum(sizes[row] for row in [*first, *unit]) > budget


def test_pack_of_no_rows_is_all_dummy() -> None:
    packed = pack(batch_of([3]), [], length=4)
    assert packed.num_rows == 0
    assert packed.tokens.tolist() == [0, 0, 0, 0]
    assert not packed.targets.any()
    assert packed.cu_seqlens_list == (0, 4)


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 7 slots do not fit a pack of 6"):
        pack(batch_of([3, 4]), [0, 1], length=6)


@settings(max_examples=60)
@given(sizes=st.lists(st.integers(0, 5), max_size=6), data=st.data())
def test_select_concat_and_split_agree_with_lists(sizes: list[int], data: st.DataObject) -> None:
    batch = batch_of(sizes)
    picked = data.draw(st.lists(st.sampled_from(range(len(sizes))), max_size=8)) if sizes else []
    rows = [row.tolist() for row in batch.tokens.split()]
    chosen = batch.select(picked)
    assert [row.tolist() for row in chosen.tokens.split()] == [rows[i] for i in picked]
    assert chosen.per_row["row"].tolist() == picked
    both = Batch.concat([batch, chosen])
    assert [row.tolist() for row in both.tokens.split()] == rows + [rows[i] for i in picked]
    assert both.tokens.offsets.tolist()[-1] == both.num_tokens


def test_units_are_groups_or_single_rows() -> None:
    batch = batch_of([2, 2, 2, 2])
    assert batch.units() == [[0], [1], [2], [3]]
    grouped = batch.with_fields(per_row={GROUP: torch.tensor([7, 7, 3, 3])})
    assert grouped.units() == [[0, 1], [2, 3]]


def test_fields_of_other_lengths_are_refused() -> None:
    rows = Rows.of([[1, 2], [3]])
    with pytest.raises(ValueError, match="'f' has other lengths"):
        Batch(rows, {"f": Rows.of([[1], [2, 3]])})
    with pytest.raises(ValueError, match="'g' has 3 rows, tokens have 2"):
        Batch(rows, {}, {"g": torch.zeros(3)})
    with pytest.raises(ValueError, match="3 values for lengths that sum to 2"):
        Rows(torch.zeros(3), torch.tensor([2]))
