"""From a configuration to objects: the composition root.  Only this module wires."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_zj.algorithms.algorithm import Algorithm
from megatron_zj.algorithms.provenance import require_head
from megatron_zj.algorithms.registry import BUILDERS, Parts
from megatron_zj.algorithms.rules import chosen_rules
from megatron_zj.algorithms.shaping import ScoreScale
from megatron_zj.checkpoint.errors import CheckpointError, gather
from megatron_zj.checkpoint.load import agreed_newest, load
from megatron_zj.checkpoint.manifest import MANIFEST, ManifestInfo
from megatron_zj.checkpoint.retention import CHECKPOINTS, damaged
from megatron_zj.checkpoint.save import Checkpointer, make_room
from megatron_zj.checkpoint.shared import require_shared
from megatron_zj.cli.sources import require_position, require_resumable, starting_checkpoints
from megatron_zj.config import derived
from megatron_zj.config.algorithm import OnPolicyConfig, RewardConfig
from megatron_zj.config.loader import ConfigError, to_dict
from megatron_zj.config.run import RunConfig
from megatron_zj.config.sampling import SamplingConfig
from megatron_zj.data.errors import DataError
from megatron_zj.data.sources import verify_inputs
from megatron_zj.data.stream import Stream, build_stream
from megatron_zj.data.tokenizer import Tokenizer, build_tokenizer
from megatron_zj.engine.build import build_engine
from megatron_zj.engine.engine import Engine
from megatron_zj.models.flops import training_flops_per_token
from megatron_zj.roles.exchange import Exchange
from megatron_zj.roles.placement import build_placements
from megatron_zj.roles.role import Role
from megatron_zj.roles.world import World
from megatron_zj.rollout.generate import Rollout
from megatron_zj.rollout.stop_tokens import stop_ids
from megatron_zj.runtime.distributed import Process
from megatron_zj.runtime.log import progress_bar
from megatron_zj.runtime.metrics import MetricsLog
from megatron_zj.runtime.profiler import StepProfiler
from megatron_zj.runtime.timers import Timers
from megatron_zj.train.callbacks import Evaluates, Measure, Report, Save, Validate
from megatron_zj.train.loop import Callback

logger = logging.getLogger(__name__)
PROFILE = "profile"  # folder below run.dir
_PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16 FLOP/s by name, NVIDIA's data sheets


@dataclass(frozen=True)
class Run:
    """What the training loop needs."""

    algorithm: Algorithm
    callbacks: list[Callback]
    timers: Timers
    describe: Callable[[int], str]  # the file and record of a draw
    profiler: StepProfiler


def build_run(config: RunConfig, process: Process) -> Run:
    """Everything, with weights loaded: a resumed run's own, or the previous stage's, or fresh ones."""
    timers = Timers(process.device, process.activity)
    with process.activity.doing("build"):
        require_shared(config.run.dir)
        if isinstance(config.algorithm, OnPolicyConfig):
            chosen_rules(config.algorithm.rules)  # a wrong name is told before a model is built
        root = config.run.dir / CHECKPOINTS
        resumed = find_own_checkpoint(config, root)
        tokenizer = checked_tokenizer(config)
        fingerprint = tokenizer.fingerprint()
        starts = {} if resumed else starting_checkpoints(config, fingerprint)  # like bad data, told before the models
        stream, validation = build_streams(config, tokenizer)
        if resumed is not None:
            require_resumable(config, resumed, fingerprint)
            require_position(stream, load(resumed, {}))
        roles = build_roles(config, process, resumes=resumed is not None)
        engines = {name: role.engine for name, role in roles.items()}
        scale = ScoreScale()
        if resumed is None:
            scale = load_starting_weights(config, roles, fingerprint, starts)
        parts = build_parts(config, roles, tokenizer, timers, scale, stream, validation)
        algorithm = BUILDERS[config.algorithm.kind](config.algorithm, parts)
        if resumed is not None:
            logger.info("resuming from %s", resumed)
            algorithm.load_state_dict(load(resumed, engines, tokenizer=fingerprint))
    checkpointer = Checkpointer(root, config.checkpoint, ManifestInfo(to_dict(config), tokenizer))
    callbacks = build_callbacks(config, process, algorithm, checkpointer, engines, timers)
    profiler = StepProfiler(config.run.dir / PROFILE, config.run.profile_steps, process.rank)
    return Run(algorithm, callbacks, timers, parts.stream.describe, profiler)


def find_own_checkpoint(config: RunConfig, root: Path) -> Path | None:
    """What the run goes on from; Collective over the world.

    ConfigError when ``checkpoint.resume`` does not fit it; CheckpointError when the only ones have lost their manifest.
    """
    found, resume = agreed_newest(root), config.checkpoint.resume
    if found is None and (lost := gather(damaged(root))[0]):
        raise CheckpointError(
            f"{lost[-1]} is a checkpoint that has lost its {MANIFEST}, and there is no other below {root}: put the "
            "file back, or, to start anew, choose another run.dir or remove that folder"
        )
    if found is None and resume == "must":
        raise ConfigError([f"checkpoint.resume: 'must', but there is no complete checkpoint below {root}"])
    if found is not None and resume == "never":  # two runs' steps in one folder: the older run's would count as newest
        raise ConfigError(
            [
                f"checkpoint.resume: 'never', but {root} holds {found.name} of an earlier run; choose another run.dir, "
                "or remove that folder"
            ]
        )
    return found


def checked_tokenizer(config: RunConfig) -> Tokenizer:
    """The run's tokenizer, which must fit the model's vocabulary and have the stop tokens."""
    tokenizer = build_tokenizer(config.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            [
                f"model.vocab_size: {config.model.vocab_size} rows, but the tokenizer has {tokenizer.vocab_size} ids; "
                f"set model.vocab_size={tokenizer.vocab_size} or more"
            ]
        )
    if sampling := derived.sampling_of(config):
        stop_ids(sampling, tokenizer, "algorithm.sampling")  # a wrong name is told before a model is built
    return tokenizer


def build_streams(config: RunConfig, tokenizer: Tokenizer) -> tuple[Stream, Stream | None]:
    """Training data, and validation data where there is some.

    Files that are mapped are read once, a share on each rank: damage that one rank finds is raised on all, before a
    damaged index is opened anywhere.  Collective over the world.
    """
    world, damage = World.current(), None
    first = world.rank == 0
    try:
        verify_inputs(config.data, tokenizer, world.rank, world.size, progress=first)
    except DataError as error:
        damage = str(error)
    for complaint in filter(None, gather(damage)):
        raise DataError(complaint)
    train = build_stream(config.data, tokenizer, config.run.seed, "train", progress=first)
    return train, build_stream(config.data, tokenizer, config.run.seed, "validation")


def build_roles(config: RunConfig, process: Process, *, resumes: bool) -> dict[str, Role]:
    """Every model of the algorithm on its placement.  Collective over the world.

    A model whose weights come from a checkpoint (``resumes``, or a starting point of its own) is not initialised.
    """
    settings = derived.roles(config)
    placements = build_placements(
        config.parallel,
        config.placements,
        {role.placement for role in settings.values()},
        process.world_size,
        config.run.timeout_seconds,
    )
    exchange = Exchange(process.activity)
    updates = derived.optimizer_steps(config)
    roles = {}
    for name, kind in config.algorithm.role_kinds.items():
        placement = placements[settings[name].placement]
        engine = None
        if placement.groups is not None:
            engine = build_engine(
                config.model,
                kind.head,
                placement.groups,
                settings[name].engine or config.engine,
                (settings[name].optim or config.optim) if kind.trains else None,
                updates,
                process.device,
                config.run.seed,
                awaits_weights=resumes or derived.starting_point(config, name) is not None,
            )
        roles[name] = Role(name, placement, engine, exchange)
    return roles


def load_starting_weights(
    config: RunConfig, built: Mapping[str, Role], fingerprint: str, starts: Mapping[str, Path]
) -> ScoreScale:
    """Weights of earlier stages, role by role; returns the scale of the reward model's scores, where there is one."""
    scale = ScoreScale()
    for name, settings in derived.roles(config).items():
        folder = starts.get(name)
        if folder is None:
            continue
        renamed = {name: settings.load_role} if settings.load_role else None
        load(folder, {name: built[name].engine}, roles=renamed, weights_only=True, tokenizer=fingerprint)
        if name == "reward":
            state = load(folder, {})
            logger.info(require_head(built[name], state.get("head"), str(folder)))
            if (engine := built[name].engine) is not None:
                make_room(engine)
            scale = score_scale(config, state, folder)
    return scale


