"""Tests on GPUs: which device, how many are needed, and what must be installed.

``MEGATRON_ZJ_TEST_DEVICE=cpu`` lets such a test run, up to the device, where there is no GPU.
``MEGATRON_ZJ_REQUIRE_TE=1`` (``make gpu-check TE=1``) makes a missing Transformer Engine a failure and no skip.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist


def device() -> str:
    """What ``run.device`` says."""
    return os.environ.get("MEGATRON_ZJ_TEST_DEVICE", "cuda")


def te_required() -> bool:
    """Whether a test of Transformer Engine may not be skipped for want of it."""
    return os.environ.get("MEGATRON_ZJ_REQUIRE_TE", "") not in ("", "0")


def te_installed() -> bool:
    """Whether this Python would find it."""
    return importlib.util.find_spec("transformer_engine") is not None


needs_transformer_engine = pytest.mark.skipif(
    not te_installed() and not te_required(), reason="Transformer Engine is not installed (make gpu-check TE=1)"
)


def need_devices(count: int) -> None:
    """Skip the test, saying why, with fewer GPUs."""
    if device() == "cuda" and torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} CUDA devices, there are {torch.cuda.device_count()}")


@contextlib.contextmanager
def world_of_one() -> Iterator[None]:
    """A world of this process, NCCL for what is on a GPU: a fork could not use it."""
    backend = "cpu:gloo,cuda:nccl" if device() == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
        try:
            yield
        finally:
            dist.destroy_process_group()
