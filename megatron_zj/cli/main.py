"""``zj``: one entry for all commands, and how an error of the user's looks.

A command is a module of ``megatron_zj.cli`` with ``main(argv) -> exit code``; it is imported only when it is called, so
that ``zj check`` does not wait for what ``zj train`` needs.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from megatron_zj.config.loader import ConfigError
from megatron_zj.runtime.files import NO_SPACE, room

COMMANDS = {
    "train": "train a model: zj train experiment=demo/pretrain (under torchrun for several ranks)",
    "prepare": "raw text, dialogues, rankings into what training reads",
    "tokenizer": "train a tokenizer, or extend one with Chinese pieces",
    "convert": "Hugging Face weights to a checkpoint and back",
    "evaluate": "exams, dialogues and rankings scored",
    "generate": "answers to a file of prompts",
    "chat": "talk to a checkpoint",
    "check": "validate a configuration and estimate its memory, without a GPU",
    "launch": "run a configuration on several ranks, a sweep, or a SLURM array",
}
DEBUG = "--debug"
_MAX_LINES = 30  # of an error message: one screen
_USAGE_ERROR, _INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``zj``.  Returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(_help())
        return 0 if arguments else _USAGE_ERROR
    name = arguments[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}"
        sys.stderr.write(f"zj: no command {name!r}; {hint}\n")
        return _USAGE_ERROR
    return entry(name, arguments[1:])


def entry(name: str, argv: Sequence[str]) -> int:
    """Run one command, for ``zj NAME`` and ``python -m megatron_zj.cli.NAME`` alike.  Returns the exit code."""
    return guarded(lambda rest: _command(name)(rest), argv)


def guarded(command: Callable[[list[str]], int], argv: Sequence[str]) -> int:
    """Run a command; an error that the user can mend becomes one message, anything else keeps its traceback.

    ``--debug`` anywhere in ``argv`` keeps every traceback.  Returns the exit code: 1 for an error, 130 for Ctrl-C.
    """
    arguments = [argument for argument in argv if argument != DEBUG]
    debug = len(arguments) < len(argv)
    try:
        return command(arguments)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        with contextlib.suppress(OSError):
            sys.stdout.close()
        return 1
    except Exception as error:
        if debug or not _is_users(error):
            traceback.print_exc()
            if not debug:
                sys.stderr.write("\nThis is a fault of the program, not of your input: please report the text above.\n")
        elif not isinstance(error, ConfigError) or _runtime().speaks_for_all():
            # every rank reads the same configuration and finds the same fault: one of them says it
            _say(error)
        return 1


def _command(name: str) -> Callable[[list[str]], int]:
    command: Callable[[list[str]], int] = importlib.import_module(f"megatron_zj.cli.{name}").main
    return command


def _say(error: BaseException) -> None:
    """The message on standard error and, under torchrun, in its closing report."""
    runtime = _runtime()
    if isinstance(error, runtime.LeftError):
        sys.stderr.write(f"{error}\n")
        return
    message = _message(error)
    sys.stderr.write(message)
    runtime.tell_launcher(message)


def _runtime() -> ModuleType:
    """Imported when something is wrong: ``zj --help`` need not wait for torch."""
    return importlib.import_module("megatron_zj.runtime.distributed")


def _is_users(error: BaseException) -> bool:
    """Errors that say what to change: our own types, bad values, what the file system answers, and no memory."""
    ours = type(error).__module__.split(".")[0] == "megatron_zj"  # not __name__, which python -m changes
    return ours or isinstance(error, ValueError | OSError | MemoryError) or _is_gpu_memory(error)


def _is_gpu_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError"  # torch's, which need not have been imported


def _message(error: BaseException) -> str:
    lines = (str(error).strip() or type(error).__name__).splitlines()
    if isinstance(error, OSError) and error.strerror and error.filename:
        lines = [f"{error.filename}: {error.strerror}"]
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        why = f"{room(Path(error.filename), error.errno)}: " if error.filename else ""
        lines.append(f"{why}free some space, or name a folder on another disk (run.dir, out or --to)")
    lines += getattr(error, "__notes__", [])
    if isinstance(error, MemoryError) or _is_gpu_memory(error):
        lines = ["out of memory", *lines]
        lines.append("lower engine.micro_batch_tokens, set engine.recompute, or use more ranks; zj check estimates it")
    if len(lines) > _MAX_LINES:
        lines = [*lines[:_MAX_LINES], f"... {len(lines) - _MAX_LINES} more lines"]
    first, rest = lines[0], "".join(f"  {line}\n" for line in lines[1:])
    return f"error: {first}\n{rest}(add {DEBUG} for the traceback)\n"


def _help() -> str:
    rows = "".join(f"  {name:<10} {text}\n" for name, text in COMMANDS.items())
    return (
        "zj: from a Chinese LLaMA to a medical assistant\n\n"
        f"usage: zj COMMAND [options] [key=value ...]\n\n{rows}\n"
        f"zj COMMAND --help tells more; {DEBUG} keeps the traceback of an error; keys: docs/configuration.md\n"
    )


if __name__ == "__main__":
    sys.exit(main())
