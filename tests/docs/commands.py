"""The shell commands of a Markdown page, and whether the program would take them.

A command goes through the parser, the loader and the checks that it would meet when typed; nothing is started and no
file is looked for.  ``...`` in a page stands for what the reader fills in: such an argument is left out.
"""

from __future__ import annotations

import argparse
import importlib
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import pytest

from megatron_zj.cli import prepare, tokenizer
from megatron_zj.cli.compose import compose_run
from megatron_zj.cli.inference import compose_inference
from megatron_zj.cli.jobs import expand
from megatron_zj.cli.main import COMMANDS
from megatron_zj.config.checks import check
from megatron_zj.config.inference import EvaluationConfig, GenerationConfig, InferenceConfig
from megatron_zj.config.loader import ConfigError, load
from megatron_zj.data.prepare import PrepareConfig

ROOT = Path(__file__).resolve().parents[2]
OTHERS = {"pip", "source", "export", "pytest", "ruff", "mypy"}  # programs whose arguments are not ours to check
GPUS_PER_NODE = 8  # of launch/slurm.sbatch
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_SHELL = {"", "bash", "sh"}
_TOKENIZER = {"train": tokenizer.TrainConfig, "extend": tokenizer.ExtendConfig, "show": tokenizer.ShowConfig}


def shell_lines(text: str) -> list[str]:
    """Commands of a page's shell blocks, continued lines joined, comments gone.

    An unmarked block counts where its lines begin with a program of ours.
    """
    found = []
    for language, block in FENCE.findall(text):
        if language not in _SHELL:
            continue
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            words = _split(line)
            if words and (language or words[0] in ("zj", "make", "torchrun", "python")):
                found.append(line.strip())
    return found


def inline_commands(text: str) -> list[str]:
    """``make x`` and ``zj x ...`` in running text."""
    without_blocks = FENCE.sub("", text)
    return [words for words in re.findall(r"`((?:make|zj) [^`]+)`", without_blocks) if _split(words)]


