"""An offloaded engine holds no device memory, and a run with offloading is the run without it, bit for bit."""

from __future__ import annotations

import dataclasses
import tempfile
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron_zj.config.optim import EngineConfig
from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.engine.build import build_engine
from megatron_zj.engine.engine import Engine
from megatron_zj.engine.offload import HostCopy
from megatron_zj.parallel.grid import RankGrid
from megatron_zj.parallel.groups import create_groups
from tests.engine import training
from tests.helpers.ranks import run_ranks

PLAIN = EngineConfig(micro_batch_tokens=64)
SHARDED = dataclasses.replace(PLAIN, distributed_optimizer=True)
LATE = dataclasses.replace(SHARDED, overlap_grad_reduce=True, overlap_param_gather=True)


def _train(engine_config: EngineConfig, offload: bool, beside: bool = False) -> tuple[list[dict[str, float]], int, int]:
    """Three updates, offloaded between them or not: metrics, bytes held in memory, bytes held while offloaded."""
    groups = create_groups({"all": RankGrid.from_config(ParallelConfig(), 0, 2)}, {"all": ParallelConfig()}, 60)["all"]
    assert groups is not None
    engine = build_engine(training.MODEL, "lm", groups, engine_config, training.OPTIM, 8, training.HOST, training.SEED)
    before, during, history = 0, 0, []
    for step in range(3):
        batch = training.global_batch(step)
        rows = range(groups.dp_rank * 4, groups.dp_rank * 4 + 4)
        history.append(engine.update(training.Squares("lm"), batch.select(rows)))
        before = _held(engine)
        if offload:
            engine.offload(beside=beside)
            if beside:
                assert _held(engine) == before  # until its copies are known to have ended
                engine.infer(("logprobs",), batch.select(rows))  # it had not left
                engine.offload(beside=True)
                engine.settle()
            with pytest.MonkeyPatch.context() as patched:  # twice is once: nothing comes back on the way
                patched.setattr(HostCopy, "restore", lambda copy: pytest.fail("restored to be offloaded again"))
                engine.offload()
            during = _held(engine)
            if beside:
                engine.reload(beside=True)
                assert _held(engine) == before
            engine.infer(("logprobs",), batch.select(rows))  # comes back by itself
            assert _held(engine) == before
            engine.offload()
    return history, before, during


def _held(engine: Engine) -> int:
    """Bytes of weights, gradients and optimizer state."""
    assert engine.optimizer is not None
    tensors = [*engine.chunks[0].parameters(), *engine.optimizer.tensors()]
    tensors += [buffer.grad_data for chunk in engine._wrapped for buffer in chunk.buffers]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("beside", [False, True], ids=["waiting", "beside the computing"])
@pytest.mark.parametrize("engine", [PLAIN, SHARDED, LATE], ids=["plain", "distributed optimizer", "gathered late"])
def test_an_offloaded_engine_holds_no_memory_and_trains_the_same_bits(engine: EngineConfig, beside: bool) -> None:
    plain = run_ranks(2, _train, engine, False)
    for rank, (history, before, during) in enumerate(run_ranks(2, _train, engine, True, beside)):
        assert before > 50_000
        assert during == 0
        assert history == plain[rank][0]


@pytest.mark.gpu
def test_on_a_gpu_memory_is_freed_and_copies_beside_the_computing_change_no_bit() -> None:
    """Two models of 3 million parameters in turn; each leaves while the other learns."""
    model = dataclasses.replace(
        training.MODEL, hidden_size=256, ffn_hidden_size=768, num_attention_heads=4, max_position_embeddings=64
    )
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
        try:
            grid, parallel = RankGrid.from_config(ParallelConfig(), 0, 1), ParallelConfig()
            groups = create_groups({"all": grid}, {"all": parallel}, 60)["all"]
            assert groups is not None
            device, histories, allocated = torch.device("cuda"), [], []
            for beside in (None, False, True):
                pair = [
                    build_engine(model, "lm", groups, PLAIN, training.OPTIM, 8, device, training.SEED + one)
                    for one in range(2)
                ]
                histories.append([])
                for step in range(3):
                    for mine, other in (pair, pair[::-1]):
                        if beside is not None:
                            other.offload(beside=beside)
                        histories[-1].append(mine.update(training.Squares("lm"), training.global_batch(step)))
                        other.settle()
                        if beside is not None:
                            assert _held(other) == 0
                allocated.append(torch.cuda.memory_allocated())
                del pair, mine, other
            assert max(allocated[1:]) < 0.7 * allocated[0]  # one of the two models, and what does not leave
            assert histories[0] == histories[1] == histories[2]
        finally:
            dist.destroy_process_group()
