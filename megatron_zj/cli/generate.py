"""``zj generate checkpoint.load=DIR data.files=[prompts.jsonl] run.dir=DIR``: answers to a file of prompts."""

from __future__ import annotations

import itertools
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_zj.cli.inference import LoadedModel, OverlongError, compose_inference, help_text, wants_help
from megatron_zj.cli.main import guarded
from megatron_zj.config.inference import GenerationConfig
from megatron_zj.config.loader import ConfigError
from megatron_zj.data.chat import render_prompt
from megatron_zj.data.raw import read_raw
from megatron_zj.data.records import PromptRecord
from megatron_zj.runtime.distributed import Process, session
from megatron_zj.runtime.files import write_whole
from megatron_zj.runtime.log import progress_bar, setup

logger = logging.getLogger(__name__)
ANSWERS = "answers.jsonl"  # in run.dir


def main(argv: Sequence[str]) -> int:
    """Read prompts, sample, write ``run.dir/answers.jsonl`` with {"prompt", "answer", "finished"} a line."""
    if wants_help(argv):
        sys.stdout.write(help_text(__doc__, GenerationConfig))
        return 0
    config = compose_inference(argv, GenerationConfig)
    if not config.data.files:
        raise ConfigError(["data.files: no prompts; give data.files=[FILE,...]"])
    with session(config.run.device, config.run.timeout_seconds) as process:
        setup(process, config.run.dir)
        generate_answers(config, process)
    return 0


def generate_answers(config: GenerationConfig, process: Process) -> None:
    """Collective over the world; rank 0 writes, and the file appears whole or not at all.  Earlier answers stay."""
    places: list[str] = []
    found = read_raw(config.data.files, "prompts", config.data.format, config.data.on_bad_record, places)
    records = [record for record in found if isinstance(record, PromptRecord)]
    records = records[: config.limit] if config.limit else records
    model = LoadedModel(config, process)
    prompts = [render_prompt(record.messages, model.template, model.tokenizer) for record in records]
    bar = progress_bar(process, len(prompts), 0, "answers")

    def show(done: int) -> None:
        bar.update(done - bar.n)

    try:
        answers = model.answers(prompts, config.sampling, show, places)
    except OverlongError as error:
        if config.data.on_bad_record == "error" or len(error.rows) == len(prompts):
            raise
        logger.warning("left out %d prompts, such as: %s", len(error.rows), error)
        kept = [index for index in range(len(prompts)) if index not in error.rows]
        records, prompts = [records[index] for index in kept], [prompts[index] for index in kept]
        answers = model.answers(prompts, config.sampling, show)
    bar.close()
    if process.rank == 0:
        target = config.run.dir / ANSWERS
        lines = (
            {"prompt": record.messages[-1].content, "answer": text, "finished": finished}
            for record, (text, finished) in zip(records, answers, strict=True)
        )
        _set_aside(target)
        write_whole(target, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
        logger.info("%d answers in %s", len(answers), target)


def _set_aside(target: Path) -> None:
    """Earlier answers get the first number that is free: answers.1.jsonl."""
    if target.exists():
        names = (target.with_suffix(f".{number}{target.suffix}") for number in itertools.count(1))
        free = next(name for name in names if not name.exists())
        target.rename(free)
        logger.info("the earlier answers are now in %s", free)


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
