"""Decoding through recorded steps equals decoding step by step, and a bucket is recorded once.

Without a GPU a tape of torch operators stands in for the graph: like a graph it reads and writes the memory it was
recorded on and knows nothing of Python, so a step that took a length or a tensor from anywhere else would go wrong.
"""

from __future__ import annotations

import gc
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import dispatch
from megatron_zj.config.derived import ALL
from megatron_zj.config.model import ModelConfig
from megatron_zj.config.optim import EngineConfig
from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.config.sampling import SamplingConfig
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.engine.build import build_engine
from megatron_zj.engine.decode import Decoder
from megatron_zj.engine.decode_graphs import CudaGraph, await_ranks, bucket_of, why_eager
from megatron_zj.engine.engine import Engine
from megatron_zj.roles.placement import build_placements
from megatron_zj.rollout.generate import generate
from megatron_zj.runtime.distributed import _is_collective_failure
from tests.helpers.ranks import run_ranks

MODEL = ModelConfig(
    vocab_size=90,
    hidden_size=128,
    ffn_hidden_size=64,
    num_layers=2,
    num_attention_heads=2,
    num_query_groups=1,
    max_position_embeddings=64,
    init_std=0.15,
)
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [30, 31], [60, 61, 62], [8, 8]]


class Tape(TorchDispatchMode):
    """What a graph does: work recorded once, done again on the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view:  # a view of recorded memory stays one
            self.calls.append((func, args, kwargs or {}, _tensors(found)))
        return found

    def capture(self, work: Callable[[], Tensor]) -> Tensor:
        with self:
            found = work()
        return found.fill_(float("nan"))  # recording computes nothing

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, outputs in self.calls:
            found = func(*args, **kwargs)
            if func.namespace == "c10d":
                dist.Work.unbox(found[-1]).wait()
            for old, new in zip(outputs, _tensors(found), strict=True):
                if old is not new:
                    old.copy_(new)


def _tensors(found: Any) -> list[Tensor]:
    """Those in nested lists too, as collectives return them."""
    if isinstance(found, (tuple, list)):
        return [tensor for value in found for tensor in _tensors(value)]
    return [found] if torch.is_tensor(found) else []


def _engine(device: str, model: ModelConfig = MODEL, tp: int = 1) -> Engine:
    groups = build_placements(ParallelConfig(tp=tp), {}, {ALL}, tp, 60)[ALL].groups
    assert groups is not None
    return build_engine(model, "lm", groups, EngineConfig(), None, 1, torch.device(device), 3)


def _decode_all(decoder: Decoder) -> list[Tensor]:
    """Logits of every step of six rows in five slots: one leaves at steps 3, 4, 6 and 9, one comes at step 5."""
    found = []
    with decoder.session():
        logits = decoder.prefill(range(5), [torch.tensor(prompt) for prompt in PROMPTS[:5]])
        rows = 5
        for step in range(1, 13):
            assert logits is not None
            found.append(logits.clone())
            tokens = logits.argmax(-1)
            if step in (3, 4, 6, 9):  # the first row ends, the last takes its slot
                decoder.move(rows - 1, 0)
                rows -= 1
                decoder.truncate(rows)
                tokens = torch.cat([tokens[rows : rows + 1], tokens[1:rows]])
            if step == 5:
                late = decoder.prefill([rows], [torch.tensor(PROMPTS[5])])
                assert late is not None
                tokens, rows = torch.cat([tokens, late.argmax(-1)]), rows + 1
            logits = decoder.decode(tokens)
    return found


def _stand_in(model: ModelConfig, tp: int) -> tuple[list[list[Any]], list[list[Any]], list[int], list[str]]:
    engine, tapes = _engine("cpu", model, tp), list[Tape]()

    def new_tape() -> Tape:
        tapes.append(Tape())
        return tapes[-1]

    eager, taped = (Decoder(engine, max_rows=5, max_tokens=32) for _ in range(2))
    taped.pad_steps(new_tape)
    expected, found = _decode_all(eager), _decode_all(taped)
    collectives = [func.name() for func, *_ in tapes[0].calls if func.namespace == "c10d"]
    return [t.tolist() for t in expected], [t.tolist() for t in found], [tape.replays for tape in tapes], collectives


@pytest.mark.parametrize("tp", [1, 2])
def test_replayed_steps_give_the_logits_of_steps_one_by_one(tp: int) -> None:
    expected, found, replays, collectives = run_ranks(tp, _stand_in, replace(MODEL, num_query_groups=tp), tp)[-1]
    assert len(expected) == 12
    # the embedding's, two of each layer, the vocabulary's: recorded with the step
    assert collectives == (["c10d::allreduce_"] * 5 + ["c10d::allgather_"] if tp > 1 else [])
    for step, (wanted, mine) in enumerate(zip(expected, found, strict=True)):
        assert len(mine) == len(wanted), step
        assert torch.allclose(torch.tensor(mine), torch.tensor(wanted), atol=1e-5), step
        assert torch.tensor(mine).argmax(-1).tolist() == torch.tensor(wanted).argmax(-1).tolist()
    # rows: 5 5, 4 3 4 3 3 3, 2 2 2 2: three buckets, whose first steps run as they are and whose others are replays
    assert replays == [1, 5, 3]


class Once:
    """A graph that computes at capture and never again."""

    replays = 0

    def capture(self, work: Callable[[], Tensor]) -> Tensor:
        return work()

    def replay(self) -> None:
        self.replays += 1


def _left_behind() -> list[str]:
    """What outlives a decoder that ran through graphs, without the garbage collector."""
    engine = _engine("cpu")
    gc.disable()
    decoder, graph = Decoder(engine, max_rows=5, max_tokens=32), Once()
    decoder.pad_steps([graph].pop)
    with decoder.session():
        decoder.prefill([0], [torch.tensor(PROMPTS[0])])
        for token in (1, 2, 3):  # as it is, captured, replayed
            decoder.decode(torch.tensor([token]))
    assert graph.replays == 2
    gone = {"decoder": weakref.ref(decoder), "cache": weakref.ref(decoder._keys), "graph": weakref.ref(graph)}
    del decoder, graph
    return [name for name, reference in gone.items() if reference() is not None]


def test_cache_and_graphs_go_with_the_decoder_at_once() -> None:
    assert run_ranks(1, _left_behind) == [[]]


def test_buckets_are_powers_of_two_up_to_all_slots() -> None:
    assert [bucket_of(rows, 12) for rows in (1, 2, 3, 4, 5, 8, 9, 12)] == [1, 2, 4, 4, 8, 8, 12, 12]


def _reasons() -> tuple[str | None, str | None]:
    engine = _engine("cpu")
    off = Decoder(engine, max_rows=1, max_tokens=8, graphs=False).why_eager
    return why_eager(engine.groups, next(engine.chunks[0].parameters())), off


def _kernels_inside() -> tuple[list[str | None], str | None]:
    """The forced kernels outside and inside a session, and why a device would run it without graphs."""
    engine = _engine("cpu")
    engine.model = replace(engine.model, kernels="torch")
    decoder = Decoder(engine, max_rows=1, max_tokens=8)
    seen = [dispatch.Registry.forced]
    with decoder.session():
        seen.append(dispatch.Registry.forced)
    device = SimpleNamespace(device=SimpleNamespace(type="cuda"), is_cuda=True)
    with dispatch.use("torch"):
        return seen, why_eager(engine.groups, device)  # type: ignore[arg-type]


def test_decoding_runs_on_the_kernels_that_the_model_asks_for() -> None:
    seen, reason = run_ranks(1, _kernels_inside)[0]
    assert seen == [None, "torch"]
    assert reason == "attention in torch operators reads its lengths on the host"


def test_where_there_are_no_graphs_the_reason_is_said() -> None:
    assert run_ranks(1, _reasons)[0] == ("the device is cpu", "they are switched off")


def _reason_of_two(backend: str) -> str | None:
    """Of a tensor-parallel model on a device, whose collectives ``backend`` does."""
    engine = _engine("cpu", replace(MODEL, num_query_groups=2), 2)
    device = SimpleNamespace(device=SimpleNamespace(type="cuda"), is_cuda=True)
    with pytest.MonkeyPatch.context() as patched, dispatch.use("triton"):
        patched.setattr(dist, "get_backend_config", lambda group: backend)
        return why_eager(engine.groups, device)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("backend", "reason"),
    [("cpu:gloo,cuda:nccl", None), ("cpu:gloo,cuda:gloo", "only NCCL's collectives can be captured")],
)
def test_tensor_parallel_steps_are_captured_where_nccl_does_their_collectives(backend: str, reason: str | None) -> None:
    assert run_ranks(2, _reason_of_two, backend) == [reason, reason]


def test_a_replay_that_other_ranks_do_not_join_ends_as_a_failed_collective() -> None:
    """The process group has no timeout for what is replayed."""
    answers = iter([False, False, True])
    await_ranks(lambda: next(answers), 60.0)
    with pytest.raises(RuntimeError, match=r"timed out waiting 0.05 s for the NCCL collectives") as caught:
        await_ranks(lambda: False, 0.05)
    assert _is_collective_failure(caught.value)


@pytest.fixture
def alone() -> Iterator[None]:
    """A world of this process: a fork could not use the GPU."""
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
        yield
        dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("stop_ids", [frozenset(), frozenset(range(12))], ids=["full", "ragged"])
def test_on_a_gpu_graphs_equal_eager_decoding_bit_for_bit(alone: None, stop_ids: frozenset[int]) -> None:
    engine = _engine("cuda")
    prompts = Batch(Rows.of(PROMPTS, torch.int64), {}, {"sample_id": torch.arange(len(PROMPTS))})
    found = []
    for graphs in (False, True):
        sampling = SamplingConfig(max_new_tokens=40, max_batch_rows=5, cuda_graphs=graphs)
        found.append(generate(engine, prompts, sampling, stop_ids=stop_ids, seed=1))
    assert Decoder(engine, max_rows=1, max_tokens=8).why_eager is None
    assert torch.equal(found[0].tokens.values, found[1].tokens.values)
    logprobs = [one.per_token["sampling_logprobs"].values for one in found]
    assert torch.equal(logprobs[0], logprobs[1])
    assert F.l1_loss(logprobs[0], torch.zeros_like(logprobs[0])) > 0


@pytest.mark.gpu
def test_on_a_gpu_nccl_collectives_are_captured_and_replayed() -> None:
    """A group of one rank: what this machine can show of tensor-parallel steps.  NCCL's watchdog runs beside it."""
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
        try:
            group = dist.new_group([0], timeout=timedelta(seconds=60))
            given, parts = torch.ones(1000, device="cuda"), [torch.zeros(1000, device="cuda")]

            def work() -> Tensor:
                doubled = given * 2
                dist.all_reduce(doubled, group=group)
                dist.all_gather(parts, doubled, group=group)
                return parts[0] + 1

            assert torch.equal(work(), torch.full_like(given, 3.0))
            graph = CudaGraph(timeout_seconds=60.0)
            found = graph.capture(work)
            for value in (5.0, 7.0):
                given.fill_(value)
                graph.replay()
                assert torch.equal(found, torch.full_like(given, 2 * value + 1))
        finally:
            dist.destroy_process_group()