def score_scale(config: RunConfig, reward_run: Mapping[str, Any], folder: Path) -> ScoreScale:
    """Of the scores of the reward model in ``folder``, by the validation that its run stored.

    Raises ConfigError where the run would use one that is of other weights.
    """
    algorithm, step = config.algorithm, reward_run.get("validation_step")
    found, own_step = reward_run.get("validation") or {}, reward_run.get("num_steps_done")
    used = isinstance(algorithm, OnPolicyConfig) and algorithm.whiten_scores and not algorithm.running_scores
    used = used and derived.sampling_of(config) is not None
    advice = (
        "give the reward run validation data (data.validation_fraction or data.validation_files), or set "
        "algorithm.whiten_scores=false or algorithm.running_scores=true here"
    )
    if "score_mean" not in found:
        if used:
            raise ConfigError([f"algorithm.reward.load: {folder} has no score statistics; {advice}"])
        return ScoreScale()
    if step is None and used:
        logger.warning("%s does not say of which step its score statistics are; they are taken for its own", folder)
    if step in (None, own_step):
        return ScoreScale(found["score_mean"], found["score_deviation"])
    if used:
        stale = f"the score statistics in {folder} are of step {step}, its weights of step {own_step}"
        raise ConfigError([f"algorithm.reward.load: {stale}; {advice}"])
    return ScoreScale()


