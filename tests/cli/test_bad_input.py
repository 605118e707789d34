"""Bad input ends a real command with one message that names the place and says what to change; nothing is lost."""

from __future__ import annotations

import json
import shutil
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_zj.checkpoint import save as saving
from megatron_zj.checkpoint.load import newest
from megatron_zj.cli.main import main
from megatron_zj.data.vocabulary import train_sentencepiece
from tests.cli.commands import zj
from tests.cli.conftest import train_argv

MANY = "头痛怎么办？" * 400  # more tokens than any context here


def _lines(folder: Path, count: int = 8) -> list[str]:
    return (folder / "data/sft.jsonl").read_text(encoding="utf-8").splitlines()[:count]


def _with_turn(line: str, index: int, content: str) -> str:
    record = json.loads(line)
    record["messages"][index]["content"] = content
    return json.dumps(record, ensure_ascii=False)


def _misordered(line: str) -> str:
    record = json.loads(line)
    record["messages"].insert(0, record["messages"][1])
    return json.dumps(record, ensure_ascii=False)


def _file(folder: Path, name: str, bad: str | None) -> Path:
    """A file of dialogues whose fourth line is ``bad``."""
    lines = _lines(folder)
    if bad is not None:
        lines[3] = bad
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# Configuration: found before a process group exists, so the command runs here


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["train", "experiment=debug/sft", "optim.lrr=1"], "optim.lrr: unknown key; did you mean 'lr'?"),
        (["train", "experiment=debug/sft", "modle=tiny"], "modle: unknown key; did you mean 'model'?"),
        (["train", "experiment=debug/sft", "model=tinny"], "model: no option 'tinny'; did you mean 'tiny'?"),
        (["train", "experiment=demo/stf"], "experiment: no option 'demo/stf'; did you mean 'demo/sft'?"),
        (["train", "experiment=debug/sft", "optim.lr=fast"], "optim.lr: expected a number, got the string 'fast'"),
        (["train", "experiment=debug/sft", "optim.lr"], "'optim.lr' is no override"),
        (["train", "experiment=debug/sft"], "data.files: empty; name the files: data.files=[PATH, ...]"),
        (["train", "experiment=debug/sft", "data.files=[gone.jsonl]"], "data.files[0]: gone.jsonl does not exist"),
        (["train", "experiment=debug/sft", "world_size=2"], "laid out for 2 ranks and 1 are running; start 2"),
        (["train", "experiment=debug/sft", "parallel.tp=2"], "does not divide the 1 ranks of placement 'all'"),
        (["train", "--config", "gone.yaml"], "gone.yaml: No such file or directory"),
        (["generate", "data.files=[x]"], "checkpoint.load: missing"),
        (["generate", "checkpoint.load=gone"], "data.files: no prompts; give data.files=[FILE,...]"),
        (["evaluate", "checkpoint.load=x", "suites=[exma]"], "did you mean 'exam'?"),
        (["evaluate", "checkpoint.load=x"], "data.files: nothing to evaluate on"),
        (["chat", "checkpoint.load=x", "sampling.temprature=1"], "did you mean 'temperature'?"),
        (["convert", "--from", "gone", "--to", "there"], "gone"),
    ],
)
def test_configuration(argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert expected in shown
    assert len(shown.splitlines()) < 10


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["world_size=8", "parallel.tp=8"],
            "model.num_attention_heads = 4 is not divisible by tp = 8; use a tp of 1, ",
        ),
        (["world_size=8", "parallel.tp=3"], "does not divide the 8 ranks of placement 'all'"),
        (["world_size=4", "parallel.pp=4"], "model.num_layers = 2 is not divisible by pp x vpp = 4"),
        (["world_size=64", "algorithm.global_batch_size=4"], "some ranks would never have a row; raise it to 64"),
        (["data.max_length=1000"], "exceeds model.max_position_embeddings"),
    ],
)
def test_layout_and_batch_arithmetic(overrides: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "experiment=debug/sft", "--no-files", *overrides]) == 1
    assert expected in capsys.readouterr().out


# Data: found by a run, before its model is built


