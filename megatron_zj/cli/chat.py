"""``zj chat checkpoint.load=DIR``: talk to a checkpoint, one process.  /new starts over, /quit (or Ctrl-D) leaves."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

from megatron_zj.cli.inference import LoadedModel, compose_inference, help_text, wants_help
from megatron_zj.cli.main import guarded
from megatron_zj.config.inference import InferenceConfig
from megatron_zj.config.loader import ConfigError
from megatron_zj.config.sampling import SamplingConfig
from megatron_zj.data.chat import Message, render_prompt
from megatron_zj.runtime.distributed import session, world_size_of_environment

NOTICE = "A language model answers here. Its answers are not medical advice.\n/new starts over, /quit leaves.\n"


def main(argv: Sequence[str]) -> int:
    """A conversation on standard input and output."""
    if wants_help(argv):
        sys.stdout.write(help_text(__doc__, InferenceConfig))
        return 0
    config = compose_inference(argv, InferenceConfig)
    if world_size_of_environment() > 1:
        raise ConfigError(["zj chat runs in one process; start it without torchrun"])
    with session(config.run.device, config.run.timeout_seconds) as process:
        talk(LoadedModel(config, process), config.sampling, sys.stdin, sys.stdout)
    return 0


def talk(model: LoadedModel, sampling: SamplingConfig, source: TextIO, screen: TextIO) -> None:
    """Read a line, answer it, keep both; until the source ends.

    When the conversation outgrows the model's positions its oldest turns are dropped, and the screen says so.  Raises
    ConfigError where no question would have room.
    """
    positions = model.info.model.max_position_embeddings
    room = positions - sampling.max_new_tokens
    if len(render_prompt([Message("user", "?")], model.template, model.tokenizer)) > room:
        used = f"{sampling.max_new_tokens} of the model's {positions} positions"
        raise ConfigError([f"sampling.max_new_tokens: {used} leave no room for a question; lower it"])
    screen.write(NOTICE)
    messages: list[Message] = []
    while True:
        screen.write("> ")
        screen.flush()
        line = source.readline()
        if not line or line.strip() == "/quit":
            screen.write("\n")
            return
        if line.strip() == "/new":
            messages = []
            continue
        if not line.strip():
            continue
        messages.append(Message("user", line.strip()))
        prompt = render_prompt(messages, model.template, model.tokenizer)
        while len(prompt) > room and len(messages) > 2:
            messages = messages[2:]
            prompt = render_prompt(messages, model.template, model.tokenizer)
            screen.write("(the first turns no longer fit and are forgotten)\n")
        if len(prompt) > room:
            screen.write(f"(not sent: that is {len(prompt)} tokens, and there is room for {room})\n")
            messages.pop()
            continue
        text, _finished = model.answers([prompt], sampling)[0]
        screen.write(text + "\n")
        if text.strip():
            messages.append(Message("assistant", text))
        else:
            messages.pop()


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
