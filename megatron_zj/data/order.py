"""The order of an epoch, computed, never stored: a permutation keyed by (seed, epoch).

Every rank computes the same order without a message, and a state is two integers however large the data is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_zj.runtime.seed import keyed_seed

_ROUNDS = 6
_MASK = (1 << 64) - 1


class KeyedPermutation:
    """A permutation of range(size) in O(1) memory: a Feistel network with cycle walking.

    Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains".  The smallest even number of bits that holds
    ``size`` is permuted by ``_ROUNDS`` Feistel rounds; values outside range(size) are permuted again until inside
    (fewer than four times on average).
    """

    def __init__(self, size: int, seed: int, *keys: int | str) -> None:
        if size < 1:
            raise ValueError(f"a permutation needs at least one element, got {size}")
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._round_keys = [keyed_seed(seed, *keys, "feistel", number) for number in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Where ``index`` goes; both in range(size)."""
        return int(self.many(np.array([index], dtype=np.uint64))[0])

    def many(self, indices: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Element-wise, for indices in range(size)."""
        if indices.size and int(indices.max()) >= self.size:
            raise IndexError(f"index {int(indices.max())} is outside range({self.size})")
        values = self._once(indices.astype(np.uint64))
        outside = values >= np.uint64(self.size)
        while outside.any():
            values[outside] = self._once(values[outside])
            outside = values >= np.uint64(self.size)
        return values.astype(np.int64)

    def _once(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        bits = np.uint64(self._half_bits)
        mask = np.uint64((1 << self._half_bits) - 1)
        left, right = values >> bits, values & mask
        for key in self._round_keys:
            left, right = right, left ^ (_mixed(right, key) & mask)
        return (left << bits) | right


@dataclass(frozen=True)
class Draw:
    """One unit of the order.  ``number`` counts from the start of the run and never repeats."""

    number: int
    epoch: int
    index: int  # which unit, in range(num_units)


class EpochOrder:
    """Units without end, epoch after epoch, from any (epoch, position)."""

    def __init__(self, num_units: int, seed: int, shuffle: bool) -> None:
        self.num_units = num_units
        self.epoch = 0
        self.position = 0  # units of this epoch that were drawn
        self._seed = seed
        self._shuffle = shuffle

    def draws(self, first: int, last: int) -> list[Draw]:
        """The draws [first, last) counted from the current position; nothing advances."""
        found: list[Draw] = []
        start = self.epoch * self.num_units + self.position
        number, end = start + first, start + last
        while number < end:
            epoch, position = divmod(number, self.num_units)
            run = min(end - number, self.num_units - position)
            indices = np.arange(position, position + run, dtype=np.uint64)
            if self._shuffle:
                order = KeyedPermutation(self.num_units, self._seed, "order", epoch).many(indices).tolist()
            else:
                order = indices.tolist()
            found += [Draw(number + offset, epoch, index) for offset, index in enumerate(order)]
            number += run
        return found

    def advance(self, num_units: int) -> None:
        """Count ``num_units`` as drawn."""
        epochs, self.position = divmod(self.position + num_units, self.num_units)
        self.epoch += epochs


def _mixed(values: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele et al. 2014) over value + key; uint64 arrays wrap around."""
    mixed = values + np.uint64(key & _MASK)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
