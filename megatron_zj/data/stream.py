"""Streams: batches without end, in an order that depends on the seed alone, from a state of a few integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, overload

from megatron_zj.config.data import CorpusConfig, DataConfig
from megatron_zj.data.batch import Batch
from megatron_zj.data.corpus import Split
from megatron_zj.data.errors import DataError
from megatron_zj.data.order import Draw, EpochOrder
from megatron_zj.data.sources import corpus_units, row_units
from megatron_zj.data.tokenizer import Tokenizer


class Stream(Protocol):
    """What an algorithm draws from."""

    @property
    def num_units(self) -> int:
        """Rows, samples or ranked groups in an epoch."""

    def next(self, num_units: int, rank: int, world_size: int) -> Batch:
        """This rank's contiguous share (as torch.tensor_split cuts) of the next ``num_units`` units of the order.

        Every rank advances by ``num_units``, whatever its share, so the order is global: another ``world_size``
        from here on meets the same units.
        """

    def describe(self, draw: int) -> str:
        """Where draw number ``draw`` came from: the file and record, for messages."""

    def state_dict(self) -> dict[str, Any]:
        """JSON types only."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly there.  Raises DataError when the data is not the state's."""


class Units(Protocol):
    """What a stream draws: units by draw, and a name for their content."""

    @property
    def num_units(self) -> int:
        """Units in an epoch."""

    @property
    def checksum(self) -> str:
        """Of the content and of all settings that decide units."""

    def batch(self, draws: Sequence[Draw]) -> Batch:
        """The rows of these draws, with their fields; also of none."""

    def describe(self, draw: Draw) -> str:
        """Where a draw's unit came from."""


class OrderedStream:
    """Units in the keyed order of each epoch."""

    def __init__(self, units: Units, seed: int, *, shuffle: bool) -> None:
        if units.num_units < 1:
            raise DataError("the data has no usable unit\n  -> check data.files and the counts of records left out")
        self._units = units
        self._seed = seed
        self._shuffle = shuffle
        self._order = EpochOrder(units.num_units, seed, shuffle)

    @property
    def num_units(self) -> int:
        return self._units.num_units

    def next(self, num_units: int, rank: int, world_size: int) -> Batch:
        if num_units < 0 or not 0 <= rank < world_size:
            raise ValueError(f"need num_units >= 0 and 0 <= rank < world_size, got {num_units}, {rank}, {world_size}")
        first, last = share(num_units, rank, world_size)
        draws = self._order.draws(first, last)
        self._order.advance(num_units)
        return self._units.batch(draws)

    def describe(self, draw: int) -> str:
        epoch, position = divmod(draw, self.num_units)
        order = EpochOrder(self.num_units, self._seed, self._shuffle)
        order.epoch, order.position = epoch, position
        return self._units.describe(order.draws(0, 1)[0])

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self._order.epoch,
            "position": self._order.position,
            "seed": self._seed,
            "num_units": self.num_units,
            "checksum": self._units.checksum,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = self.state_dict()
        for name in ("seed", "num_units", "checksum"):
            if state[name] != own[name]:
                raise DataError(
                    f"the checkpoint's data position belongs to other data: {name} was {state[name]}, is {own[name]}\n"
                    "  -> resume with the data and seed of that run, or load its weights only into a new run"
                )
        self._order.epoch, self._order.position = int(state["epoch"]), int(state["position"])


def share(num_units: int, rank: int, world_size: int) -> tuple[int, int]:
    """[first, last) of rank's part of range(num_units), cut as torch.tensor_split does."""
    size, extra = divmod(num_units, world_size)
    first = rank * size + min(rank, extra)
    return first, first + size + (1 if rank < extra else 0)


@overload
def build_stream(
    config: DataConfig, tokenizer: Tokenizer, seed: int, split: Literal["train"] = ..., *, progress: bool = ...
) -> Stream: ...
@overload
def build_stream(
    config: DataConfig, tokenizer: Tokenizer, seed: int, split: Split, *, progress: bool = ...
) -> Stream | None: ...
def build_stream(
    config: DataConfig, tokenizer: Tokenizer, seed: int, split: Split = "train", *, progress: bool = False
) -> Stream | None:
    """The stream of a configuration: ``train`` in keyed order, ``validation`` in stored order.

    None: there is no validation data (no files, no fraction, or prompts).  ``progress`` shows a bar while raw files
    are tokenized.  Raises DataError with what to change.
    """
    if not config.files:
        raise DataError("data.files is empty\n  -> name at least one file")
    units: Units | None
    if isinstance(config, CorpusConfig):
        units = corpus_units(config, tokenizer, seed, split)
    else:
        units = row_units(config, tokenizer, split, progress=progress)
    return None if units is None else OrderedStream(units, seed, shuffle=split == "train")
