"""Moving rows between ranks: the only module that knows where a row lives.

Rows travel point to point, from the one rank that holds them to the ranks that want them, as raw bytes on the CPU.
Nothing is negotiated: every rank knows all lengths and types beforehand, posts its sends and receives, and waits only
when it needs the rows.  Calls are numbered alike on every rank, and the number is the message tag.

A role call posts its rows at once and computes later, when the first answer is asked for.  Computing at once would let
a rank send the rows of the next call only after its own work, and the placement that waits for them would stand idle.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_zj.data.batch import Batch, Rows
from megatron_zj.runtime.activity import Activity

T = TypeVar("T")
Fields = Mapping[str, Rows | Tensor]
_CALLS_IN_FLIGHT = 8  # how far a pool may run ahead of the takers of its rows
_PER_TOKEN, _PER_ROW = "per_token/", "per_row/"


@dataclass(frozen=True)
class FieldType:
    """What a field looks like before it is here: ragged or one entry a row, its type, an entry's shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...] = ()  # of one token (ragged) or one row
    ragged: bool = True

    def num_bytes(self, length: int) -> int:
        """Bytes of one row of ``length`` tokens."""
        count = length if self.ragged else 1
        for size in self.shape:
            count *= size
        return count * torch.empty((), dtype=self.dtype).element_size()


def field_types(fields: Fields) -> tuple[FieldType, ...]:
    """Types of fields that are here (zero rows suffice)."""
    types = []
    for name, value in fields.items():
        ragged = isinstance(value, Rows)
        tensor = value.values if isinstance(value, Rows) else value
        types.append(FieldType(name, tensor.dtype, tuple(tensor.shape[1:]), ragged))
    return tuple(types)


def to_fields(batch: Batch) -> dict[str, Rows | Tensor]:
    """A batch as flat named fields."""
    return {
        "tokens": batch.tokens,
        **{_PER_TOKEN + name: rows for name, rows in batch.per_token.items()},
        **{_PER_ROW + name: values for name, values in batch.per_row.items()},
    }


def from_fields(fields: Fields) -> Batch:
    """Undo ``to_fields``."""
    tokens = fields["tokens"]
    if not isinstance(tokens, Rows):
        raise TypeError("the field 'tokens' must be ragged")
    per_token = {n.removeprefix(_PER_TOKEN): v for n, v in fields.items() if n.startswith(_PER_TOKEN)}
    per_row = {n.removeprefix(_PER_ROW): v for n, v in fields.items() if n.startswith(_PER_ROW)}
    return Batch(tokens, per_token, per_row)  # type: ignore[arg-type]


class Exchange:
    """Numbers the calls of a run's roles, keeps buffers alive until they have left, and work until it is wanted.

    ``activity``: where the calls say what this rank is doing.
    """

    def __init__(self, activity: Activity | None = None) -> None:
        self.activity = activity or Activity()
        self._num_calls = 0
        self._sending: deque[tuple[int, dist.Work, Tensor]] = deque()
        self._jobs: deque[tuple[object, Callable[[], None]]] = deque()

    def next_tag(self) -> int:
        """A message tag nobody used; the same on all ranks, because all ranks make the same calls."""
        self._num_calls += 1
        return self._num_calls % 2**24

    def later(self, owner: object, job: Callable[[], None]) -> None:
        """Keep this rank's part of a role call for ``catch_up``.  ``owner``: who will compute."""
        self._jobs.append((owner, job))

    @property
    def next_owner(self) -> object:
        """Who computes after the job that is running; None: nothing waits."""
        return self._jobs[0][0] if self._jobs else None

    def catch_up(self) -> None:
        """Compute everything that was called so far, in the order of the calls."""
        while self._jobs:
            self._jobs.popleft()[1]()

    def send(self, payload: Tensor, rank: int, tag: int) -> None:
        """Post a send; the buffer is kept until it is gone.

        gloo tells that a send is complete only to who waits for it, so sends of long past calls are waited for here:
        their takers have posted the receive at the same call, so the wait ends.
        """
        self.flush(before_call=self._num_calls - _CALLS_IN_FLIGHT)
        work = dist.isend(payload, rank, tag=tag)
        if work is not None:
            self._sending.append((self._num_calls, work, payload))

    def flush(self, before_call: int | None = None) -> None:
        """Wait until everything sent (before a call) has left."""
        while self._sending and (before_call is None or self._sending[0][0] < before_call):
            self._sending.popleft()[1].wait()

    def move(
        self,
        types: Sequence[FieldType],
        lengths: Sequence[int],
        source: Sequence[Sequence[int]],
        target: Sequence[Sequence[int]],
    ) -> Transfer:
        """Start moving rows.  Collective over the world, returns at once.

        ``source[r]``: row ids that rank r will ``send``, in that order; each wanted row is in exactly one.
        ``target[r]``: row ids that rank r wants, in the order it gets them.  ``lengths``: by row id.
        """
        return Transfer(self, self.next_tag(), types, lengths, source, target)


