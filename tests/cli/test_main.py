"""``zj``: dispatch, and how errors look."""

from __future__ import annotations

import contextlib
import runpy
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_zj.cli import main as cli
from megatron_zj.cli.compose import options_of
from megatron_zj.config.loader import ConfigError
from megatron_zj.runtime.distributed import LeftError


def test_without_a_command_it_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("train", "prepare", "convert", "evaluate", "generate", "chat", "check", "launch", "tokenizer"):
        assert f"\n  {name} " in shown


@pytest.mark.parametrize("command", ["train", "check", "launch"])
def test_help_lists_the_experiments(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    listed = " ".join(capsys.readouterr().out.split()).partition("experiments: ")[2]
    families = dict(family.split("/", 1) for family in listed.split("; "))
    found = {f"{family}/{name}" for family, names in families.items() for name in names.strip("{}").split(", ")}
    assert found == set(options_of("experiment"))


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_help_shows_no_markup(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        cli.main([command, "--help"])
    shown = capsys.readouterr().out
    assert len(shown) > 100
    assert "``" not in shown


def test_an_unknown_command_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err


def test_a_command_is_imported_only_when_called_and_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    module = types.ModuleType("megatron_zj.cli.chat")
    module.main = lambda argv: seen.append(argv) or 7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron_zj.cli.chat", module)
    assert cli.main(["chat", "--debug", "a=1"]) == 7
    assert seen == [["a=1"]]


class OwnError(RuntimeError):
    """Stands for an error type of this package."""


OwnError.__module__ = "megatron_zj.data.errors"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConfigError(["a: wrong", "b: wrong"]), "error: a: wrong\n  b: wrong\n"),
        (OwnError("record 3 is empty"), "error: record 3 is empty\n"),
        (FileNotFoundError(2, "No such file or directory", "x.jsonl"), "error: x.jsonl: No such file or directory\n"),
        (OSError(28, "No space left on device", "ckpt"), "error: ckpt: No space left on device\n  the disk at /"),
    ],
)
def test_an_error_of_the_users_is_one_message_without_a_traceback(
    error: Exception, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: list[str]) -> int:
        raise error

    assert cli.guarded(fail, []) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(expected)
    assert shown.endswith("\n(add --debug for the traceback)\n")
    assert cli.guarded(fail, ["--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [MemoryError("cannot allocate 3 GiB"), torch.cuda.OutOfMemoryError("CUDA: tried to allocate 3 GiB")]
)
def test_want_of_memory_says_what_to_lower(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.guarded(fails_with(error), []) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: out of memory\n")
    assert "allocate 3 GiB" in shown
    assert "lower engine.micro_batch_tokens" in shown


def test_under_python_m_too_our_own_error_is_the_users(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["main.py", "convert", "--from", "gone", "--to", "there"])
    monkeypatch.delitem(sys.modules, "megatron_zj.cli.main")  # as in a fresh process
    with pytest.raises(SystemExit) as end:
        runpy.run_module("megatron_zj.cli.main", run_name="__main__")
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("error: gone is no complete checkpoint of this framework")


def test_a_fault_of_the_program_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: list[str]) -> int:
        raise KeyError("x")

    assert cli.guarded(fail, []) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "please report" in shown


def test_a_message_stays_on_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: list[str]) -> int:
        raise ValueError("\n".join(str(i) for i in range(500)))

    assert cli.guarded(fail, []) == 1
    assert len(capsys.readouterr().err.splitlines()) < 40


def test_an_interrupt_is_no_error_of_anyones(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_: list[str]) -> int:
        raise KeyboardInterrupt

    assert cli.guarded(interrupt, []) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_under_torchrun_the_message_stands_in_its_closing_report_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
    assert cli.guarded(fails_with(LeftError("rank 1 leaves: another rank was lost")), []) == 1
    assert capsys.readouterr().err == "rank 1 leaves: another rank was lost\n"
    assert not report.exists()  # the rank that tells it is the root cause
    assert cli.guarded(fails_with(OwnError("record 3 is empty")), []) == 1
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(report))
    assert "error: record 3 is empty" in ChildFailedError("train", {0: failure}).format_msg()


def fails_with(error: Exception) -> Callable[[list[str]], int]:
    def command(_: list[str]) -> int:
        raise error

    return command
