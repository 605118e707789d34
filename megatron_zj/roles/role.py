"""A role: one model of an algorithm, on its placement.

Every method is collective over the world and returns a ``Pending``, which must be waited for: rows leave at the call,
and the first ``wait`` of any handle computes all calls made so far, in their order.  A rank outside a role's placement
only takes part in the exchange.  So an algorithm reads the same whether its roles share their ranks or not, and two
placements compute at the same time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_zj.config.model import Want
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.engine.engine import Engine
from megatron_zj.engine.objective import Metrics, Objective
from megatron_zj.roles.exchange import Exchange, FieldType, Pending, Transfer, field_types, from_fields, to_fields
from megatron_zj.roles.placement import Placement
from megatron_zj.roles.world import WorldBatch

T = TypeVar("T")


class Role:
    """One model of an algorithm.  ``engine`` is None on ranks outside its placement."""

    def __init__(self, name: str, placement: Placement, engine: Engine | None, exchange: Exchange) -> None:
        self.name = name
        self.placement = placement
        self.engine = engine
        self.exchange = exchange
        if engine is not None:
            placement.engines.append(engine)
            if engine.config.offload_idle:  # room for the models that are built, and loaded, after it
                engine.offload()

    def infer(
        self, want: Want, batch: WorldBatch, temperature: float = 1.0, at: str | None = None
    ) -> Pending[Rows | Tensor]:
        """What the head gives, laid out as ``batch``: token-aligned Rows, or a [rows] tensor of scores.

        ``at``: a per-token field; only where it is not 0 is the answer looked at (``Engine.infer``).
        """
        shards = balance(batch.units(), batch.row_lengths, len(self.placement.shards))
        coming = self._to_shards(batch, shards)
        source: list[Sequence[int]] = [[] for _ in range(dist.get_world_size())]
        for rank, rows in zip(self.placement.answering_ranks, shards, strict=True):
            source[rank] = rows
        kind = FieldType(want, torch.float32, ragged=want != "scores")
        home = self.exchange.move((kind,), batch.row_lengths, source, batch.home)

        def compute(engine: Engine, rows: Batch) -> None:
            answer = engine.infer((want,), rows, temperature, at)
            if answer is not None:
                home.send({want: answer[want]})

        return self._later("infer", coming, compute, lambda: home.wait()[want])

    def update(self, objective: Objective, batch: WorldBatch, row_ids: Sequence[int] | None = None) -> Pending[Metrics]:
        """One optimizer step on the given rows (all of them by default)."""
        return self._measure("update", lambda engine, rows: engine.update(objective, rows), batch, row_ids)

    def evaluate(self, objective: Objective, batch: WorldBatch) -> Pending[Metrics]:
        """The objective's metrics on all rows, without learning."""
        return self._measure("evaluate", lambda engine, rows: engine.evaluate(objective, rows), batch, None)

    def generate(self, sample: Callable[[Engine, Batch], Batch], prompts: WorldBatch) -> WorldBatch:
        """``sample`` on every shard's prompts; the samples go home in the order of the prompts.  Computes at once."""
        shards = balance(prompts.units(), prompts.row_lengths, len(self.placement.shards))
        coming = self._to_shards(prompts, shards)
        self.exchange.catch_up()
        samples: list[Batch] = []
        if self.engine is not None:
            self._run("generate", coming, lambda engine, rows: samples.append(sample(engine, rows)))
        with self.exchange.activity.doing(f"samples of {self.name}"):
            return self._samples_home(samples[0] if samples else None, shards, prompts)

    def _to_shards(self, batch: WorldBatch, shards: Sequence[Sequence[int]]) -> Transfer:
        """Every shard's rows on all its ranks."""
        target: list[Sequence[int]] = [[] for _ in range(dist.get_world_size())]
        for ranks, rows in zip(self.placement.shards, shards, strict=True):
            for rank in ranks:
                target[rank] = rows
        fields = to_fields(batch.local)
        return self.exchange.move(field_types(fields), batch.row_lengths, batch.home, target).send(fields)

    def _run(self, call: str, coming: Transfer, compute: Callable[[Engine, Batch], None]) -> None:
        """This rank's part of a call, under the phases that another rank's report names."""
        assert self.engine is not None
        activity = self.exchange.activity
        with activity.doing(f"rows for {self.name}.{call}"):
            rows = from_fields(coming.wait())
        leaving = self._make_room()
        with activity.doing(f"{self.name}.{call}"):
            compute(self.engine, rows)
        for engine in leaving:
            engine.settle()

    def _make_room(self) -> list[Engine]:
        """This rank's idle models leave the device, by their own settings; those that do.

        With ``overlap_offload`` their copies run while this model computes, and whose turn is next comes back.
        """
        others = [one for one in self.placement.engines if one is not self.engine and one.config.offload_idle]
        coming = [one for one in others if one.config.overlap_offload and one is self.exchange.next_owner]
        leaving = [one for one in others if one not in coming]
        for engine in leaving:
            engine.offload(beside=engine.config.overlap_offload)
        for engine in coming:
            engine.reload(beside=True)
        return leaving

    def _later(
        self, call: str, coming: Transfer, compute: Callable[[Engine, Batch], None], answer: Callable[[], T]
    ) -> Pending[T]:
        """The handle of a call whose rows are under way; see ``Exchange.catch_up``."""
        if self.engine is not None:
            self.exchange.later(self.engine, lambda: self._run(call, coming, compute))

        def finish() -> T:
            self.exchange.catch_up()
            with self.exchange.activity.doing(f"answer of {self.name}.{call}"):
                return answer()

        return Pending(finish)

    def _measure(
        self,
        call: str,
        measure: Callable[[Engine, Batch], Metrics],
        batch: WorldBatch,
        row_ids: Sequence[int] | None,
    ) -> Pending[Metrics]:
        """Metrics on the placement's ranks, told by its first one to the ranks outside."""
        shards = balance(batch.units(row_ids), batch.row_lengths, len(self.placement.shards))
        coming, tag = self._to_shards(batch, shards), self.exchange.next_tag()
        inside, found = self.placement.grid.ranks, [Metrics()]

        def compute(engine: Engine, rows: Batch) -> None:
            found[0] = measure(engine, rows)
            if dist.get_rank() == inside[0]:
                payload = torch.frombuffer(bytearray(json.dumps(found[0]).encode()), dtype=torch.uint8)
                for other in range(dist.get_world_size()):
                    if other not in inside:
                        self.exchange.send(torch.tensor([payload.numel()]), other, tag)
                        self.exchange.send(payload, other, tag)

        outside = self.engine is None
        return self._later(call, coming, compute, lambda: _receive_json(inside[0], tag) if outside else found[0])

    def _samples_home(self, samples: Batch | None, shards: Sequence[Sequence[int]], prompts: WorldBatch) -> WorldBatch:
        """Samples to their prompts' home ranks.  Their lengths are news, so this one is a real collective."""
        answering = self.placement.answering_ranks
        answers = dist.get_rank() in answering
        types = None if samples is None else field_types(to_fields(samples))
        mine = (samples.tokens.lengths.tolist(), types) if samples is not None and answers else None
        everyone: list[tuple[list[int], tuple[FieldType, ...]] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        lengths = [0] * prompts.num_rows
        source: list[Sequence[int]] = [[] for _ in everyone]
        known: tuple[FieldType, ...] = ()
        for rank, rows in zip(answering, shards, strict=True):
            told = everyone[rank]
            if told is None:
                raise RuntimeError(f"rank {rank} generated nothing for role {self.name}")
            source[rank], known = rows, told[1]
            for row, length in zip(rows, told[0], strict=True):
                lengths[row] = length
        home = self.exchange.move(known, lengths, source, prompts.home)
        local = from_fields((home.send(to_fields(samples)) if samples is not None and answers else home).wait())
        by_rank = tuple(tuple(lengths[row] for row in rows) for rows in prompts.home)
        return WorldBatch(local, by_rank, prompts.groups)


def balance(units: Sequence[Sequence[int]], lengths: Sequence[int], num_shards: int) -> list[list[int]]:
    """Row ids by shard: units go, longest first, to the shard with the fewest tokens; each shard in row order.

    Deterministic, so every rank computes the same split.  (Graham 1969: longest processing time first.)
    """
    shards: list[list[int]] = [[] for _ in range(num_shards)]
    load = [0] * num_shards
    sizes = [(sum(lengths[row] for row in unit), index) for index, unit in enumerate(units)]
    for size, index in sorted(sizes, key=lambda entry: (-entry[0], entry[1])):
        lightest = min(range(num_shards), key=lambda shard: (load[shard], len(shards[shard]), shard))
        shards[lightest].extend(units[index])
        load[lightest] += size
    order = {row: at for at, row in enumerate(row for unit in units for row in unit)}
    return [sorted(shard, key=order.__getitem__) for shard in shards]


def _receive_json(source: int, tag: int) -> Metrics:
    size = torch.zeros(1, dtype=torch.int64)
    dist.recv(size, source, tag=tag)
    payload = torch.empty(int(size), dtype=torch.uint8)
    dist.recv(payload, source, tag=tag)
    metrics: Metrics = json.loads(payload.numpy().tobytes())
    return metrics
