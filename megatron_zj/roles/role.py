"""A role: one model of an algorithm, on its placement.

Every method is collective over the world and returns a ``Pending`` whose rows or metrics are waited for at first use.
A rank outside the placement only takes part in the exchange, so an algorithm reads the same whether its roles share
their ranks or not, and two placements compute at the same time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_zj.config.model import Want
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.engine.engine import Engine
from megatron_zj.engine.objective import Metrics, Objective
from megatron_zj.roles.exchange import Exchange, FieldType, Pending, field_types, from_fields, to_fields
from megatron_zj.roles.placement import Placement
from megatron_zj.roles.world import WorldBatch


class Role:
    """One model of an algorithm.  ``engine`` is None on ranks outside its placement."""

    def __init__(self, name: str, placement: Placement, engine: Engine | None, exchange: Exchange) -> None:
        self.name = name
        self.placement = placement
        self.engine = engine
        self.exchange = exchange
        if engine is not None:
            placement.engines.append(engine)

    def _ready(self) -> Engine | None:
        """The engine, in device memory; under ``offload_idle`` its neighbours on this rank make room."""
        if self.engine is not None and self.engine.config.offload_idle:
            for neighbour in self.placement.engines:
                if neighbour is not self.engine:
                    neighbour.offload()
        return self.engine

    def infer(self, want: Want, batch: WorldBatch, temperature: float = 1.0) -> Pending[Rows | Tensor]:
        """What the head gives, laid out as ``batch``: token-aligned Rows, or a [rows] tensor of scores."""
        shards = balance(batch.units(), batch.row_lengths, len(self.placement.shards))
        local = self._to_shards(batch, shards)
        answer, engine = None, self._ready()
        if engine is not None and local is not None:
            answer = engine.infer((want,), local, temperature=temperature)
        kind = FieldType(want, torch.float32, ragged=want != "scores")
        source: list[Sequence[int]] = [[] for _ in range(dist.get_world_size())]
        for rank, rows in zip(self.placement.answering_ranks, shards, strict=True):
            source[rank] = rows
        home = self.exchange.move(
            None if answer is None else {want: answer[want]}, (kind,), batch.row_lengths, source, batch.home
        )
        return Pending(lambda: home.wait()[want])

    def update(self, objective: Objective, batch: WorldBatch, row_ids: Sequence[int] | None = None) -> Pending[Metrics]:
        """One optimizer step on the given rows (all of them by default)."""
        return self._measure(lambda engine, rows: engine.update(objective, rows), batch, row_ids)

    def evaluate(self, objective: Objective, batch: WorldBatch) -> Pending[Metrics]:
        """The objective's metrics on all rows, without learning."""
        return self._measure(lambda engine, rows: engine.evaluate(objective, rows), batch, None)

    def generate(self, sample: Callable[[Engine, Batch], Batch], prompts: WorldBatch) -> WorldBatch:
        """``sample`` on every shard's prompts; the samples go home in the order of the prompts."""
        shards = balance(prompts.units(), prompts.row_lengths, len(self.placement.shards))
        local = self._to_shards(prompts, shards)
        engine = self._ready()
        samples = None if engine is None or local is None else sample(engine, local)
        return self._samples_home(samples, shards, prompts)

    def _to_shards(self, batch: WorldBatch, shards: Sequence[Sequence[int]]) -> Batch | None:
        """This rank's shard's rows; None outside the placement."""
        target: list[Sequence[int]] = [[] for _ in range(dist.get_world_size())]
        for ranks, rows in zip(self.placement.shards, shards, strict=True):
            for rank in ranks:
                target[rank] = rows
        fields = to_fields(batch.local)
        moved = self.exchange.move(fields, field_types(fields), batch.row_lengths, batch.home, target)
        return None if self.engine is None else from_fields(moved.wait())

    def _measure(
        self, call: Callable[[Engine, Batch], Metrics], batch: WorldBatch, row_ids: Sequence[int] | None
    ) -> Pending[Metrics]:
        shards = balance(batch.units(row_ids), batch.row_lengths, len(self.placement.shards))
        local = self._to_shards(batch, shards)
        engine = self._ready()
        metrics = None if engine is None or local is None else call(engine, local)
        return self._tell_everyone(metrics)

    def _tell_everyone(self, metrics: Metrics | None) -> Pending[Metrics]:
        """Metrics from the placement's first rank to the ranks outside it."""
        tag, first, rank = self.exchange.next_tag(), self.placement.grid.ranks[0], dist.get_rank()
        if metrics is None:
            return Pending(lambda: _receive_json(first, tag))
        if rank == first:
            payload = torch.frombuffer(bytearray(json.dumps(metrics).encode()), dtype=torch.uint8)
            for other in range(dist.get_world_size()):
                if other not in self.placement.grid.ranks:
                    self.exchange.send(torch.tensor([payload.numel()]), other, tag)
                    self.exchange.send(payload, other, tag)
        return Pending(lambda: metrics)

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
        fields = to_fields(samples) if samples is not None and answers else None
        local = from_fields(self.exchange.move(fields, known, lengths, source, prompts.home).wait())
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
