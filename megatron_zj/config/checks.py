"""Checks that need the whole configuration: the layout, batch arithmetic, lengths, files.

Pure arithmetic and a look at the file system; no process group, no torch, no GPU.  A check that one dataclass can
make alone is in its ``__post_init__``.  Every finding names the key to change.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_zj.config.algorithm import DPOConfig
from megatron_zj.config.data import CorpusConfig, PromptsConfig
from megatron_zj.config.derived import (
    ALL,
    Block,
    engine_of,
    fp8_misfits,
    longest_row,
    misfits,
    optimizer_steps,
    placements,
    roles,
    rows_per_update,
    sampling_of,
    starting_point,
)
from megatron_zj.config.loader import ConfigError, suggestion
from megatron_zj.config.run import RunConfig

_PREPARED = ("manifest.json", "job.json")  # data/prepared.py: a preparation's folder, finished or not, has one of them


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing a check saw.  An ``error`` stops a run; a ``note`` is advice."""

    level: Literal["error", "note"] = "error"
    key: str  # dotted path of the setting to change
    message: str  # what is wrong and what to write instead

    def __str__(self) -> str:
        return f"{self.key}: {self.message}"


def check(config: RunConfig, world_size: int | None = None, *, files: bool = True, here: bool = True) -> list[Finding]:
    """Everything that is wrong with a run of ``world_size`` ranks (None: ``config.world_size``, else 1).

    ``files``: look for the input files.  ``here``: the run will be on this machine (optional packages must be here).
    """
    blocks = placements(config, world_size)
    findings = [*_world(config, world_size), *_placement_names(config), *_layout(config, blocks, world_size)]
    if all(finding.level != "error" for finding in findings):  # what divides by the layout wants one that fits
        findings += [*_model_split(config, blocks), *_engines(config, blocks), *_te_attention(config, blocks)]
        findings += _batches(config, blocks)
    for of_any_layout in (_kinds, _lengths, _schedule, _validation, _starting_points):
        findings += of_any_layout(config)
    if here:
        findings += _packages(config)
    if files:
        findings += _files(config)
    return findings


def require(config: RunConfig, world_size: int | None = None, *, files: bool = True, here: bool = True) -> None:
    """Raise ``ConfigError`` with every error ``check`` finds; notes are dropped."""
    findings = check(config, world_size, files=files, here=here)
    errors = [str(finding) for finding in findings if finding.level == "error"]
    if files:
        errors += [str(finding) for finding in missing_inputs(config)]
    if errors:
        raise ConfigError(errors)


def missing_inputs(config: RunConfig) -> list[Finding]:
    """Inputs that the run needs and nobody has named.  Errors to a run; to ``zj check``, things still to fill in."""
    found = []
    if not config.data.files:
        what = "prepared prefixes (zj prepare)" if isinstance(config.data, CorpusConfig) else "files"
        found.append(Finding(key="data.files", message=f"empty; name the {what}: data.files=[PATH, ...]"))
    if config.tokenizer.path is None:
        found.append(Finding(key="tokenizer.path", message="not set; name a .model file or a tokenizer folder"))
    nameless = {
        name: kind.start
        for name, kind in config.algorithm.role_kinds.items()
        if kind.needs_weights and starting_point(config, name) is None
    }
    if "checkpoint" in nameless.values():
        found.append(Finding(key="checkpoint.load", message="not set; name the SFT checkpoint the policy starts from"))
    if "reward" in nameless:
        found.append(Finding(key="algorithm.reward.load", message="not set; name the reward model's checkpoint"))
    return found


def _world(config: RunConfig, world_size: int | None) -> Iterator[Finding]:
    if world_size is not None and config.world_size not in (None, world_size):
        yield Finding(
            key="world_size",
            message=f"the configuration is laid out for {config.world_size} ranks and {world_size} are running; "
            f"start {config.world_size}, or write world_size={world_size}",
        )


