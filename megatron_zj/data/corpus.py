"""Packed pre-training text: samples of consecutive tokens from indexed datasets, blended by weight.

The documents of a dataset, end to end, are cut into samples of ``sequence_length`` tokens that overlap by one: the
last token of a sample is the first context of the next, so that in an epoch every token of a document but its first
is predicted exactly once, whatever the length.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from megatron_zj.data.batch import Batch, Rows
from megatron_zj.data.errors import DataError
from megatron_zj.data.order import Draw, KeyedPermutation
from megatron_zj.data.prepared import QUIET_SECONDS
from megatron_zj.data.store import open_indexed, read_tokens

Split = Literal["train", "validation"]
_CHUNK = 1 << 24  # ids read at once by check_ids


class DocumentTokens:
    """The tokens of some indexed datasets end to end, with the starts of their documents; mapped, not loaded."""

    def __init__(self, prefixes: Sequence[Path], vocab_size: int) -> None:
        self._prefixes = list(prefixes)
        self._vocab_size = vocab_size
        self._shards = [open_indexed(prefix) for prefix in prefixes]
        sizes = [int(shard.sequence_lengths.sum(dtype=np.int64)) for shard in self._shards]
        self._ends = np.cumsum(sizes)
        starts = []
        for shard, size, end in zip(self._shards, sizes, self._ends, strict=True):
            first = shard.document_indices[:-1]
            item = np.dtype(shard.index.dtype).itemsize
            ends = np.append(shard.index.sequence_pointers // item, size)
            starts.append(ends[first] + (end - size))
        joined = np.concatenate(starts).astype(np.int64)
        self.starts: NDArray[np.int64] = joined[np.diff(joined, append=self.num_tokens) > 0]  # without empty documents

    @property
    def num_tokens(self) -> int:
        """Tokens of all datasets."""
        return int(self._ends[-1])

    def read(self, first: int, last: int) -> Tensor:
        """Ids [first, last) as int64.  Raises DataError on an id outside the vocabulary."""
        parts = []
        shard = int(np.searchsorted(self._ends, first, side="right"))
        while first < last:
            dataset, end = self._shards[shard], int(self._ends[shard])
            begin = int(self._ends[shard - 1]) if shard else 0
            stop = min(last, end)
            if stop > first:
                item = np.dtype(dataset.index.dtype).itemsize
                ids = read_tokens(dataset, (first - begin) * item, stop - first).astype(np.int64)
                _check_ids(ids, self._prefixes[shard], self._vocab_size)
                parts.append(ids)
            first, shard = max(first, stop), shard + 1
        return torch.from_numpy(np.concatenate(parts))

    def name(self, position: int) -> str:
        """The file that holds the token at ``position``, and its document."""
        shard = int(np.searchsorted(self._ends, position, side="right"))
        document = int(np.searchsorted(self.starts, position, side="right")) - 1
        return f"{self._prefixes[shard]}.bin, document {document} of its dataset"


def check_ids(
    prefixes: Sequence[Path], vocab_size: int, rank: int = 0, world_size: int = 1, *, progress: bool = False
) -> None:
    """Read this rank's share of the ids of datasets that nobody vouches for, chunks in turn.

    Raises DataError naming the file for what ``open_indexed`` refuses, and for an id outside the vocabulary.
    ``progress``: a bar where it takes seconds.
    """
    datasets = [open_indexed(prefix) for prefix in prefixes]
    chunks = [
        (number, first, size)
        for number, dataset in enumerate(datasets)
        for size in [int(dataset.sequence_lengths.sum(dtype=np.int64))]
        for first in range(0, size, _CHUNK)
    ]
    mine = chunks[rank::world_size]
    for number, first, size in tqdm(mine, desc="checking ids", delay=QUIET_SECONDS, disable=not progress):
        item = np.dtype(datasets[number].index.dtype).itemsize
        ids = read_tokens(datasets[number], first * item, min(_CHUNK, size - first))
        _check_ids(ids, prefixes[number], vocab_size)


def _check_ids(ids: NDArray[np.integer[Any]], prefix: Path, vocab_size: int) -> None:
    lowest, highest = int(ids.min()), int(ids.max())
    if highest >= vocab_size or lowest < 0:
        raise DataError(
            f"{prefix}.bin holds token id {highest if highest >= vocab_size else lowest}, outside the vocabulary of "
            f"{vocab_size}\n"
            "  -> it was prepared with another tokenizer: prepare it again, or set tokenizer.path to that one"
        )


class SampleSet:
    """Samples of the documents of one split of one dataset."""

    def __init__(self, tokens: DocumentTokens, first: int, last: int, sequence_length: int) -> None:
        """[first, last): token positions of the split; both are document boundaries."""
        self._tokens = tokens
        self._first, self._last = first, last
        self._length = sequence_length

    @property
    def num_samples(self) -> int:
        """Samples an epoch; the last may be shorter."""
        return max(0, math.ceil((self._last - self._first - 1) / (self._length - 1)))

    def sample(self, index: int, *, respect_documents: bool) -> list[Tensor]:
        """The pieces of documents in one sample, in order; a piece of one token predicts nothing and is left out.

        Without ``respect_documents``: the sample as one piece.
        """
        first = self._first + index * (self._length - 1)
        last = min(first + self._length, self._last)
        ids = self._tokens.read(first, last)
        if not respect_documents:
            return [ids]
        starts = self._tokens.starts
        inner = starts[np.searchsorted(starts, first, side="right") : np.searchsorted(starts, last, side="left")]
        sizes = np.diff([first, *inner.tolist(), last]).tolist()
        return [piece for piece in torch.split(ids, sizes) if piece.shape[0] > 1]

    def name(self, index: int) -> str:
        """Where a sample begins."""
        return self._tokens.name(self._first + index * (self._length - 1))


class CorpusUnits:
    """Samples of several datasets.  An epoch has as many samples as the datasets together; a dataset's share of it is
    its weight, and each dataset runs through its own shuffled epochs whatever its share.

    ``loss_mask`` [per token] int64: ones.  ``draw`` [per row]: see Stream.describe.
    """

    def __init__(
        self,
        sets: Sequence[SampleSet],
        weights: Sequence[float] | None,
        *,
        seed: int | None,
        respect_documents: bool,
        checksum: str,
    ) -> None:
        """``seed`` None: each dataset in stored order (validation)."""
        self._sets = list(sets)
        self._seed = seed
        self._respect_documents = respect_documents
        sizes = [samples.num_samples for samples in sets]
        counts = sizes if weights is None else shares(sum(sizes), weights)
        self._ends = np.cumsum(counts)
        settings = repr((checksum, counts, sizes, respect_documents))
        self._checksum = hashlib.sha256(settings.encode()).hexdigest()

    @property
    def num_units(self) -> int:
        return int(self._ends[-1])

    @property
    def checksum(self) -> str:
        return self._checksum

    def describe(self, draw: Draw) -> str:
        dataset, index = self._locate(draw)
        return self._sets[dataset].name(index)

    def batch(self, draws: Sequence[Draw]) -> Batch:
        rows: list[Tensor] = []
        numbers: list[int] = []
        for draw in draws:
            dataset, index = self._locate(draw)
            pieces = self._sets[dataset].sample(index, respect_documents=self._respect_documents)
            rows += pieces
            numbers += [draw.number] * len(pieces)
        tokens = Rows.of(rows, torch.int64)
        return Batch(
            tokens,
            {"loss_mask": tokens.replace(torch.ones_like(tokens.values))},
            {"draw": torch.tensor(numbers, dtype=torch.int64)},
        )

    def _locate(self, draw: Draw) -> tuple[int, int]:
        """The dataset and the sample in it."""
        dataset = int(np.searchsorted(self._ends, draw.index, side="right"))
        begin = int(self._ends[dataset - 1]) if dataset else 0
        share, size = int(self._ends[dataset]) - begin, self._sets[dataset].num_samples
        epoch, position = divmod(draw.epoch * share + draw.index - begin, size)
        if self._seed is None:
            return dataset, position
        return dataset, KeyedPermutation(size, self._seed, "corpus", dataset, epoch)(position)


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """``total`` split in proportion to the weights, by largest remainder."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def split_bounds(tokens: DocumentTokens, validation_fraction: float, split: Split) -> tuple[int, int]:
    """Token positions of a split: validation is the last documents, about that fraction of the tokens."""
    if validation_fraction == 0:
        return (0, tokens.num_tokens) if split == "train" else (tokens.num_tokens, tokens.num_tokens)
    wanted = tokens.num_tokens * (1 - validation_fraction)
    index = int(np.searchsorted(tokens.starts, wanted, side="left"))
    boundary = int(tokens.starts[min(max(index, 1), tokens.starts.size - 1)]) if tokens.starts.size > 1 else 0
    return (0, boundary) if split == "train" else (boundary, tokens.num_tokens)
