"""On several GPUs over NCCL: layouts train exactly, decoding through graphs equals decoding step by step.

Run by ``make gpu-check``, a process a GPU.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_zj.config.optim import EngineConfig
from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.config.sampling import SamplingConfig
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.engine.decode import Decoder
from megatron_zj.rollout.generate import generate
from tests.engine.test_exactness import DIST, check
from tests.engine.training import Case, Squares, global_batch, make_engine, make_groups, shard_of, with_engine
from tests.helpers.devices import device, need_devices, needs_transformer_engine
from tests.helpers.ranks import run_ranks
from tests.rollout import test_decode_graphs

pytestmark = pytest.mark.multi_gpu


def _case(ranks: int, sp: bool = False, **axes: int) -> Case:
    parallel = ParallelConfig(**axes, sequence_parallel=sp)
    return Case(parallel, EngineConfig(micro_batch_tokens=32), "lm", ranks, device=device())


CASES = {
    1: [_case(1)],
    2: [
        _case(2, tp=2),
        _case(2, tp=2, sp=True),
        _case(2, pp=2),
        _case(2, pp=2, vpp=2),
        _case(2),
        with_engine(_case(2), **DIST),
        _case(2, cp=2),
    ],
    4: [_case(4, tp=2, pp=2), _case(4, tp=2, sp=True, cp=2), with_engine(_case(4, tp=2, sp=True), **DIST)],
}


@pytest.mark.parametrize("ranks", CASES)
def test_five_fp32_steps_on_every_layout_equal_plain_torch(ranks: int) -> None:
    """One GPU is a case as well, so any two layouts are at most twice the bounds of test_exactness.py apart."""
    need_devices(ranks)
    check(CASES[ranks], timeout=600.0, start="spawn")


def _here() -> list[str | int]:
    """The backend and the device of this rank's tensors."""
    held = torch.ones(1, device=device())
    dist.all_reduce(held)
    return [dist.get_backend_config(), held.device.index or 0, int(held.item())]


def test_each_rank_has_a_gpu_of_its_own_and_nccl() -> None:
    need_devices(2)
    found = run_ranks(2, _here, device=device(), start="spawn")
    assert [total for *_, total in found] == [2, 2]
    if device() == "cuda":
        assert [index for _, index, _ in found] == [0, 1]
        assert all("cuda:nccl" in backend for backend, *_ in found)


def _decoded(stop_ids: frozenset[int]) -> tuple[list[list[Any]], list[list[Any]], str | None]:
    """Tokens and log-probabilities without graphs and with them, and why there would be none."""
    model = replace(test_decode_graphs.MODEL, num_query_groups=2)
    where = device() if device() == "cpu" else f"cuda:{torch.cuda.current_device()}"
    engine = test_decode_graphs._engine(where, model, tp=2)
    prompts = test_decode_graphs.PROMPTS
    batch = Batch(Rows.of(prompts, torch.int64), {}, {"sample_id": torch.arange(len(prompts))})
    found = []
    for graphs in (False, True):
        sampling = SamplingConfig(max_new_tokens=40, max_batch_rows=5, cuda_graphs=graphs)
        found.append(generate(engine, batch, sampling, stop_ids=stop_ids, seed=1))
    eager, replayed = ([one.tokens.values.tolist(), _bits(one)] for one in found)
    return eager, replayed, Decoder(engine, max_rows=1, max_tokens=8).why_eager


def _bits(one: Batch) -> list[int]:
    """A list of floats would take -0.0 for 0.0."""
    values: list[int] = one.per_token["sampling_logprobs"].values.cpu().view(torch.int32).tolist()
    return values


@pytest.mark.parametrize("stop_ids", [frozenset(), frozenset(range(12))], ids=["full", "ragged"])
def test_tensor_parallel_graphs_equal_eager_decoding_bit_for_bit(stop_ids: frozenset[int]) -> None:
    need_devices(2)
    by_rank = run_ranks(2, _decoded, stop_ids, timeout=300.0, device=device(), start="spawn")
    for eager, replayed, why_eager in by_rank:
        assert why_eager == (None if device() == "cuda" else "the device is cpu")
        assert replayed == eager
        assert any(eager[1])
        assert eager == by_rank[0][0], "ranks disagree"


def _losses(kernels: str, parallel: ParallelConfig) -> list[float]:
    base = _case(parallel.cp)
    model = replace(base.model, hidden_size=128, num_attention_heads=2, num_query_groups=1, kernels=kernels)
    low = EngineConfig(micro_batch_tokens=48, precision="bf16")
    case = replace(base, parallel=parallel, engine=low, model=model)
    groups = make_groups(case)
    engine = make_engine(case, groups)
    return [engine.update(Squares("lm"), shard_of(global_batch(step, model), groups))["loss"] for step in range(3)]


@needs_transformer_engine
def test_transformer_engine_under_context_parallelism_trains_as_without_and_as_our_kernels() -> None:
    """bf16: Transformer Engine's attention over packs has no fp32 form."""
    need_devices(2)
    found = {
        (kernels, cp): run_ranks(
            cp, _losses, kernels, ParallelConfig(cp=cp), timeout=300.0, device=device(), start="spawn"
        )[0]
        for kernels, cp in (("auto", 2), ("te", 1), ("te", 2))
    }
    for one, other, third in zip(*found.values(), strict=True):
        assert math.isclose(one, third, rel_tol=5e-3), found
        assert math.isclose(other, third, rel_tol=5e-3), found