def _placement_names(config: RunConfig) -> Iterator[Finding]:
    known = [ALL, *config.placements]
    prefix = "algorithm."
    for name, role in roles(config).items():
        if role.placement not in known:
            hint = suggestion(role.placement, known)
            yield Finding(key=f"{prefix}{name}.placement", message=f"no placement {role.placement!r}{hint}")
    if ALL in config.placements:
        yield Finding(key=f"placements.{ALL}", message="the name is taken by 'every rank'; choose another")
    used = {role.placement for role in roles(config).values()}
    for name in config.placements:
        if name not in used:
            yield Finding(level="note", key=f"placements.{name}", message="no role lives here; its ranks will idle")


def _layout(config: RunConfig, blocks: list[Block], world_size: int | None) -> Iterator[Finding]:
    """Blocks are inside the world, disjoint, and their model-parallel sizes fit."""
    world = world_size or config.world_size or 1
    for block in blocks:
        parallel, where = block.parallel, block.key.removesuffix(".parallel")
        end = block.first_rank + block.num_ranks
        if block.first_rank < 0 or block.num_ranks < 1 or end > world:
            yield Finding(
                key="world_size" if block.name == ALL else f"{where}.num_ranks",
                message=f"ranks {block.first_rank} to {end - 1} are not inside a world of {world}",
            )
        elif block.num_ranks % parallel.model_size:
            yield Finding(
                key=block.key,
                message=f"tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} = {parallel.model_size} does not "
                f"divide the {block.num_ranks} ranks of placement {block.name!r}; change {block.key}.tp/.pp/.cp or "
                f"{'world_size' if block.name == ALL else where + '.num_ranks'}",
            )
    for before, after in itertools.pairwise(blocks):
        if before.first_rank + before.num_ranks > after.first_rank:
            yield Finding(
                key=after.key,
                message=f"placements {before.name!r} and {after.name!r} share ranks; a rank belongs to one placement: "
                "move first_rank, or put the roles on the same placement",
            )


def _model_split(config: RunConfig, blocks: list[Block]) -> Iterator[Finding]:
    """The model's sizes divide by the axes, and what is left of them suits FP8 where it is asked for."""
    for block in blocks:
        for axis, message in misfits(config.model, block.parallel):
            yield Finding(key=f"{block.key}.{axis}", message=message)
    unsuited = [finding for block in blocks for finding in fp8_misfits(config.model, block.parallel)]
    for setting, message in dict.fromkeys(unsuited):  # placements may say the same
        yield Finding(key=setting, message=message)


def _te_attention(config: RunConfig, blocks: list[Block]) -> Iterator[Finding]:
    """What Transformer Engine's attention under context parallelism refuses in its first forward pass."""
    cut = [block for block in blocks if block.parallel.cp > 1 and config.model.kernels == "te"]
    if cut and config.model.head_size % 8:
        yield Finding(
            key="model.kernels",
            message=f"under context parallelism te needs heads of a multiple of 8, and these are "
            f"{config.model.head_size}; set {cut[0].key}.cp=1, or model.kernels=auto",
        )
    for block in cut:
        for name in block.roles:
            role = roles(config)[name]
            if engine_of(config, role).precision == "fp32":
                key = f"algorithm.{name}.engine" if role.engine else "engine"
                message = f"under context parallelism model.kernels=te has no fp32; use bf16 or fp16, {block.key}.cp=1"
                yield Finding(key=f"{key}.precision", message=f"{message}, or model.kernels=auto")


def _engines(config: RunConfig, blocks: list[Block]) -> Iterator[Finding]:
    """Engine settings that do not go with the layout or the model."""
    role_of = roles(config)
    for block in blocks:
        layers = config.model.num_layers // (block.parallel.pp * block.parallel.vpp)
        for name in block.roles:
            role = role_of[name]
            engine = engine_of(config, role)
            key = f"algorithm.{name}.engine" if role.engine else "engine"
            if engine.recompute == "full" and layers % engine.recompute_num_layers:
                yield Finding(
                    key=f"{key}.recompute_num_layers",
                    message=f"{engine.recompute_num_layers} does not divide the {layers} layers of a pipeline chunk; "
                    "change it or the layout",
                )
            if config.model.fp8 != "none" and engine.precision == "fp32":
                yield Finding(key=f"{key}.precision", message="model.fp8 needs bf16 or fp16")
            if engine.precision == "fp16" and config.run.device == "cpu":
                yield Finding(level="note", key=f"{key}.precision", message="fp16 on a CPU is slow; fp32 is faster")
    if config.run.device == "cpu" and config.model.kernels in ("triton", "te"):
        yield Finding(
            key="model.kernels",
            message=f"{config.model.kernels} needs a CUDA device and run.device is cpu; set model.kernels=auto (or, "
            "for Triton's interpreter, run.device=auto on a machine without a GPU)",
        )
    if config.model.dropout > 0 and isinstance(config.algorithm, DPOConfig):
        yield Finding(
            key="model.dropout",
            message="algorithm=dpo takes its loss's derivative at log-probabilities without dropout, so a step with "
            "dropout would follow another gradient; set it to 0",
        )
    elif config.model.dropout > 0:
        yield Finding(
            level="note",
            key="model.dropout",
            message="with dropout a run resumes exactly on its own layout, but another layout gives other numbers",
        )


