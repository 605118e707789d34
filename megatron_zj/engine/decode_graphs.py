"""Decoding steps as CUDA graphs: a step of hundreds of small kernels is launched as one.

A graph replays fixed kernels on fixed memory.  So a step reads its tokens and positions from buffers that never move,
and its rows are padded to a bucket (a power of two, or all slots), one graph a bucket.  A padding row writes position 0
of a slot that no row lives in and attends to that alone; nobody reads its logits.  A bucket's first step runs as it is,
which compiles and warms up everything; the second is captured; the others are replays.

Tensor-parallel ranks decode the same rows, so they warm up, capture and replay the same buckets at the same steps,
their NCCL collectives included.  The process group neither watches nor times out what is replayed: ``CudaGraph`` does.

B: active rows; V: vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import dispatch
from megatron_zj.parallel.groups import ParallelGroups

Step = Callable[[Tensor, Tensor], Tensor]  # tokens [rows] and their positions [rows] to logits [rows, V]


class Graph(Protocol):
    """Recorded work."""

    def capture(self, work: Callable[[], Tensor]) -> Tensor:
        """Record ``work``; its result's memory, which each replay fills anew."""

    def replay(self) -> None:
        """Do the recorded work."""


class CudaGraph:
    """``torch.cuda.CUDAGraph``, its memory from a pool of its own."""

    def __init__(self, timeout_seconds: float | None = None) -> None:
        """``timeout_seconds``: how long a replay may wait for the other ranks of its collectives; None: it has none."""
        self._graph, self._timeout = torch.cuda.CUDAGraph(), timeout_seconds

    def capture(self, work: Callable[[], Tensor]) -> Tensor:
        """Record the kernels that ``work`` launches, without running them."""
        # NCCL's watchdog, a thread of its own, may go on asking for the collectives before this one.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            return work()

    def replay(self) -> None:
        """Launch them.  Raises RuntimeError when the other ranks do not join."""
        self._graph.replay()
        if self._timeout is not None:
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
            await_ranks(done.query, self._timeout)


def await_ranks(done: Callable[[], bool], timeout_seconds: float) -> None:
    """Wait until ``done``, without sleeping: it is a matter of microseconds.  Raises RuntimeError after the timeout."""
    deadline = time.monotonic() + timeout_seconds
    while not done():
        if time.monotonic() > deadline:
            raise RuntimeError(f"timed out waiting {timeout_seconds:g} s for the NCCL collectives of a decoding step")


def why_eager(groups: ParallelGroups, weight: Tensor) -> str | None:
    """Why steps of this model cannot be captured; None: they can."""
    if weight.device.type != "cuda":
        return f"the device is {weight.device.type}"
    if dispatch.backend_of(weight) == "torch":
        return "attention in torch operators reads its lengths on the host"
    if groups.pp_size > 1:
        return "pipeline stages wait for one another's hidden states on the host"
    if groups.tp_size > 1 and "cuda:nccl" not in dist.get_backend_config(groups.pgc.tp):
        return "only NCCL's collectives can be captured"
    return None


def graphs_of(groups: ParallelGroups) -> Callable[[], CudaGraph]:
    """Makes the graphs of a model on these ranks."""
    return lambda: CudaGraph(groups.timeout_seconds if groups.tp_size > 1 else None)


class StepGraphs:
    """Runs decoding steps of up to ``max_rows`` rows through graphs.  Lives as long as the memory its steps touch."""

    def __init__(self, max_rows: int, device: torch.device, new_graph: Callable[[], Graph] | None = CudaGraph) -> None:
        """``new_graph`` None: only pad."""
        self._max_rows, self._new_graph = max_rows, new_graph
        self._tokens = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._positions = torch.zeros_like(self._tokens)
        self._warm: set[int] = set()
        self._captured: dict[int, tuple[Graph, Tensor]] = {}

    def run(self, step: Step, tokens_B: Tensor, positions: Sequence[int]) -> Tensor:
        """Logits [B, V], in memory that the next step of the same bucket overwrites.

        ``step``: the same work at each call.  It is not kept: it knows the owner of these graphs, and a cycle would
        keep cache and graphs in memory until the garbage collector happens to come.
        """
        rows = len(positions)
        bucket = bucket_of(rows, self._max_rows)
        self._tokens[:rows].copy_(tokens_B)
        self._positions[:rows].copy_(torch.tensor(positions))
        self._tokens[rows:bucket] = 0
        self._positions[rows:bucket] = 0
        return self._logits(step, bucket)[:rows]

    def _logits(self, step: Step, bucket: int) -> Tensor:
        def work() -> Tensor:
            return step(self._tokens[:bucket], self._positions[:bucket])

        if self._new_graph is None or bucket not in self._warm:
            self._warm.add(bucket)
            return work()
        if bucket not in self._captured:
            graph = self._new_graph()
            self._captured[bucket] = graph, graph.capture(work)
        graph, logits = self._captured[bucket]
        graph.replay()
        return logits


def bucket_of(rows: int, max_rows: int) -> int:
    """The next power of two, at most ``max_rows``."""
    return min(1 << (rows - 1).bit_length(), max_rows)
