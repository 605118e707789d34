"""Rows move to where they are wanted, whole, in order, whatever the split and the number of calls under way."""

import random

import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatron_zj.data.batch import Batch, Rows
from megatron_zj.roles.exchange import Exchange, FieldType, field_types, from_fields, to_fields
from megatron_zj.roles.role import balance
from megatron_zj.roles.world import WorldBatch
from tests.helpers.ranks import run_ranks

LENGTHS = [3, 0, 1, 7, 2, 5, 4]


def _row(index: int) -> torch.Tensor:
    return torch.arange(LENGTHS[index]) + 100 * index


def _batch(rows: list[int]) -> Batch:
    tokens = Rows.of([_row(index) for index in rows], torch.int64)
    halves = tokens.replace(tokens.values.double() / 2)
    return Batch(tokens, {"half": halves}, {"id": torch.tensor(rows, dtype=torch.int32).reshape(-1, 1)})


def _check_moves(seed: int) -> None:
    rank, world, exchange, pick = dist.get_rank(), dist.get_world_size(), Exchange(), random.Random(seed)
    pending = []
    for _ in range(40):
        order = pick.sample(range(len(LENGTHS)), len(LENGTHS))
        cuts = sorted(pick.choices(range(len(LENGTHS) + 1), k=world - 1))
        source = [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(order)], strict=True)]
        target = [pick.choices(range(len(LENGTHS)), k=pick.randrange(5)) for _ in range(world)]
        target = [list(dict.fromkeys(rows)) for rows in target]
        fields = to_fields(_batch(source[rank]))
        pending.append((exchange.move(field_types(fields), LENGTHS, source, target).send(fields), target[rank]))
    pick.shuffle(pending)  # waiting in another order than calling must not matter
    for move, wanted in pending:
        found, expected = from_fields(move.wait()), _batch(wanted)
        assert torch.equal(found.tokens.values, expected.tokens.values)
        assert torch.equal(found.tokens.lengths, expected.tokens.lengths)
        assert torch.equal(found.per_token["half"].values, expected.per_token["half"].values)
        assert torch.equal(found.per_row["id"], expected.per_row["id"])
    exchange.flush()


def test_rows_arrive_whole_in_the_order_wanted() -> None:
    for world in (1, 3):
        run_ranks(world, _check_moves, 5, timeout=60)


def _gather() -> tuple[list[list[int]], list[int], list[list[int]]]:
    rank = dist.get_rank()
    mine = [[0, 1], [], [2]][rank]
    local = Batch(Rows.of([_row(index) for index in mine], torch.int64), {}, {"group": torch.tensor(mine) // 2})
    batch = WorldBatch.gather(local)
    return batch.home, batch.row_lengths, batch.units([0, 2, 1])


def test_every_rank_knows_all_lengths_and_groups() -> None:
    for home, lengths, units in run_ranks(3, _gather):
        assert home == [[0, 1], [], [2]]
        assert lengths == LENGTHS[:3]
        assert units == [[0, 1], [2]]


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 6), st.integers(1, 4))
def test_balance_keeps_units_whole_and_every_row_once(lengths: list[int], num_shards: int, unit: int) -> None:
    units = [list(range(start, min(start + unit, len(lengths)))) for start in range(0, len(lengths), unit)]
    shards = balance(units, lengths, num_shards)
    assert sorted(row for shard in shards for row in shard) == list(range(len(lengths)))
    assert all(len({shard for shard, rows in enumerate(shards) if set(rows) & set(rows_of)}) == 1 for rows_of in units)
    loads = [sum(lengths[row] for row in shard) for shard in shards]
    biggest = max((sum(lengths[row] for row in rows_of) for rows_of in units), default=0)
    assert max(loads) - min(loads) <= biggest


def test_bytes_of_a_row_follow_its_type() -> None:
    assert FieldType("x", torch.int64).num_bytes(3) == 24
    assert FieldType("x", torch.float32, (2,)).num_bytes(3) == 24
    assert FieldType("x", torch.float32, (), ragged=False).num_bytes(3) == 4
