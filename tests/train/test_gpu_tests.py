"""The tests that need GPUs, run up to the device: on gloo and the CPU, so that a slip in them is seen without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def _pytest(*words: str, require_te: bool = False) -> tuple[int, str]:
    environment = {
        **os.environ,
        "MEGATRON_ZJ_TEST_DEVICE": "cpu",
        "MEGATRON_ZJ_REQUIRE_TE": "1" if require_te else "",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    return done.returncode, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    ("file", "marks"),
    [("tests/train/test_on_gpu.py", "gpu"), ("tests/train/test_on_gpus.py", "multi_gpu")],
)
def test_they_pass_where_the_device_is_the_cpu(file: str, marks: str) -> None:
    code, said = _pytest(file, "-m", marks)
    assert code == 0, said


def test_the_fused_adam_s_passes_with_the_stand_in() -> None:
    code, said = _pytest("tests/engine/test_fused_adam.py", "-m", "gpu", "-rs", require_te=True)
    assert code == 0, said
    assert "skip" not in said.lower(), said


def test_a_missing_transformer_engine_is_red_where_it_is_required_and_a_skip_elsewhere() -> None:
    words = ("tests/train/test_on_gpus.py", "-m", "multi_gpu", "-k", "transformer_engine", "-rs")
    code, said = _pytest(*words)
    assert code == 0, said
    assert "Transformer Engine is not installed (make gpu-check TE=1)" in said
    code, said = _pytest(*words, require_te=True)
    assert code == 1, said
    assert "model.kernels=te needs Transformer Engine, which is not installed" in said