def build_parts(
    config: RunConfig,
    roles: Mapping[str, Role],
    tokenizer: Tokenizer,
    timers: Timers,
    scale: ScoreScale,
    stream: Stream,
    validation: Stream | None,
) -> Parts:
    """Rollout and the rest of what an algorithm is made of."""

    def decode(ids: Sequence[int]) -> str:  # a model may have rows that the tokenizer has no piece for
        return tokenizer.decode([token_id for token_id in ids if token_id < tokenizer.vocab_size])

    def rollout(sampling: SamplingConfig) -> Rollout:
        return Rollout(sampling, stop_ids(sampling, tokenizer, "algorithm.sampling"), config.run.seed, decode)

    return Parts(
        roles=roles,
        stream=stream,
        validation=validation,
        rollout=rollout,
        world=World.current(),
        seed=config.run.seed,
        timers=timers,
        score_scale=scale,
        decode=decode,
    )


def build_callbacks(
    config: RunConfig,
    process: Process,
    algorithm: Algorithm,
    checkpointer: Checkpointer,
    engines: Mapping[str, Engine | None],
    timers: Timers,
) -> list[Callback]:
    """In the order they run: validation, speed, report, checkpoints."""
    settings = config.run
    callbacks: list[Callback] = []
    if isinstance(algorithm, Evaluates):
        # a reward model's checkpoint holds the statistics of its own scores
        saves_every = config.checkpoint.every if isinstance(config.algorithm, RewardConfig) else 0
        callbacks.append(Validate(algorithm, settings.eval_every, settings.num_steps, timers, saves_every))
    log = MetricsLog(settings.dir, settings.tensorboard, settings.wandb_project, process.rank)
    bar = progress_bar(process, settings.num_steps, algorithm.num_steps_done, config.algorithm.kind)
    callbacks.append(Measure(process.device, *_arithmetic(config, process)))
    callbacks.append(Report(log, bar, settings.num_steps, settings.log_every))
    callbacks.append(Save(checkpointer, config.checkpoint, engines, algorithm, settings.num_steps, timers))
    return callbacks


def _arithmetic(config: RunConfig, process: Process) -> tuple[Callable[[float], float] | None, float | None]:
    """A trained token's FLOPs by sequence length, and FLOP/s of all the run's devices together.

    None where that would say little: runs of several models, whose passes differ in rows and kind; a device that is
    not in the table, or a precision that its figures are not for.
    """
    kinds = list(config.algorithm.role_kinds.items())
    precision = (derived.roles(config)[kinds[0][0]].engine or config.engine).precision
    if len(kinds) > 1 or process.device.type != "cuda" or precision == "fp32" or config.model.fp8 != "none":
        return None, None
    name = torch.cuda.get_device_name(process.device)
    known = [flops for key, flops in _PEAK_FLOPS.items() if key in name]
    flops = partial(training_flops_per_token, config.model, head=kinds[0][1].head)
    return flops, known[0] * process.world_size if known else None