class Transfer:
    """Rows under way.  Receives are posted when it is made; ``send`` gives this rank's rows, ``wait`` what it wants."""

    def __init__(
        self,
        exchange: Exchange,
        tag: int,
        types: Sequence[FieldType],
        lengths: Sequence[int],
        source: Sequence[Sequence[int]],
        target: Sequence[Sequence[int]],
    ) -> None:
        self._exchange, self._tag, self._types, self._lengths = exchange, tag, types, lengths
        self._rank, self._source, self._target = dist.get_rank(), source, target
        self._owner = {row: sender for sender, rows in enumerate(source) for row in rows}
        self._mine: dict[int, dict[str, Tensor]] = {}
        self._works: list[dist.Work] = []
        self._received: list[tuple[list[int], Tensor]] = []
        for sender in range(len(source)):
            wanted = [row for row in target[self._rank] if self._owner[row] == sender]
            if sender == self._rank or not wanted:
                continue
            size = sum(kind.num_bytes(lengths[row]) for row in wanted for kind in types)
            buffer = torch.empty(size, dtype=torch.uint8)
            work = dist.irecv(buffer, sender, tag=tag)
            if work is not None:
                self._works.append(work)
            self._received.append((wanted, buffer))

    def send(self, fields: Fields) -> Transfer:
        """Give the rows that ``source`` says this rank holds; returns at once."""
        if self._source[self._rank]:
            self._mine = _rows_by_id(fields, self._source[self._rank])
        for taker, rows in enumerate(self._target):
            held = [row for row in rows if self._owner[row] == self._rank]
            if taker != self._rank and held:
                self._exchange.send(_encode(self._mine, held, self._types), taker, self._tag)
        return self

    def wait(self) -> dict[str, Rows | Tensor]:
        """Wait for the bytes: the wanted rows, in order.  Once."""
        for work in self._works:
            work.wait()
        order = self._target[self._rank]
        found = {row: self._mine[row] for row in order if row in self._mine}
        for rows, payload in self._received:
            found.update(_decode(payload, rows, self._types, self._lengths))
        self._works, self._received, self._mine = [], [], {}
        return _assemble([found[row] for row in order], self._types)


class Pending(Generic[T]):
    """A result that may still be computed or under way; ``wait`` gives it, as often as asked."""

    def __init__(self, finish: Callable[[], T]) -> None:
        self._finish: Callable[[], T] | None = finish
        self._result: list[T] = []

    def wait(self) -> T:
        """The result."""
        if self._finish is not None:
            self._result.append(self._finish())
            self._finish = None
        return self._result[0]


def _rows_by_id(fields: Fields, row_ids: Sequence[int]) -> dict[int, dict[str, Tensor]]:
    split = {
        name: value.split() if isinstance(value, Rows) else list(value.unbind(0)) for name, value in fields.items()
    }
    return {row: {name: values[at] for name, values in split.items()} for at, row in enumerate(row_ids)}


def _encode(rows: dict[int, dict[str, Tensor]], row_ids: Sequence[int], types: Sequence[FieldType]) -> Tensor:
    pieces = [
        rows[row][kind.name].detach().to("cpu", kind.dtype).contiguous().reshape(-1).view(torch.uint8)
        for row in row_ids
        for kind in types
    ]
    return torch.cat(pieces)


def _decode(
    payload: Tensor, row_ids: Sequence[int], types: Sequence[FieldType], lengths: Sequence[int]
) -> dict[int, dict[str, Tensor]]:
    found: dict[int, dict[str, Tensor]] = {}
    at = 0
    for row in row_ids:
        found[row] = {}
        for kind in types:
            size = kind.num_bytes(lengths[row])
            # a copy: a view of another type needs its own alignment
            values = payload[at : at + size].clone().view(kind.dtype)
            found[row][kind.name] = values.view((lengths[row], *kind.shape) if kind.ragged else kind.shape)
            at += size
    return found


def _assemble(rows: Sequence[dict[str, Tensor]], types: Sequence[FieldType]) -> dict[str, Rows | Tensor]:
    fields: dict[str, Rows | Tensor] = {}
    for kind in types:
        entries = [row[kind.name].detach().to("cpu", kind.dtype) for row in rows]
        if kind.ragged:
            empty = torch.zeros((0, *kind.shape), dtype=kind.dtype)
            lengths = torch.tensor([entry.shape[0] for entry in entries], dtype=torch.int64)
            fields[kind.name] = Rows(torch.cat(entries) if entries else empty, lengths)
        else:
            empty = torch.zeros((0, *kind.shape), dtype=kind.dtype)
            fields[kind.name] = torch.stack(entries) if entries else empty
    return fields
