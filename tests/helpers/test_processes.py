"""Nothing that a family's programs started is alive after it, sessions of their own or not."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.processes import Family

# An agent as torchrun is one: its worker has a session of its own and does not die with it.
AGENT = """
import subprocess, sys, time
worker = subprocess.Popen(["sleep", "600"], start_new_session=True)
print(worker.pid, flush=True)
time.sleep(600)
"""


def _agent(family: Family) -> tuple[subprocess.Popen[str], int]:
    """An agent and its worker's process id."""
    agent = family.start([sys.executable, "-c", AGENT], os.environ, stdout=subprocess.PIPE)
    assert agent.stdout is not None
    return agent, int(agent.stdout.readline())


def _alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _failing_test(family: Family, pairs: list[tuple[subprocess.Popen[str], int]]) -> None:
    with family:
        pairs += [_agent(family) for _ in range(2)]
        assert sorted(family.members()) == sorted(pid for agent, worker in pairs for pid in (agent.pid, worker))
        raise AssertionError("waited in vain")


def test_agents_and_workers_end_when_the_test_fails() -> None:
    family, pairs = Family(), list[tuple[subprocess.Popen[str], int]]()
    with pytest.raises(AssertionError, match="waited in vain"):
        _failing_test(family, pairs)
    for agent, worker in pairs:
        assert agent.returncode == -9  # reaped
        assert not _alive(worker)
    assert family.members() == []


def test_a_worker_whose_agent_is_dead_ends_too() -> None:
    with Family() as family:
        agent, worker = _agent(family)
        agent.kill()
        agent.wait()
        time.sleep(0.1)
        assert family.members() == [worker]  # what makes the mark necessary
    assert not _alive(worker)


def test_other_programs_are_left_alone() -> None:
    with Family() as other:
        _, worker = _agent(other)
        with Family() as family:
            _agent(family)
        assert _alive(worker)
        assert len(other.members()) == 2


def test_a_program_that_ended_and_was_read_is_no_trouble() -> None:
    with Family() as family:
        process = family.start(["echo", "said"], os.environ, stdout=subprocess.PIPE)
        assert process.communicate()[0] == "said\n"
    assert process.returncode == 0
