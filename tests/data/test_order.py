"""The order of an epoch: a permutation, the same everywhere, from any position."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zj.data.order import EpochOrder, KeyedPermutation
from megatron_zj.runtime.seed import keyed_seed


@settings(max_examples=60)
@given(size=st.integers(1, 700), seed=st.integers(0, 2**62), key=st.integers(0, 9))
def test_keyed_permutation_is_a_permutation(size: int, seed: int, key: int) -> None:
    order = KeyedPermutation(size, seed, "order", key).many(np.arange(size, dtype=np.uint64))
    assert sorted(order.tolist()) == list(range(size))


def test_keyed_permutation_depends_on_every_key_and_on_nothing_else() -> None:
    indices = np.arange(500, dtype=np.uint64)
    first = KeyedPermutation(500, 7, "order", 0)
    assert (first.many(indices) == KeyedPermutation(500, 7, "order", 0).many(indices)).all()
    for seed, key in ((8, 0), (7, 1)):
        other = KeyedPermutation(500, seed, "order", key).many(indices)
        assert (first.many(indices) == other).mean() < 0.05


def feistel(index: int, size: int, seed: int, *keys: int | str) -> int:
    """The permutation in plain integers: another order would silently change every resumed run."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    while True:
        left, right = index >> half, index & ((1 << half) - 1)
        for number in range(6):
            mixed = (right + keyed_seed(seed, *keys, "feistel", number)) % 2**64
            mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
            left, right = right, left ^ ((mixed ^ (mixed >> 31)) & ((1 << half) - 1))
        index = (left << half) | right
        if index < size:
            return index


@pytest.mark.parametrize("size", [1, 2, 3, 17, 1000, 10**12])
def test_keyed_permutation_equals_plain_integers(size: int) -> None:
    order = KeyedPermutation(size, 11, "order", 3)
    for index in {0, size // 3, size - 1}:
        assert order(index) == feistel(index, size, 11, "order", 3)


def test_keyed_permutation_looks_random() -> None:
    """Over 800 keys, where element 0 of 8 goes is uniform (chi-square, 7 degrees, far below the 0.1 % point)."""
    places = [KeyedPermutation(8, seed, "x")(0) for seed in range(800)]
    counts = np.bincount(places, minlength=8)
    assert ((counts - 100) ** 2 / 100).sum() < 24.3
    large = KeyedPermutation(10_000, 3, "x").many(np.arange(10_000, dtype=np.uint64))
    assert abs(np.corrcoef(np.arange(10_000), large)[0, 1]) < 0.05


def test_huge_orders_cost_no_memory() -> None:
    order = KeyedPermutation(10**15, 1, "x")
    found = {order(index) for index in (0, 1, 2, 10**15 - 1)}
    assert len(found) == 4
    assert all(0 <= place < 10**15 for place in found)


def test_index_outside_is_refused() -> None:
    with pytest.raises(IndexError, match="5"):
        KeyedPermutation(5, 0)(5)
    with pytest.raises(ValueError, match="at least one"):
        KeyedPermutation(0, 0)


@settings(max_examples=60)
@given(
    size=st.integers(1, 40),
    steps=st.lists(st.integers(0, 60), max_size=6),
    shuffle=st.booleans(),
)
def test_every_epoch_draws_each_unit_once_however_it_is_stepped(size: int, steps: list[int], shuffle: bool) -> None:
    order = EpochOrder(size, 5, shuffle)
    seen = []
    for count in steps:
        seen += order.draws(0, count)
        order.advance(count)
    assert [draw.number for draw in seen] == list(range(len(seen)))
    assert seen == EpochOrder(size, 5, shuffle).draws(0, sum(steps))
    for epoch in range(len(seen) // size):
        indices = [draw.index for draw in seen if draw.epoch == epoch]
        assert sorted(indices) == list(range(size))
        assert shuffle or indices == list(range(size))
