"""``zj train``: run an experiment.  ``torchrun ... -m megatron_zj.cli.train experiment=demo/sft run.dir=runs/sft``."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_zj.checkpoint.errors import gather
from megatron_zj.checkpoint.lock import OTHER_HOST_SECONDS, alone
from megatron_zj.checkpoint.retention import CHECKPOINTS, newest
from megatron_zj.checkpoint.save import require_room
from megatron_zj.cli.build import build_run
from megatron_zj.cli.compose import compose_run, experiments, load_frozen, save_frozen
from megatron_zj.cli.main import guarded
from megatron_zj.config.checks import require
from megatron_zj.config.derived import engine_of, head_of, is_trained, roles
from megatron_zj.config.loader import ConfigError, to_dict
from megatron_zj.config.run import RunConfig
from megatron_zj.models.flops import checkpoint_bytes
from megatron_zj.runtime.distributed import Process, session, world_size_of_environment
from megatron_zj.runtime.files import NO_SPACE
from megatron_zj.runtime.log import setup
from megatron_zj.train.loop import run


def main(argv: Sequence[str]) -> int:
    """Compose (or read a frozen configuration), check, train."""
    parser = argparse.ArgumentParser(prog="zj train", description="Run an experiment.", epilog=experiments())
    parser.add_argument("--config", type=Path, help="a resolved configuration, as written to run.dir/config.yaml")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides: experiment=demo/sft optim.lr=1e-4 ...")
    arguments = parser.parse_args(list(argv))
    if arguments.config is not None and arguments.overrides:
        parser.error("--config is a whole configuration; it takes no overrides")
    config = load_frozen(arguments.config) if arguments.config else compose_run(arguments.overrides)
    require(config, world_size_of_environment())
    try:
        with session(config.run.device, config.run.timeout_seconds) as process:
            train(config, process)
    except OSError as error:
        if error.errno in NO_SPACE and newest(config.run.dir) is not None:
            error.add_note("the checkpoints saved before are complete")
        raise
    return 0


def train(config: RunConfig, process: Process) -> None:
    """One run, from the first log line to the last checkpoint.  Collective over the world."""
    with process.activity.doing("comparing the settings of all ranks"):
        require_same(config)
    with contextlib.ExitStack() as held:
        with process.activity.doing(f"locking {config.run.dir}"):
            held.enter_context(alone(config.run.dir, min(OTHER_HOST_SECONDS, config.run.timeout_seconds / 2)))
        log = setup(process, config.run.dir)
        built = build_run(config, process)
        done, wanted = built.algorithm.num_steps_done, config.run.num_steps
        if done < wanted:
            with process.activity.doing("looking for room"):
                require_room(config.run.dir / CHECKPOINTS, _checkpoint_bytes(config))
            if process.rank == 0:  # now that nothing was refused: the file may be an earlier run's
                save_frozen(config, config.run.dir / "config.yaml")
        else:
            log.info("nothing to do: the run ended at step %d; raise run.num_steps to train on", done)
        run(built.algorithm, wanted, built.callbacks, built.timers, built.describe, built.profiler)


def require_same(config: RunConfig) -> None:
    """Every rank has this configuration, or ConfigError on all, with the keys that differ.  Collective over the world.

    Otherwise replicas drift apart in silence, or a rank waits for a step that another will never make.
    """
    first, *others = (dict(_settings(tree)) for tree in gather(to_dict(config)))
    for rank, other in enumerate(others, 1):
        wrong = [
            f"{key}: {other.get(key, 'absent')} on rank {rank}, {first.get(key, 'absent')} on rank 0"
            for key in {**first, **other}
            if first.get(key) != other.get(key)
        ]
        if wrong:
            raise ConfigError(["the ranks have different settings; start all with the same command line:", *wrong])


def _settings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every setting by its dotted key, as JSON."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _settings(item, f"{key}.{name}" if key else name)
    else:
        yield key, json.dumps(value, ensure_ascii=False)


def _checkpoint_bytes(config: RunConfig) -> int:
    """Of all models; the algorithm's own state is small beside them."""
    return sum(
        checkpoint_bytes(
            config.model,
            head_of(config, name),
            engine_of(config, role).precision,
            trainable=is_trained(config, name),
        )
        for name, role in roles(config).items()
    )


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
