"""The rank starter itself: results in order, and failures that name the rank."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import RankFailure, run_ranks


def _sum() -> float:
    value = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(value)
    return value.item()


def _fail_on(bad: int, how: str) -> None:
    if dist.get_rank() == bad:
        if how == "raise":
            raise ValueError("planted")
        if how == "die":
            os._exit(7)
        time.sleep(60)
    dist.barrier()


def test_results_come_in_rank_order() -> None:
    assert run_ranks(3, _sum) == [3.0, 3.0, 3.0]


@pytest.mark.parametrize(("how", "message"), [("raise", "rank 1 failed"), ("die", "rank 1 died with exit code 7")])
def test_a_failure_names_the_rank_and_ends_the_others(how: str, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailure, match=message):
        run_ranks(2, _fail_on, 1, how)
    assert time.monotonic() - start < 20


def test_a_hang_shows_where_each_rank_was() -> None:
    with pytest.raises(RankFailure, match="_fail_on"):
        run_ranks(2, _fail_on, 1, "sleep", timeout=2.0)
