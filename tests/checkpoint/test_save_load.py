"""What is saved comes back, under any layout; what is incomplete does not count."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_zj.checkpoint import save as saving
from megatron_zj.checkpoint.errors import CheckpointError
from megatron_zj.checkpoint.load import load, newest
from megatron_zj.checkpoint.manifest import read_manifest
from megatron_zj.config.parallel import ParallelConfig
from tests.checkpoint.toy import Toy, checkpointer, equal, groups_of, toy
from tests.helpers.ranks import run_ranks

LAYOUTS = {"tp2": ParallelConfig(tp=2), "dp2": ParallelConfig(), "pp2": ParallelConfig(pp=2)}


def _every_layout_pair(root: Path) -> list[str]:
    wrong = []
    for a, first in LAYOUTS.items():
        state = {"position": 7, "name": "数据", "moments": (torch.arange(3), {"mean": 0.1})}
        source = toy(first, seed=3)
        checkpointer(root / a).save(5, {"model": source}, state)
        for b, second in LAYOUTS.items():
            target = toy(second, seed=40)
            got = load(root / a, {"model": target})
            same = got["position"] == 7 and got["name"] == "数据" and torch.equal(got["moments"][0], torch.arange(3))
            if not (same and equal(target, toy(second, seed=3)) and target.common == source.common):
                wrong.append(f"{a}->{b}")
    return wrong


def test_every_layout_reads_what_every_other_wrote_to_the_bit(tmp_path: Path) -> None:
    assert run_ranks(2, _every_layout_pair, tmp_path) == [[], []]
    manifest = read_manifest(tmp_path / "tp2" / "step_00000005")
    assert manifest.step == 5
    assert manifest.config == {"run": {"seed": 1}}
    assert manifest.roles["model"].layout == {"pp": 1, "dp": 1, "cp": 1, "tp": 2, "vpp": 1}
    assert set(manifest.versions) == {"python", "torch", "megatron_core", "megatron_zj"}


def _split_roles(root: Path) -> list[bool]:
    layouts = {"a": ParallelConfig(tp=2), "b": ParallelConfig(pp=2)}
    groups = groups_of(layouts, {"a": (0, 2), "b": (2, 2)})

    def engines(seed: int) -> dict[str, Toy | None]:
        a, b = groups["a"], groups["b"]
        return {
            "actor": Toy(a, seed) if a else None,
            "reference": Toy(a, seed + 7, trainable=False) if a else None,
            "critic": Toy(b, seed + 9, head="value") if b else None,
        }

    first = engines(1)
    writer = checkpointer(root, async_save=True)
    writer.save(1, first, {"n": 1})
    writer.wait()
    second = engines(50)
    load(root, second)
    outcome = [
        equal(a, b) and (a.common == b.common or not a.trainable)
        for a, b in zip(first.values(), second.values(), strict=True)
        if a is not None and b is not None and a.trainable
    ]
    both = groups_of({"all": ParallelConfig(tp=2)})["all"]
    assert both is not None
    together = {"actor": Toy(both, 80), "critic": Toy(both, 80, head="value")}
    load(root, together, weights_only=True)
    outcome.append(torch.equal(together["critic"].tensors["0"], Toy(both, 10, head="value").tensors["0"]))
    outcome.append(torch.equal(together["actor"].tensors["3"], Toy(both, 1).tensors["3"]))
    return outcome


def test_roles_on_two_placements_save_under_their_own_groups_and_load_on_one(tmp_path: Path) -> None:
    assert all(all(outcome) for outcome in run_ranks(4, _split_roles, tmp_path))
    common = tmp_path / "step_00000001" / "roles" / "critic" / "common.json"
    assert '"step": 10' in common.read_text()  # the second placement's own unsharded state


def _retention(root: Path) -> list[list[str]]:
    writer = checkpointer(root, keep_last=2, keep_every=4)
    model = toy(ParallelConfig(), 1)
    seen = []
    for step in range(1, 8):
        writer.save(step, {"model": model}, {})
        seen.append(sorted(path.name[-1] for path in root.iterdir()))
    return seen


def test_keep_last_and_keep_every_delete_the_rest_and_never_the_newest(tmp_path: Path) -> None:
    (seen,) = run_ranks(1, _retention, tmp_path)
    assert seen == [["1"], ["1", "2"], ["2", "3"], ["3", "4"], ["4", "5"], ["4", "5", "6"], ["4", "6", "7"]]


def _resave(root: Path) -> list[Any]:
    model = toy(ParallelConfig(), 1)
    writer = checkpointer(root)
    writer.save(3, {"model": model}, {"version": 1})
    writer.save(3, {"model": model}, {"version": 2})
    first = load(root, {"model": model})["version"]
    shutil.copytree(root / "step_00000003", root / "step_00000003.new")  # killed before the renaming
    (root / "step_00000003" / "manifest.json").unlink()
    second = load(root, {"model": model})["version"]
    writer.save(3, {"model": model}, {"version": 3})
    return [first, second, load(root, {"model": model})["version"], sorted(path.name for path in root.iterdir())]


def test_saving_a_step_again_replaces_it_only_when_the_new_one_is_complete(tmp_path: Path) -> None:
    assert run_ranks(1, _resave, tmp_path) == [[2, 2, 3, ["step_00000003"]]]


def test_newest_finds_the_complete_one_under_a_run_a_checkpoints_and_a_step_folder(tmp_path: Path) -> None:
    run_ranks(1, _retention, tmp_path / "run" / "checkpoints")
    checkpoints = tmp_path / "run" / "checkpoints"
    partial = checkpoints / "step_00000009"
    shutil.copytree(checkpoints / "step_00000007", partial)
    (partial / "manifest.json").unlink()
    for path in (tmp_path / "run", checkpoints, checkpoints / "step_00000007"):
        assert newest(path) == checkpoints / "step_00000007"
    assert newest(partial) is None
    assert newest(tmp_path / "nowhere") is None


def _async(root: Path) -> dict[str, Any]:
    model, expected = toy(ParallelConfig(tp=2), 1), toy(ParallelConfig(tp=2), 1)
    gate, original = threading.Event(), saving._write
    writer = checkpointer(root, async_save=True)

    def slow(save: Any) -> None:
        gate.wait(30)
        original(save)

    saving._write = slow  # this process is a fork of the test's
    writer.save(1, {"model": model}, {"n": 1})
    model.advance()  # training goes on while the files are written
    before = newest(root)
    gate.set()
    writer.save(2, {"model": model}, {"n": 2})  # waits for the first
    after = newest(root)
    writer.wait()
    target = toy(ParallelConfig(tp=2), 9)
    load(root / "step_00000001", {"model": target})
    snapshot = equal(target, expected)
    load(root, {"model": target})
    return {"before": before, "after": after and after.name, "snapshot": snapshot, "second": equal(target, model)}


def test_an_asynchronous_save_holds_the_state_of_its_step_and_counts_only_when_durable(tmp_path: Path) -> None:
    for result in run_ranks(2, _async, tmp_path):
        assert result == {"before": None, "after": "step_00000001", "snapshot": True, "second": True}


def _async_failure(root: Path) -> tuple[str, list[str]]:
    model = toy(ParallelConfig(tp=2), 1)
    writer = checkpointer(root, async_save=True)
    writer.save(1, {"model": model}, {})
    writer.wait()
    original = saving._write

    def broken(save: Any) -> None:
        if dist.get_rank() == 1:
            raise OSError(28, "No space left on device")
        original(save)

    saving._write = broken
    writer.save(2, {"model": model}, {})
    with pytest.raises(CheckpointError) as caught:
        writer.wait()
    dist.barrier()
    names = sorted(path.name for path in root.iterdir())
    dist.barrier()  # the next save makes a folder of its own
    saving._write = original
    writer.save(3, {"model": model}, {})
    writer.wait()
    return str(caught.value), names


def test_a_failure_of_one_background_writer_is_raised_on_all_ranks_and_the_next_save_works(tmp_path: Path) -> None:
    for message, names in run_ranks(2, _async_failure, tmp_path):
        assert message.startswith("rank 1: no space left")
        assert names == ["step_00000001"]
    assert newest(tmp_path) == tmp_path / "step_00000003"


def _differing_state(root: Path) -> str:
    model = toy(ParallelConfig(), 1)
    with pytest.raises(CheckpointError) as caught:
        checkpointer(root).save(1, {"model": model}, {"position": dist.get_rank()})
    return str(caught.value)


def test_algorithm_state_that_differs_between_ranks_is_refused(tmp_path: Path) -> None:
    for message in run_ranks(2, _differing_state, tmp_path):
        assert "rank 1: the algorithm's state_dict() differs" in message
    assert newest(tmp_path) is None
