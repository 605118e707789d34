"""Two torchrun agents train what one does; a killed worker comes back and the losses go on to the bit."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train import stages

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
CORES = sorted(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and the pre-training run by one agent with two workers."""
    made = tmp_path_factory.mktemp("nodes")
    stages.make_data(made)
    _wait([_agent(["--standalone", "--nproc-per-node=2"], made, "one", CORES[:2])])
    return made


def _agent(launcher: list[str], folder: Path, run: str, cores: list[int]) -> subprocess.Popen[str]:
    """``cores``: of this node.  One a rank everywhere: with more threads a product rounds differently."""
    overrides = stages.overrides_of("pretrain", folder, run)
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, "-m", "megatron_zj.cli.train", *overrides]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONUTF8": "1",
        # with a shared rendezvous store the agents of torch 2.13 hang when a node comes back
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )


def _wait(agents: list[subprocess.Popen[str]], timeout: float = 240.0) -> list[str]:
    try:
        outputs = [agent.communicate(timeout=timeout)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    for agent, output in zip(agents, outputs, strict=True):
        assert agent.returncode == 0, output[-4000:]
    return outputs


def _two_nodes() -> list[tuple[list[str], list[int]]]:
    """Launcher arguments and cores of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    launcher = [*shared, "--rdzv-id=nodes", "--local-addr=127.0.0.1", "--max-restarts=2"]
    return [(launcher, [CORES[node % len(CORES)]]) for node in range(2)]


def _check_equal(folder: Path, run: str) -> None:
    assert stages.metrics(folder / run) == stages.metrics(folder / "one")
    assert stages.content(folder / run, stages.STEPS) == stages.content(folder / "one", stages.STEPS)


def test_two_agents_train_as_one(folder: Path) -> None:
    _wait([_agent(launcher, folder, "two", cores) for launcher, cores in _two_nodes()])
    _check_equal(folder, "two")


def test_a_killed_worker_comes_back_and_goes_on_to_the_bit(folder: Path) -> None:
    agents = [_agent(launcher, folder, "killed", cores) for launcher, cores in _two_nodes()]
    first = folder / "killed" / "checkpoints" / "step_00000001" / "manifest.json"
    deadline = time.monotonic() + 200
    while not first.is_file() and time.monotonic() < deadline and all(agent.poll() is None for agent in agents):
        time.sleep(0.02)
    workers = _children(agents[1].pid)
    assert first.is_file()
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    _wait(agents)
    _check_equal(folder, "killed")


def _children(parent: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=False)
    return [int(word) for word in listed.stdout.split()]