def _kinds(config: RunConfig) -> Iterator[Finding]:
    wanted, got = config.algorithm.data_kind, config.data.kind
    if wanted != got:
        yield Finding(
            key="data", message=f"algorithm={config.algorithm.kind} learns from data={wanted}, got data={got}"
        )


def _lengths(config: RunConfig) -> Iterator[Finding]:
    """The longest sequence against positions and the micro-batch."""
    longest, positions = longest_row(config), config.model.max_position_embeddings
    key = "data.sequence_length" if isinstance(config.data, CorpusConfig) else "data.max_length"
    if sampling_of(config) is not None:
        what = f"{key} + algorithm.sampling.max_new_tokens = {longest}"
        lower = f"{key} or algorithm.sampling.max_new_tokens"
    else:
        what, lower = f"{key} = {longest}", key
    if longest > positions:
        yield Finding(
            key=key,
            message=f"{what} exceeds model.max_position_embeddings = {positions}; lower {lower}, or raise the "
            "positions (a checkpoint has a fixed number)",
        )
    for name, role in roles(config).items():
        engine = engine_of(config, role)
        if engine.micro_batch_tokens < longest:
            where = f"algorithm.{name}.engine" if role.engine else "engine"
            yield Finding(
                key=f"{where}.micro_batch_tokens",
                message=f"{engine.micro_batch_tokens} is less than the longest row ({what}); raise it to {longest}",
            )
            if role.engine is None:
                break  # the run's engine: once is enough


def _batches(config: RunConfig, blocks: list[Block]) -> Iterator[Finding]:
    """Every data-parallel rank gets something to do at every step."""
    key, units = rows_per_update(config)
    for block in blocks:
        if units < block.dp:
            yield Finding(
                key=key,
                message=f"{units} < dp = {block.dp} of placement {block.name!r} ({block.num_ranks} ranks / tp x pp x "
                f"cp = {block.parallel.model_size}): some ranks would never have a row; raise it to {block.dp}, or use "
                f"fewer ranks or a larger {block.key}.tp/.pp/.cp",
            )
        elif units % block.dp:
            yield Finding(
                level="note",
                key=key,
                message=f"{units} is not a multiple of dp = {block.dp}: results are the same, but some ranks wait",
            )


def _schedule(config: RunConfig) -> Iterator[Finding]:
    steps = optimizer_steps(config)
    for name, role in roles(config).items():
        optim = role.optim or config.optim
        key = f"algorithm.{name}.optim" if role.optim else "optim"
        if optim.warmup_steps and optim.decay_steps is None and optim.warmup_steps >= steps:
            constant = optim.schedule == "constant"
            what = "the peak rate is never reached" if constant else f"no step is left for the {optim.schedule} decay"
            yield Finding(
                level="note" if constant else "error",
                key=f"{key}.warmup_steps",
                message=f"{optim.warmup_steps} of the run's {steps} optimizer steps: {what}; lower it, raise "
                f"run.num_steps, or set {key}.decay_steps",
            )
        if role.optim is None:
            break


