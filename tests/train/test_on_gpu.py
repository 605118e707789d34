"""On one GPU: every stage trains as on the CPU, resumes to the bit, in bf16 too; the CPU port does nothing there.

Run by ``make gpu-check``.  Each run is a process of its own, so that the CPU's sees no GPU.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.devices import device, needs_transformer_engine
from tests.train import stages

pytestmark = pytest.mark.gpu

CHAIN = ("pretrain", "sft", "reward", "ppo", "grpo", "dpo", "rejection")
# A model's usual head size; one rank; long enough rows that blocks are cut.
ONE_GPU: dict[str, Any] = {
    "world_size": 1,
    "parallel.tp": 1,
    "parallel.pp": 1,
    "parallel.sequence_parallel": "false",
    "model.hidden_size": 128,
    "model.ffn_hidden_size": 192,
    "model.num_attention_heads": 2,
    "model.num_query_groups": 1,
    "checkpoint.every": 2,
}
_PORT = """
import sys
import megatron_zj.parallel
from megatron_zj.parallel import cpu_port
import megatron.core.tensor_parallel.random as random_states
import megatron.core.pipeline_parallel.schedules as schedules
assert not any(isinstance(finder, cpu_port._Finder) for finder in sys.meta_path)
for module in (random_states, schedules):
    assert not hasattr(module, "__host_cuda__"), module
    assert type(module.__loader__).__module__.startswith(("importlib", "_frozen_importlib")), module.__loader__
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature's data, and every stage once on the CPU and once on the GPU, in fp32."""
    made = tmp_path_factory.mktemp("gpu")
    for where in ("cpu", "gpu"):
        stages.make_data(made / where)
        for stage in CHAIN:
            train(stage, made / where, stage, "cpu" if where == "cpu" else device())
    return made


