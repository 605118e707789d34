"""The tutorial's commands, run in their order in an empty folder, do what the page says."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_zj.runtime.metrics import read_metrics
from tests.docs.commands import ROOT, shell_lines

PAGE = ROOT / "docs" / "tutorial.md"
SECONDS = 600  # a command may take, on a busy machine


def run(line: str, folder: Path) -> str:
    """One command of the page in ``folder``; its output."""
    program, *rest = shlex.split(line)
    if program == "python":
        command = [sys.executable, str(ROOT / rest[0]), *rest[1:]]
    else:
        command = [sys.executable, "-m", "megatron_zj.cli.main", *rest]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONUTF8": "1",
    }
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_tutorial_runs_from_files_to_ppo_and_back_to_hugging_face(tmp_path: Path) -> None:
    lines = [line for line in shell_lines(PAGE.read_text(encoding="utf-8")) if line.startswith(("zj ", "python "))]
    for line in lines:
        run(line, tmp_path)
    made = tmp_path / "runs" / "tutorial"
    losses = [step["loss"] for step in read_metrics(made / "sft" / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    rating = json.loads((made / "reward" / "evaluation" / "preference.json").read_text(encoding="utf-8"))
    assert {"pair_accuracy", "longer_wins"} <= set(rating)
    assert len((made / "answers" / "answers.jsonl").read_text(encoding="utf-8").splitlines()) == 4
    assert (made / "export" / "config.json").is_file()
    ppo = next(line for line in lines if "experiment=demo/ppo" in line)
    again = run(ppo.replace("run.num_steps=3", "run.num_steps=5"), tmp_path)
    assert "resuming from" in again
    assert [step["step"] for step in read_metrics(made / "ppo" / "metrics.jsonl")] == [1, 2, 3, 4, 5]