def _validation(config: RunConfig) -> Iterator[Finding]:
    data = config.data
    if isinstance(data, PromptsConfig):
        return
    if isinstance(data, CorpusConfig):
        if data.weights is not None and len(data.weights) != len(data.files):
            yield Finding(
                key="data.weights", message=f"{len(data.weights)} weights for {len(data.files)} data.files; one a file"
            )
        elif data.weights is not None and not sum(data.weights):
            yield Finding(key="data.weights", message="all are 0; give a file you want a positive weight")
    elif data.validation_files and data.validation_fraction:
        yield Finding(level="note", key="data.validation_fraction", message="not used: there are data.validation_files")


def _starting_points(config: RunConfig) -> Iterator[Finding]:
    """A reward model or a policy from random weights is nearly always a slip."""
    if config.algorithm.kind in ("reward", "sft"):
        role = roles(config)["model"]
        if role.load is None and config.checkpoint.load is None:
            yield Finding(level="note", key="checkpoint.load", message="not set: the model starts from random weights")
    for name, role in roles(config).items():
        optional = not config.algorithm.role_kinds[name].needs_weights
        if optional and role.load_role is not None and starting_point(config, name) is None:
            yield Finding(
                key=f"algorithm.{name}.load_role",
                message=f"{role.load_role!r} of no checkpoint; set algorithm.{name}.load, or leave it out",
            )


def _packages(config: RunConfig) -> Iterator[Finding]:
    model, run = config.model, config.run
    asked = (  # the key, whether it asks for a package, the package, what to install, what to write instead
        ("model.kernels", model.kernels == "te", "transformer_engine", "-e '.[te]' in the checkout", "auto"),
        ("model.kernels", model.kernels == "triton", "triton", "triton", "auto"),
        ("run.wandb_project", run.wandb_project is not None, "wandb", "wandb", "null"),
        ("run.tensorboard", run.tensorboard, "tensorboard", "tensorboard", "false"),
    )
    for key, wanted, package, name, instead in asked:
        if wanted and importlib.util.find_spec(package) is None:
            message = f"needs {package}, which is not installed here: pip install {name}, or {key}={instead}"
            yield Finding(key=key, message=message)


def no_folder(path: Path) -> str | None:
    """Why ``path`` cannot be a folder that is written to; None: it is one, or can become one."""
    there = next((place for place in (path, *path.parents) if place.exists()), None)
    if there is None or there.is_dir():
        return None
    return f"{path} cannot be a folder: {there} is a file; name another, or move that file away"


def _files(config: RunConfig) -> Iterator[Finding]:
    """Named files exist, and a folder can be where the run writes."""
    if (problem := no_folder(config.run.dir) or no_folder(config.run.dir / "checkpoints")) is not None:
        yield Finding(key="run.dir", message=problem)
    for name in ("config.yaml", "log.txt", "metrics.jsonl"):
        if (place := config.run.dir / name).is_dir():
            yield Finding(key="run.dir", message=f"{place} is a folder where the run writes a file; move it away")
    problem_of = _no_corpus if isinstance(config.data, CorpusConfig) else _nothing_there
    for key in ("files", "validation_files"):
        for index, name in enumerate(getattr(config.data, key, ())):
            if (problem := problem_of(Path(name))) is not None:
                yield Finding(key=f"data.{key}[{index}]", message=problem)
    paths = {"tokenizer.path": config.tokenizer.path, "checkpoint.load": config.checkpoint.load}
    paths |= {f"algorithm.{name}.load": role.load for name, role in roles(config).items()}
    for key, path in paths.items():
        if path is not None and (problem := _nothing_there(path)) is not None:
            yield Finding(key=key, message=problem)


def _nothing_there(path: Path) -> str | None:
    return None if path.exists() else f"{path} does not exist"


def _no_corpus(path: Path) -> str | None:
    """Why ``path`` cannot be read as prepared text, as far as names tell; data/sources.py opens what passes."""
    if path.is_dir():
        prepared = any((path / name).is_file() for name in _PREPARED) or any(path.glob("*.idx"))
    else:
        prepared = Path(f"{path}.bin").is_file() and Path(f"{path}.idx").is_file()
    if prepared:
        return None
    if not path.exists():
        return f"{path} does not exist (nor .bin and .idx of that prefix); zj prepare makes them"
    what = "a folder without prepared text" if path.is_dir() else "raw text"
    return f"{path} is {what}; prepare it: zj prepare data.files=[{path}] tokenizer.path=... out=DIR, and name DIR here"
