"""One rank, for tests that look at a model and not at its layout."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.parallel.groups import ParallelGroups
from tests.models.layouts import make_groups


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ParallelGroups]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
    yield make_groups(ParallelConfig(), 1)
    dist.destroy_process_group()