def _data_error(world: Path, path: Path, **changes: Any) -> str:
    outcome = zj(train_argv("sft", world, "bad", data__files=f"[{path}]", run__num_steps=1, **changes))
    assert outcome.code == 1
    assert "loaded weights" not in outcome.output  # nobody waits for the model first
    assert not (world / "bad/checkpoints").exists()
    return outcome.error


def test_a_file_that_is_no_text_of_a_known_encoding(world: Path) -> None:
    path = world / "utf16.jsonl"
    path.write_bytes("\n".join(_lines(world)).encode("utf-16"))
    assert f"{path} is neither UTF-8 nor GB18030 text" in _data_error(world, path)
    path.write_text("", encoding="utf-8")
    assert f"{path} is empty\n    -> remove it from data.files" in _data_error(world, path)


def test_a_line_that_is_not_json_stops_or_is_left_out_and_counted(world: Path) -> None:
    path = _file(world, "malformed.jsonl", '{"messages": [}')
    complaint = f"{path}, record at line 4: the line is not JSON (Expecting value at column 15)"
    error = _data_error(world, path)
    assert complaint in error
    assert "data.on_bad_record=skip" in error
    skipping = {"data__on_bad_record": "skip", "run__num_steps": 1}
    outcome = zj(train_argv("sft", world, "skipped", data__files=f"[{path}]", **skipping))
    assert outcome.code == 0
    assert "left out: 1 bad, 0 too long; shortened: 0 (of 8 records)" in outcome.output
    assert complaint in outcome.output


def test_dialogues_with_empty_or_misordered_turns(world: Path) -> None:
    path = _file(world, "turns.jsonl", _with_turn(_lines(world)[1], 0, "  "))
    assert f"{path}, record at line 4, field 'messages[0].content': the text is empty" in _data_error(world, path)
    path = _file(world, "turns.jsonl", _misordered(_lines(world)[1]))
    error = _data_error(world, path)
    assert "record at line 4, field 'messages[0].role': turn 1 is from 'assistant' where 'user' must speak" in error
    assert "-> join neighbouring turns of one speaker and begin with the user" in error


def test_a_record_longer_than_the_context_under_each_policy(world: Path) -> None:
    path = _file(world, "long.jsonl", _with_turn(_lines(world)[1], 1, MANY))
    error = _data_error(world, path, data__overlong="error")
    assert f"{path}, record at line 4: " in error
    assert "-> raise data.max_length, or set data.overlong to truncate, split (dialogues) or skip" in error
    policies = {"truncate": "0 too long; shortened: 1", "split": "0 too long; shortened: 1", "skip": "1 too long;"}
    for policy, counts in policies.items():
        shutil.copytree(world / "sft", world / f"long_{policy}")  # a run on other data: ends once this has been read
        run = {"data__files": f"[{path}]", "data__overlong": policy}
        outcome = zj(train_argv("sft", world, f"long_{policy}", **run))
        assert "belongs to other data" in outcome.error
        assert counts in outcome.output
        assert "8 records, " in outcome.output


def test_a_token_id_outside_the_vocabulary_names_its_file(world: Path) -> None:
    builder = IndexedDatasetBuilder(str(world / "foreign.bin"), dtype=np.int32)
    for _ in range(20):
        builder.add_item(torch.tensor([1, *range(5, 40), 5000, 2]))
        builder.end_document()
    builder.finalize(str(world / "foreign.idx"))
    outcome = zj(train_argv("pretrain", world, "of_foreign", data__files=f"[{world / 'foreign'}]"))
    assert outcome.code == 1
    assert f"{world}/foreign.bin holds token id 5000, outside the vocabulary of 1300" in outcome.error
    outcome = zj(train_argv("sft", world, "narrow", model__vocab_size=1000))
    assert "model.vocab_size: 1000 rows, but the tokenizer has 1300 ids" in outcome.error


def test_ranks_that_meet_the_same_error_tell_it_once(world: Path) -> None:
    path = _file(world, "same.jsonl", "no json")
    outcome = zj(train_argv("sft", world, "same", data__files=f"[{path}]"), ranks=2)
    assert outcome.codes == (1, 1)
    assert "record at line 4: the line is not JSON" in outcome.error
    assert "leaves: another rank tells the same error" in outcome.output


# Checkpoints


