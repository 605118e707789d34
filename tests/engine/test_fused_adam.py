"""NVIDIA's fused Adam: it trains as torch's AdamW, and either resumes from the other's checkpoint.

By a stand-in here; on a GPU by the real one, Transformer Engine's or apex's.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import megatron.core.optimizer as core_optimizer
import pytest
import torch
from megatron.core.optimizer import distrib_optimizer

from megatron_zj.config.optim import EngineConfig
from megatron_zj.engine.engine import Engine
from megatron_zj.models.canonical import read_stage
from megatron_zj.parallel import accelerators
from tests.engine.fused_adam import FusedAdam
from tests.engine.training import Case, Squares, global_batch, make_engine, make_groups, shard_of
from tests.engine.whole_state import load_whole, save_whole
from tests.helpers.devices import device, te_installed, te_required, world_of_one
from tests.helpers.ranks import run_ranks
from tests.train import stages

ROOT = Path(__file__).parents[2]
PLAIN = EngineConfig(micro_batch_tokens=40)
SHARDED = replace(PLAIN, distributed_optimizer=True)
ENGINES = {
    "plain": PLAIN,
    "distributed": SHARDED,
    "bf16-distributed": replace(SHARDED, precision="bf16"),
    "fp16": replace(PLAIN, precision="fp16"),
}


# What the imports at the top of megatron-core's modules set where apex is found (test_found_by_import).
FOUND = {
    (core_optimizer, "Adam"): FusedAdam,
    (core_optimizer, "USING_PYTORCH_OPTIMIZER"): False,
    (distrib_optimizer, "Adam"): FusedAdam,
    (distrib_optimizer, "HAVE_APEX_OR_TE"): True,
    (distrib_optimizer, "USING_APEX_OPTIMIZER"): True,
}


NONE_FOUND = dict(zip(FOUND, (torch.optim.AdamW, True, torch.optim.AdamW, False, False), strict=True))


@contextlib.contextmanager
def _as_if(found: dict[Any, Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for (module, name), value in found.items():
            stack.enter_context(mock.patch.object(module, name, value))
        yield


def apex_found() -> contextlib.AbstractContextManager[None]:
    """Optimizers that are built inside are ``FusedAdam``."""
    return _as_if(FOUND)


def _fused(case: Case, groups: Any) -> Engine:
    """On a GPU megatron-core takes what is installed."""
    with apex_found() if case.device == "cpu" else contextlib.nullcontext():
        engine = make_engine(case, groups)
    assert engine.optimizer is not None
    adam: Any = engine.optimizer.adam
    owner = type(adam).__module__.split(".")[0]
    assert type(adam) is FusedAdam if case.device == "cpu" else owner in ("transformer_engine", "apex"), type(adam)
    assert adam.adam_w_mode == 1
    return engine


def _plain(case: Case, groups: Any) -> Engine:
    with _as_if(NONE_FOUND):
        engine = make_engine(case, groups)
    assert engine.optimizer is not None
    assert type(engine.optimizer.adam) is torch.optim.AdamW
    return engine


def _steps(engine: Engine, first: int, count: int) -> list[float]:
    batches = [shard_of(global_batch(step), engine.groups) for step in range(first, first + count)]
    found = [engine.update(Squares("lm"), batch) for batch in batches]
    return [value for one in found for value in (one["loss"], one["grad_norm"])]


def _apart(one: Engine, other: Engine) -> float:
    """The largest distance between weights."""
    one.gather_weights()
    other.gather_weights()
    others = read_stage(other.chunks, other.groups)
    return max(float((value - others[name]).abs().max()) for name, value in read_stage(one.chunks, one.groups).items())


def _counts(engine: Engine) -> tuple[set[Any], bool]:
    """The groups' counts of steps, and whether any parameter has one."""
    assert engine.optimizer is not None
    adam = engine.optimizer.adam
    return (
        {group["step"] for group in adam.param_groups if group["params"]},
        any("step" in state for state in adam.state.values()),
    )


