"""Two torchrun agents train what one does; a killed worker or node comes back and the losses go on to the bit."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_zj.config.data import TokenizerConfig
from megatron_zj.data.prepare import PrepareConfig, TextConfig, prepare
from megatron_zj.data.vocabulary import train_sentencepiece
from megatron_zj.evaluation.clinic.files import write_demo
from tests.helpers.processes import Family
from tests.train import stages

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
CORES = sorted(os.sched_getaffinity(0))
STEPS = 24  # so many that a kill after the first save falls into the run
EVERY = 2  # steps from save to save
REJOIN_SECONDS = 60.0  # from a node's start, its imports included, to the first new save; a hang lasts for ever


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's encyclopaedia, and its pre-training (model, batch and all; fewer steps) by one agent's two workers."""
    made = tmp_path_factory.mktemp("nodes")
    write_demo(made / "data", 0)
    lines = (made / "data/tokenizer.txt").read_text(encoding="utf-8").splitlines()
    train_sentencepiece(lines[::8], vocab_size=2048, special_tokens=("<human>", "<bot>")).save(made / "tokenizer")
    text = TextConfig(files=(str(made / "data/encyclopaedia.jsonl"),))
    prepare(PrepareConfig(tokenizer=TokenizerConfig(path=made / "tokenizer"), data=text, out=made / "text"))
    with Family() as family:
        _wait([_agent(family, ["launch/local.sh", "2"], made, "one", CORES[:2])])
    return made


@pytest.fixture
def family() -> Iterator[Family]:
    """Agents and workers of one test, which end with it."""
    with Family() as family:
        yield family


def _agent(family: Family, launcher: list[str], folder: Path, run: str, cores: list[int]) -> subprocess.Popen[str]:
    """``cores``: of this node.  One a rank everywhere: with more threads a product rounds differently."""
    overrides = [
        "experiment=demo/pretrain",
        f"run.dir={folder / run}",
        f"run.num_steps={STEPS}",
        "run.timeout_seconds=60",
        f"tokenizer.path={folder / 'tokenizer'}",
        f"data.files=[{folder / 'text'}]",
        f"checkpoint.every={EVERY}",
        "checkpoint.keep_last=2",
    ]
    unset = ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE",)  # the scripts' own doing is what is tried
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "PYTHON": sys.executable}
    environment |= {"LOCAL_ADDR": "127.0.0.1", "MAX_RESTARTS": "2"}
    return family.start(
        [*launcher, *overrides],
        environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )


def _node(family: Family, number: int, port: int, folder: Path, run: str) -> subprocess.Popen[str]:
    """The agent of one of two nodes, each with one worker and one core."""
    launcher = ["launch/multinode.sh", "2", "1", f"127.0.0.1:{port}"]
    return _agent(family, launcher, folder, run, [CORES[number % len(CORES)]])


def _two_nodes(family: Family, folder: Path, run: str) -> tuple[subprocess.Popen[str], subprocess.Popen[str], int]:
    """Both agents, and the port of the meeting point, which the first one holds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    head = _node(family, 0, port, folder, run)
    _until(lambda: _listens(port) or head.poll() is not None)
    return head, _node(family, 1, port, folder, run), port


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _until(condition: Callable[[], bool], seconds: float = 200.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def _wait(agents: list[subprocess.Popen[str]], timeout: float = 240.0) -> None:
    outputs = [agent.communicate(timeout=timeout)[0] for agent in agents]
    for agent, output in zip(agents, outputs, strict=True):
        assert agent.returncode == 0, output[-4000:]


def _check_equal(folder: Path, run: str) -> None:
    alone = stages.metrics(folder / "one")
    assert [line["step"] for line in alone] == list(range(1, STEPS + 1))
    assert stages.metrics(folder / run) == alone
    assert stages.content(folder / run, STEPS) == stages.content(folder / "one", STEPS)


def _manifest(folder: Path, run: str, step: int) -> Path:
    return folder / run / "checkpoints" / f"step_{step:08d}" / "manifest.json"


def _newest(folder: Path, run: str) -> int:
    """The step of the last complete checkpoint."""
    return max(int(path.parent.name.removeprefix("step_")) for path in (folder / run).glob("*/step_*/manifest.json"))


def _kill_in_mid_run(pids: list[int], folder: Path, run: str) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert not _manifest(folder, run, STEPS).exists(), "the run was over before the kill"


def test_two_agents_train_as_one(family: Family, folder: Path) -> None:
    head, other, _port = _two_nodes(family, folder, "two")
    _wait([head, other])
    _check_equal(folder, "two")


def _failing_test(family: Family, folder: Path) -> None:
    with family:
        agents = _two_nodes(family, folder, "failed")[:2]
        _until(lambda: all(_children(agent.pid) for agent in agents))
        assert len(family.members()) >= 4
        _until(lambda: False, seconds=0.1)


def test_agents_and_their_workers_end_with_a_test_that_fails(folder: Path) -> None:
    family = Family()
    with pytest.raises(AssertionError, match="waited in vain"):
        _failing_test(family, folder)
    assert family.members() == []


def test_a_killed_worker_comes_back_and_goes_on_to_the_bit(family: Family, folder: Path) -> None:
    head, other, _port = _two_nodes(family, folder, "worker")
    _until(_manifest(folder, "worker", EVERY).is_file)
    _kill_in_mid_run(_children(other.pid), folder, "worker")
    _wait([head, other])
    _check_equal(folder, "worker")


def test_a_killed_node_that_is_started_again_goes_on_to_the_bit(family: Family, folder: Path) -> None:
    """Agent and worker die at once, as when a machine does.  With one store for rendezvous and workers this hangs;
    with two it trains again within a minute of its start."""
    head, other, port = _two_nodes(family, folder, "node")
    _until(_manifest(folder, "node", EVERY).is_file)
    _kill_in_mid_run([other.pid, *_children(other.pid)], folder, "node")
    other.communicate()
    assert head.poll() is None  # it waits for the other node
    saved, other = _newest(folder, "node"), _node(family, 1, port, folder, "node")
    _until(lambda: _newest(folder, "node") > saved, REJOIN_SECONDS)
    _wait([head, other])
    _check_equal(folder, "node")


def _children(parent: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=False)
    return [int(word) for word in listed.stdout.split()]
