"""Slots stay dense, every sample ends once, and a row's cache follows it when it moves."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_zj.rollout.scheduler import Sample, Scheduler


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), max_size=20), st.integers(1, 6))
def test_every_sample_is_decoded_to_its_end_in_its_own_slot(rows: list[tuple[int, int]], num_slots: int) -> None:
    samples = [Sample(i, torch.tensor([i]), torch.zeros(8), limit) for i, (limit, _) in enumerate(rows)]
    stops = [stop for _, stop in rows]
    scheduler = Scheduler(samples, num_slots)
    cache: dict[int, int] = {}  # slot -> row whose keys it holds
    while True:
        coming = scheduler.admit()
        for offset, sample in enumerate(coming):
            cache[len(scheduler.active) - len(coming) + offset] = sample.row
        if not scheduler.active:
            break
        assert len(scheduler.active) <= num_slots
        for slot, sample in enumerate(scheduler.active):
            assert cache[slot] == sample.row
            sample.record(9 if len(sample.tokens) == stops[sample.row] else 1, -0.5, frozenset({9}))
        for source, target in scheduler.retire():
            cache[target] = cache[source]
    assert sorted(sample.row for sample in scheduler.finished) == list(range(len(rows)))
    for sample in scheduler.finished:
        limit, stop = rows[sample.row]
        assert len(sample.tokens) == min(limit, stop + 1)
        assert sample.stopped == (stop < limit)