def train(stage: str, folder: Path, run: str, on: str, **changes: Any) -> None:
    """One stage in a process of its own."""
    overrides = stages.overrides_of(stage, folder, run, **changes)
    settings = [f"{name}={value}" for name, value in {**ONE_GPU, "run.device": on}.items() if name not in changes]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if on == "cpu" else {}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_zj.cli.train", *overrides, *settings],
        env={**os.environ, **hidden, "OMP_NUM_THREADS": "2"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{stage} on {on}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def numbers(folder: Path) -> list[dict[str, float]]:
    """A run's metrics that are numbers, a dict a step."""
    return [{name: value for name, value in line.items() if _is_number(value)} for line in stages.metrics(folder)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@pytest.mark.skipif(device() == "cpu", reason="on a CPU the port is at work")
def test_the_cpu_port_is_inert() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", _PORT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "dpo"])
def test_a_supervised_stage_trains_as_on_the_cpu(folder: Path, stage: str) -> None:
    here, there = numbers(folder / "cpu" / stage), numbers(folder / "gpu" / stage)
    assert len(here) == len(there) == stages.STEPS
    for host, gpu in zip(here, there, strict=True):
        for name in ("loss", "grad_norm"):
            assert math.isclose(host[name], gpu[name], rel_tol=2e-3, abs_tol=1e-4), (name, host, gpu)


@pytest.mark.parametrize("stage", ["ppo", "grpo", "rejection"])
def test_an_rl_stage_samples_and_scores_as_on_the_cpu(folder: Path, stage: str) -> None:
    """The first iteration: the noise is the host's on both, so the tokens are the same but for ties."""
    host, gpu = numbers(folder / "cpu" / stage)[0], numbers(folder / "gpu" / stage)[0]
    compared = [name for name in host if name.startswith(("raw_score", "score", "response_length", "kl"))]
    assert compared
    for name in compared:
        assert math.isclose(host[name], gpu[name], rel_tol=2e-2, abs_tol=1e-2), (name, host[name], gpu[name])
    for line in numbers(folder / "gpu" / stage):
        assert all(map(math.isfinite, line.values())), line


@pytest.mark.parametrize("stage", CHAIN)
def test_stopping_and_going_on_changes_no_bit_on_the_gpu(folder: Path, stage: str) -> None:
    schedule = stages.schedule_of(stage, folder / "gpu")
    for steps in (2, stages.STEPS):
        train(stage, folder / "gpu", f"{stage}_stopped", device(), run__num_steps=steps, **schedule)
    assert stages.metrics(folder / "gpu" / f"{stage}_stopped") == stages.metrics(folder / "gpu" / stage)
    stopped = stages.content(folder / "gpu" / f"{stage}_stopped", stages.STEPS)
    assert stopped == stages.content(folder / "gpu" / stage, stages.STEPS)


@pytest.mark.parametrize("stage", ["pretrain", "ppo"])
def test_bf16_stays_near_fp32(folder: Path, stage: str) -> None:
    train(stage, folder / "gpu", f"{stage}_bf16", device(), engine__precision="bf16")
    exact, rounded = numbers(folder / "gpu" / stage), numbers(folder / "gpu" / f"{stage}_bf16")
    assert all(math.isfinite(value) for line in rounded for value in line.values())
    if stage == "pretrain":
        for one, other in zip(exact, rounded, strict=True):
            assert math.isclose(one["loss"], other["loss"], rel_tol=5e-3), (one["loss"], other["loss"])
    else:  # logits of a step are fp32, as the training pass has them
        assert max(line["parity/mean"] for line in rounded) < 0.005, [line["parity/mean"] for line in rounded]


def test_fp16_trains_at_a_sane_scale_near_fp32(folder: Path) -> None:
    train("pretrain", folder / "gpu", "pretrain_fp16", device(), engine__precision="fp16")
    exact, rounded = numbers(folder / "gpu/pretrain"), numbers(folder / "gpu/pretrain_fp16")
    for one, other in zip(exact, rounded, strict=True):
        assert other["skipped"] == 0.0, other
        assert other["loss_scale"] == 65536.0, other  # of a mean loss, as on the CPU: no overflow from the start
        assert math.isclose(one["loss"], other["loss"], rel_tol=1e-3), (one["loss"], other["loss"])
    assert rounded[-1]["loss"] < rounded[0]["loss"]
    assert [line["loss"] for line in rounded] != [line["loss"] for line in exact]  # it did round


@needs_transformer_engine
def test_transformer_engine_trains_as_our_kernels(folder: Path) -> None:
    for kernels in ("triton", "te"):
        run = f"pretrain_{kernels}"
        train("pretrain", folder / "gpu", run, device(), engine__precision="bf16", model__kernels=kernels)
    for ours, theirs in zip(numbers(folder / "gpu/pretrain_triton"), numbers(folder / "gpu/pretrain_te"), strict=True):
        assert math.isclose(ours["loss"], theirs["loss"], rel_tol=5e-3), json.dumps([ours, theirs])


@needs_transformer_engine
@pytest.mark.parametrize("fp8", ["hybrid", "e4m3"])
def test_fp8_trains_near_bf16_and_resumes_to_the_bit(folder: Path, fp8: str) -> None:
    """On ragged packs: Transformer Engine refuses sizes that are no multiples of 16."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the device has no FP8")
    te: dict[str, Any] = {"engine__precision": "bf16", "model__kernels": "te", "optim__decay_steps": stages.STEPS}
    for run, changes, steps in (
        ("te", {}, stages.STEPS),
        (fp8, {"model__fp8": fp8}, stages.STEPS),
        (f"{fp8}_stopped", {"model__fp8": fp8}, 2),
        (f"{fp8}_stopped", {"model__fp8": fp8}, stages.STEPS),
    ):
        train("pretrain", folder / "gpu", f"pretrain_{run}_fp8", device(), run__num_steps=steps, **te, **changes)
    rounded, exact = numbers(folder / f"gpu/pretrain_{fp8}_fp8"), numbers(folder / "gpu/pretrain_te_fp8")
    for one, other in zip(rounded, exact, strict=True):
        assert math.isclose(one["loss"], other["loss"], rel_tol=2e-2), json.dumps([one, other])
    assert [line["loss"] for line in rounded] != [line["loss"] for line in exact]  # it did round
    stopped = folder / f"gpu/pretrain_{fp8}_stopped_fp8"
    assert stages.metrics(stopped) == stages.metrics(folder / f"gpu/pretrain_{fp8}_fp8")
