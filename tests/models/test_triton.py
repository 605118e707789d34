"""With ``model.kernels=triton`` every operator of a LLaMA is a Triton kernel, forward and backward, and exact."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

LAYER = {  # launches of one layer in one forward and backward pass
    "rms_norm_forward": 2,
    "rms_norm_backward": 2,
    "rope_rotate": 4,
    "attention_forward": 1,
    "attention_delta": 1,
    "attention_dkdv": 1,
    "attention_dq": 1,
    "swiglu_forward": 1,
    "swiglu_backward": 1,
}
FINAL_NORM = {"rms_norm_forward": 1, "rms_norm_backward": 1}
HEADS = {
    "lm": FINAL_NORM | {"logprob_forward": 1, "logprob_dlogits": 1},
    "value": FINAL_NORM | {"value_head_forward": 1, "value_head_backward": 1},
    "score": {"reward_head_forward": 1, "reward_head_backward": 1},  # it norms the tokens it reads itself
}


@pytest.mark.parametrize(
    "head", ["lm", pytest.param("value", marks=pytest.mark.slow), pytest.param("score", marks=pytest.mark.slow)]
)
def test_a_step_on_triton_kernels_equals_the_reference(head: str) -> None:
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.models.interpreted", head],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    result = json.loads(process.stdout.splitlines()[-1])
    assert result["outputs"] <= 1e-5
    for name, difference in result["gradients"].items():
        assert difference <= 1e-5, name
    for kernel in LAYER.keys() | HEADS[head].keys():
        expected = 2 * (LAYER.get(kernel, 0) + HEADS[head].get(kernel, 0))  # two packs
        assert result["launches"][kernel] == expected, kernel