def _train_and_resume(config: EngineConfig, device: str = "cpu") -> dict[str, Any]:
    case = Case(engine=config, device=device)
    groups = make_groups(case)
    theirs, ours = _fused(case, groups), _plain(case, groups)
    found: dict[str, Any] = {"first": (_steps(theirs, 0, 3), _steps(ours, 0, 3)), "apart": _apart(theirs, ours)}
    saved, saved_by_torch = save_whole(theirs), save_whole(ours)
    resumed, to_torch, from_torch = _fused(case, groups), _plain(case, groups), _fused(case, groups)
    for engine, state in ((resumed, saved), (to_torch, saved), (from_torch, saved_by_torch)):
        load_whole(engine, state)
    found["counts"] = [_counts(engine) for engine in (theirs, resumed, from_torch)]
    found["went_on"], found["resumed"] = _steps(theirs, 3, 3), _steps(resumed, 3, 3)
    found["moved"] = _apart(theirs, resumed)
    found["torch"] = _steps(ours, 3, 3)
    found["across"] = [_steps(to_torch, 3, 3), _steps(from_torch, 3, 3)]
    found["counts_after"] = _counts(resumed)
    return found


@pytest.mark.parametrize("name", ENGINES)
def test_fused_adam_trains_and_resumes_as_torchs_adamw(name: str) -> None:
    for found in run_ranks(2, _train_and_resume, ENGINES[name]):
        _check(found, exact=ENGINES[name].precision == "fp32")


@pytest.mark.gpu
@pytest.mark.skipif(
    not te_required() and not te_installed() and accelerators.apex_kind() != "nvidia",
    reason="neither Transformer Engine nor NVIDIA's apex is installed (make gpu-check TE=1)",
)
@pytest.mark.parametrize("name", ENGINES)
def test_on_a_gpu_the_real_fused_adam_trains_and_resumes_as_torchs_adamw(name: str) -> None:
    with world_of_one():
        _check(_train_and_resume(ENGINES[name], device()), exact=ENGINES[name].precision == "fp32")


def _check(found: dict[str, Any], exact: bool) -> None:
    _check_near(*found["first"], exact)
    assert found["apart"] <= (1e-6 if exact else 5e-3)
    assert found["counts"] == [({3}, False)] * 3
    assert found["counts_after"] == ({6}, False)
    assert found["resumed"] == found["went_on"], "the same optimizer resumes to the bit"
    assert found["moved"] == 0.0
    for steps in (found["went_on"], *found["across"]):
        _check_near(steps, found["torch"], exact)


def _check_near(steps: list[float], others: list[float], exact: bool) -> None:
    """Losses and gradient norms in turn.  The decay is added to the update: other roundings, which bf16's and fp16's
    weights magnify."""
    assert steps[::2] == pytest.approx(others[::2], rel=1e-6 if exact else 1e-3)
    assert steps[1::2] == pytest.approx(others[1::2], rel=1e-5 if exact else 1e-2)


_FOUND_BY_IMPORT = """
import megatron_zj.parallel
from tests.engine import test_fused_adam
for (module, name), value in test_fused_adam.FOUND.items():
    assert getattr(module, name) == value, (module, name, getattr(module, name))
"""


def _python(site: Path, *words: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of packages with NVIDIA's apex in it."""
    optimizers = tmp_path / "site/apex/optimizers"
    optimizers.mkdir(parents=True)
    (optimizers.parent / "__init__.py").write_text("")
    (optimizers / "__init__.py").write_text("from tests.engine.fused_adam import FusedAdam\nFusedSGD = None\n")
    return tmp_path / "site"


@pytest.mark.slow
def test_found_by_import(site: Path) -> None:
    """What ``apex_found`` sets is what megatron-core finds by itself where the package is."""
    _python(site, "-c", _FOUND_BY_IMPORT)


@pytest.mark.slow
def test_whole_commands_train_stop_and_resume_with_apex(site: Path, tmp_path: Path) -> None:
    stages.make_data(tmp_path)
    one_rank = {"world_size": 1, "engine__distributed_optimizer": "true", "run__device": "cpu"}
    for run, where, steps in (("torch", tmp_path, 4), ("apex", site, 4), ("stopped", site, 2), ("stopped", site, 4)):
        words = stages.overrides_of("pretrain", tmp_path, run, run__num_steps=steps, optim__decay_steps=4, **one_rank)
        _python(where, "-m", "megatron_zj.cli.train", *words)
    assert stages.metrics(tmp_path / "stopped") == stages.metrics(tmp_path / "apex")
    assert stages.content(tmp_path / "stopped", 4) == stages.content(tmp_path / "apex", 4)
    for apex, plain in zip(stages.metrics(tmp_path / "apex"), stages.metrics(tmp_path / "torch"), strict=True):
        assert apex["loss"] == pytest.approx(plain["loss"], abs=2e-6)
    assert stages.content(tmp_path / "apex", 4) != stages.content(tmp_path / "torch", 4)  # it was another optimizer