def _split(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:
        return []


def refuse(line: str) -> list[str]:
    """Why the command would be refused; [] where it would run, given its files."""
    problems: list[str] = []
    for part in line.split(" && "):
        try:
            _program(_split(part))
        except (ConfigError, ValueError) as error:
            problems.append(f"{line}: {error}")
    return problems


def _program(words: list[str]) -> None:
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if not words:
        return
    program, *rest = words
    if program == "make":
        _make(rest)
    elif program == "zj":
        _zj(rest)
    elif program == "torchrun":
        _torchrun(rest)
    elif program == "python":
        _python(rest)
    elif program == "sbatch":
        _sbatch(rest)
    elif program.startswith("launch/"):
        _script(program)
        sizes = rest[:1] if program.endswith("local.sh") else rest[:2]
        _train(rest[1 if program.endswith("local.sh") else 3 :], _product(sizes))
    elif program not in OTHERS:
        raise ValueError(f"no program {program!r} is known here")


def _make(words: Sequence[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z]+) \?=", makefile, re.MULTILINE))
    for word in words:
        name, equals, _ = word.partition("=")
        if name not in (variables if equals else targets) and word != "...":
            raise ValueError(f"the Makefile has no {name!r}")


def _zj(words: Sequence[str]) -> None:
    name, *rest = words
    if name.startswith("-"):
        return
    if name not in COMMANDS:
        raise ValueError(f"zj has no command {name!r}")
    if "--help" in rest:
        return
    _command(name, [_filled(word) for word in rest if not _open(word)], is_open=any(_open(word) for word in rest))


def _open(word: str) -> bool:
    """Whether the reader fills it in as a whole: ``...``, ``experiment=...``."""
    return word == "..." or word.endswith("=...")


def _filled(word: str) -> str:
    return word.replace("[...]", "[x]").replace(",...]", "]")


def _command(name: str, rest: list[str], *, is_open: bool = False) -> None:
    if name == "prepare":
        if rest[:1] != ["verify"] and rest:
            load(PrepareConfig, prepare.settings(rest, {"data": {"kind": "corpus"}}))
    elif name == "tokenizer":
        if rest:
            load(_TOKENIZER[rest[0]], prepare.settings(rest[1:], {}))
    elif name in ("evaluate", "generate", "chat"):
        if rest:
            compose_inference(
                rest, {"evaluate": EvaluationConfig, "generate": GenerationConfig}.get(name, InferenceConfig)
            )
    elif rest:
        options = _parsed(lambda: importlib.import_module(f"megatron_zj.cli.{name}").main(rest))
        overrides = tuple(getattr(options, "overrides", ()))
        points = expand(overrides) if getattr(options, "multirun", False) else [overrides]
        for point in points if overrides else ():
            _possible(point, getattr(options, "nproc", None), is_open)


def _torchrun(words: list[str]) -> None:
    module = words[words.index("-m") + 1].rpartition(".")[2]
    size = int(words[words.index("--nproc-per-node") + 1]) if words[1].isdigit() else None
    rest = words[words.index("-m") + 2 :]
    if module == "train":
        _train(rest, size)
    else:
        _zj([module, *rest])


def _train(words: Sequence[str], world_size: int | None) -> None:
    kept = tuple(_filled(word) for word in words if not _open(word))
    _possible(kept, world_size, any(_open(word) for word in words))


def _sbatch(words: list[str]) -> None:
    at = next((index for index, word in enumerate(words) if word.startswith("launch/")), None)
    if at is None:
        return
    _script(words[at])
    nodes = int(words[words.index("--nodes") + 1]) if words[1:2] and words[1].isdigit() else None
    _train(words[at + 1 :], nodes and nodes * GPUS_PER_NODE)


def _script(name: str) -> None:
    if not (ROOT / name).is_file():
        raise ValueError(f"there is no {name}")


def _product(sizes: Sequence[str]) -> int | None:
    return None if not all(size.isdigit() for size in sizes) else int(sizes[0]) * int((*sizes, "1")[1])


def _python(words: list[str]) -> None:
    if words[0] == "-m":
        if not (ROOT / words[1].replace(".", "/")).with_suffix(".py").is_file():
            raise ValueError(f"there is no module {words[1]}")
        return
    _script(words[0])
    _parsed(lambda: runpy.run_path(str(ROOT / words[0]), run_name="__main__"), words)


class _Done(BaseException):
    """Carries a parser's answer out of the command."""


def _parsed(call: Callable[[], object], argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Run a command up to the end of its argument parser.  Raises ValueError with the parser's own complaint."""

    def stop(parse: Callable[..., argparse.Namespace]) -> Callable[..., NoReturn]:
        def parse_and_stop(*args: Any, **kwargs: Any) -> NoReturn:
            raise _Done(parse(*args, **kwargs))

        return parse_and_stop

    def complain(self: argparse.ArgumentParser, message: str) -> NoReturn:
        raise ValueError(message)

    with pytest.MonkeyPatch.context() as patch:
        plain = argparse.ArgumentParser.parse_known_args

        def strict(self: argparse.ArgumentParser, args: Any = None) -> argparse.Namespace:
            """As both ``parse_args`` and ``parse_intermixed_args`` take what pages show."""
            words = list(sys.argv[1:] if args is None else args)
            flags_first = sorted(range(len(words)), key=lambda at: not _belongs_to_flag(self, words, at))
            options, rest = plain(self, [words[at] for at in flags_first])
            if rest:
                complain(self, f"unrecognized arguments: {' '.join(rest)}")
            return options

        patch.setattr(argparse.ArgumentParser, "parse_args", stop(strict))
        patch.setattr(argparse.ArgumentParser, "parse_intermixed_args", stop(strict))
        patch.setattr(argparse.ArgumentParser, "error", complain)
        if argv is not None:
            patch.setattr(sys, "argv", list(argv))
        try:
            call()
        except _Done as done:
            found: argparse.Namespace = done.args[0]
            return found
    raise ValueError("the command parsed nothing")


def _belongs_to_flag(parser: argparse.ArgumentParser, words: Sequence[str], at: int) -> bool:
    """Whether a word is a flag, or the value of the flag before it."""
    if words[at].startswith("-"):
        return True
    flag = next((action for action in parser._actions if at and words[at - 1] in action.option_strings), None)
    return flag is not None and flag.nargs != 0


@cache
def _possible(overrides: tuple[str, ...], world_size: int | None, is_open: bool) -> None:
    """Compose, load and check; an open command is only composed."""
    config = compose_run(overrides)
    if is_open:
        return
    errors = [str(f) for f in check(config, world_size, files=False, here=False) if f.level == "error"]
    if errors:
        raise ConfigError(errors)
