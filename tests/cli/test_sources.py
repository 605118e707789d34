"""A checkpoint that cannot be what a run starts or goes on from is told before any model is built."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch.distributed as dist

from megatron_zj.checkpoint.load import newest
from megatron_zj.cli import build, inference, sources
from megatron_zj.config.run import RunConfig
from megatron_zj.data.tokenizer import Tokenizer
from tests.cli.commands import zj
from tests.cli.conftest import train_argv

STEP = "checkpoints/step_00000001"


def _built(*args: object, **settings: object) -> NoReturn:
    raise AssertionError("a model is built")  # no user's error: a traceback, which Outcome.error refuses


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "build_roles", _built)
    monkeypatch.setattr(inference, "build_engine", _built)


def _hugging_face(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder


def _interrupted(folder: Path) -> Path:
    (folder / STEP / "roles").mkdir(parents=True)
    return folder


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _unsaved(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text("{}", encoding="utf-8")
    return folder


def _file(folder: Path) -> Path:
    folder.write_text("weights", encoding="utf-8")
    return folder


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (_hugging_face, "it looks like a Hugging Face folder; run: zj convert --from {path} --to NEW_FOLDER"),
        (_interrupted, "{path}/checkpoints/step_00000001 has no manifest.json, so its save was interrupted"),
        (_empty, "it is empty; give a run that has ended"),
        (_unsaved, "it is the folder of a run that saved no checkpoint; give a run that has ended"),
        (_file, "it is a file; give the checkpoint's folder"),
    ],
)
@pytest.mark.parametrize("command", ["train", "generate", "chat"])
def test_what_is_no_checkpoint_is_called_what_it_is(
    world: Path, tmp_path: Path, command: str, make: Callable[[Path], Path], hint: str
) -> None:
    path = make(tmp_path / "source")
    source = [f"checkpoint.load={path}", f"run.dir={tmp_path / 'run'}"]
    if command == "train":
        outcome = zj([*train_argv("sft", world, "unused"), *source])
    else:
        outcome = zj([command, *source[: 1 if command == "chat" else 2], *_prompts(world, command)], typed="咳嗽\n")
    assert outcome.code == 1
    wanted = f"error: checkpoint.load: {path} is no complete checkpoint of this framework: {hint.format(path=path)}"
    assert wanted in outcome.error


def _prompts(world: Path, command: str) -> list[str]:
    return [f"data.files=[{world / 'data/prompts.jsonl'}]"] if command == "generate" else []


@pytest.mark.usefixtures("no_models")
def test_every_starting_point_of_the_wrong_kind_is_named_at_once(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two ranks, of which one sees nothing: what rank 0 finds counts, and nobody waits for anybody."""
    original = sources.newest
    monkeypatch.setattr(sources, "newest", lambda path: original(path) if dist.get_rank() == 0 else None)
    swapped = {"checkpoint__load": world / "reward", "algorithm__reward__load": world / "sft"}
    outcome = zj(train_argv("ppo", world, "swapped", **swapped), ranks=2)
    assert outcome.codes == (1, 1)
    reward, sft = (f"{world}/{name}/{STEP} holds a model with a" for name in ("reward", "sft"))
    assert f"checkpoint.load: {reward} 'score' head as 'model', and the actor needs a 'lm' head" in outcome.error
    assert f"algorithm.reward.load: {sft} 'lm' head as 'model', and the reward needs a 'score' head" in outcome.error


def test_what_every_rank_refuses_is_told_by_the_first_to_find_it(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever rank that is: rank 0, once inside a session, may be the one that leaves in silence."""
    original = build.checked_tokenizer

    def slow_on_rank_0(config: RunConfig) -> Tokenizer:
        time.sleep(1 - dist.get_rank())
        return original(config)

    monkeypatch.setattr(build, "checked_tokenizer", slow_on_rank_0)
    outcome = zj(train_argv("sft", world, "narrow_ranks", model__vocab_size=1000), ranks=2)
    assert outcome.codes == (1, 1)
    assert "model.vocab_size: 1000 rows, but the tokenizer has 1300 ids" in outcome.error


@pytest.mark.usefixtures("no_models")
def test_a_starting_point_of_another_shape_or_cut_short_is_refused(world: Path, tmp_path: Path) -> None:
    outcome = zj(train_argv("ppo", world, "wider", model__ffn_hidden_size=64))
    assert outcome.code == 1
    assert "checkpoint.load: " in outcome.error
    assert "ffn_hidden_size is 64 here and 48 in the checkpoint" in outcome.error
    assert "algorithm.reward.load: " in outcome.error
    shutil.copytree(world / "pretrain" / STEP, tmp_path / "cut")
    victim = next((tmp_path / "cut/roles").rglob("*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-1])
    outcome = zj(train_argv("sft", world, "from_cut", checkpoint__load=tmp_path / "cut"))
    assert outcome.code == 1
    assert f"checkpoint.load: {victim} is truncated or changed" in outcome.error


def test_a_scalar_head_that_learns_here_may_start_on_any_model(world: Path) -> None:
    """The guard above refuses no stage of the pipeline: a critic and a reward model grow a head of their own."""
    outcome = zj(train_argv("ppo", world, "grown", algorithm__critic__load=world / "sft", run__num_steps=1))
    assert outcome.code == 0, outcome.output


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"run__seed": 8}, "the checkpoint's data position belongs to other data: seed was"),
        ({"data__max_length": 64}, "the checkpoint's data position belongs to other data: "),
        ({"model__ffn_hidden_size": 64}, "role 'model' has another model than 'model': ffn_hidden_size is 64 here"),
    ],
)
def test_a_run_that_cannot_go_on_is_told_so(world: Path, changes: dict[str, object], complaint: str) -> None:
    outcome = zj(train_argv("sft", world, "sft", **changes))
    assert outcome.code == 1
    assert complaint in outcome.error
    assert "loaded" not in outcome.output + outcome.error  # it would contradict the refusal


@pytest.mark.usefixtures("no_models")
def test_a_ppo_run_finds_its_prompts_position_by_any_name(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the first run is whole
    assert zj(train_argv("ppo", world, "ppo_position", run__num_steps=1)).code == 0
    monkeypatch.setattr(build, "build_roles", _built)
    state = json.loads((newest(world / "ppo_position") / "algorithm.json").read_text(encoding="utf-8"))  # type: ignore[operator]
    assert "stream" not in state
    outcome = zj(train_argv("ppo", world, "ppo_position", run__seed=8))
    assert outcome.code == 1
    assert "the checkpoint's data position belongs to other data: seed was" in outcome.error