def test_another_tokenizer_than_the_checkpoints(world: Path) -> None:
    lines = (world / "data/tokenizer.txt").read_text(encoding="utf-8").splitlines()
    train_sentencepiece(lines, vocab_size=1290, special_tokens=("<human>", "<bot>")).save(world / "other")
    outcome = zj(train_argv("sft", world, "foreign_tokenizer", tokenizer__path=world / "other"))
    assert outcome.code == 1
    assert "was trained with another tokenizer" in outcome.error
    assert "set tokenizer.path and tokenizer.special_tokens to what it was trained with" in outcome.error


def test_a_damaged_or_missing_checkpoint(world: Path) -> None:
    found = newest(world / "pretrain")
    assert found is not None
    damaged = world / "damaged"
    shutil.copytree(found, damaged)
    victim = next((damaged / "roles").rglob("*.distcp"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    outcome = zj(train_argv("sft", world, "from_damaged", checkpoint__load=damaged))
    assert outcome.code == 1
    assert f"{victim} is damaged" in outcome.error
    shutil.copytree(world / "sft", world / "of_other_pieces")
    pieces = world / "of_other_pieces/checkpoints/step_00000001/tokenizer/tokenizer.model"
    content = bytearray(pieces.read_bytes())
    content[len(content) // 2] ^= 1
    pieces.write_bytes(content)
    outcome = zj(["generate", f"checkpoint.load={world}/of_other_pieces", f"data.files=[{world}/data/prompts.jsonl]"])
    assert outcome.code == 1
    assert f"{pieces} is damaged" in outcome.error
    outcome = zj(train_argv("sft", world, "from_nothing", checkpoint__load=world / "data"))
    assert f"checkpoint.load: {world / 'data'} is no complete checkpoint" in outcome.error


# While training


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_nan_loss_names_step_and_records_and_keeps_the_last_good_checkpoint(
    world: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    if asynchronous:  # the checkpoint of step 1 is still being written when step 2 fails
        original = saving._write
        monkeypatch.setattr(saving, "_write", lambda save: (time.sleep(2), original(save)))
    exploding = {"optim__lr": 1e30, "optim__clip_grad": 1e30, "checkpoint__async_save": asynchronous}
    outcome = zj(train_argv("sft", world, f"nan_{asynchronous}", **exploding))
    assert outcome.code == 1
    assert "step 2: the loss is nan (data-parallel shard 0, micro-batch 0, rows [" in outcome.error
    assert "The weights are those before this step. Lower optim.lr" in outcome.error
    assert outcome.error.count(f"    {world}/data/sft.jsonl, record at line ") == 4  # the global batch
    kept = newest(world / f"nan_{asynchronous}")
    assert kept is not None
    assert kept.name == "step_00000001"


def test_weights_whose_validation_loss_is_nan_are_not_saved(world: Path) -> None:
    exploding = {"optim__lr": 1e30, "optim__clip_grad": 1e30, "run__eval_every": 1}
    outcome = zj(train_argv("sft", world, "nan_validation", **exploding))
    assert outcome.code == 1
    assert "step 1: the validation loss is nan" in outcome.error
    assert newest(world / "nan_validation") is None


def test_a_full_disk_keeps_the_last_checkpoint_and_says_what_to_do(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world / "sft", world / "full")
    usage = namedtuple("usage", ("total", "used", "free"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, (1 << 30) - 4096, 4096))
    outcome = zj(train_argv("sft", world, "full"))
    assert outcome.code == 1
    assert f"no space left for a checkpoint in {world}/full/checkpoints" in outcome.error
    assert "The checkpoints saved before are complete: free some space, lower checkpoint.keep_last" in outcome.error
    assert "step 2/" not in outcome.output  # nothing is learned that could not be kept
    kept = newest(world / "full")
    assert kept is not None
    assert kept.name == "step_00000001"


@pytest.mark.slow
def test_when_a_rank_dies_the_others_end_in_time_and_name_it_and_its_phase(world: Path) -> None:
    argv = train_argv("sft", world, "killed", run__num_steps=100000, checkpoint__every=0)
    outcome = zj(argv, ranks=2, kill=(1, world / "killed/metrics.jsonl"), timeout=90)
    assert outcome.codes == (1, -9)
    assert "a collective failed: rank 1 (" in outcome.error
    assert "last heard in phase 'step " in outcome.error
    assert outcome.seconds < 60  # run.timeout_seconds
