"""A checkpoint ready to be asked: what generate, chat and evaluate share.

Every function here is collective over the world and takes and returns whole lists, the same on every rank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from megatron_zj.checkpoint.errors import CheckpointError
from megatron_zj.checkpoint.load import agreed_newest, load
from megatron_zj.checkpoint.manifest import (
    TOKENIZER,
    Manifest,
    RoleInfo,
    not_a_checkpoint,
    pick_role,
    read_manifest,
    read_tokenizer,
)
from megatron_zj.cli.prepare import require_folder, settings
from megatron_zj.config.data import TokenizerConfig
from megatron_zj.config.derived import ALL
from megatron_zj.config.inference import GenerationConfig, InferenceConfig, SourceConfig
from megatron_zj.config.loader import ConfigError, to_dict
from megatron_zj.config.loader import load as load_config
from megatron_zj.config.model import HeadKind
from megatron_zj.config.optim import EngineConfig
from megatron_zj.config.sampling import SamplingConfig
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.data.chat import TEMPLATES, ChatTemplate, chat_template, missing_tokens
from megatron_zj.data.stream import share
from megatron_zj.data.tokenizer import Tokenizer, load_tokenizer
from megatron_zj.engine.build import build_engine
from megatron_zj.roles.exchange import Exchange
from megatron_zj.roles.placement import build_placements
from megatron_zj.roles.role import Role
from megatron_zj.roles.world import World, WorldBatch, gather_in_order
from megatron_zj.rollout.generate import Rollout
from megatron_zj.rollout.stop_tokens import stop_ids
from megatron_zj.runtime.distributed import Process

CHUNK_ROWS = 256  # rows a role call, so that progress can be shown
_SHOWN = 30  # characters of a prompt in a message


Config = TypeVar("Config", bound=InferenceConfig)


def compose_inference(overrides: Sequence[str], schema: type[Config]) -> Config:
    """``key=value`` overrides, checked against the command's configuration."""
    config = load_config(schema, settings(overrides, {}))
    if isinstance(config, GenerationConfig):  # a chat writes nothing
        require_folder("run.dir", config.run.dir)
    return config


def wants_help(argv: Sequence[str]) -> bool:
    """Whether the command line asks what it may hold."""
    return any(word in ("-h", "--help") for word in argv)


def help_text(usage: str | None, schema: type[InferenceConfig]) -> str:
    """The command's first words and every key of its configuration with its default."""
    source = SourceConfig(load=Path("DIR"))
    defaults = to_dict(schema(checkpoint=source))
    if "reference" in defaults:  # a second checkpoint, of which one may name any key and which is none by default
        defaults["reference"] = to_dict(source)
    lines = [f"  {key}={value}" for key, value in _leaves(defaults)]
    return "\n".join([(usage or "").strip().replace("``", ""), "", "keys and defaults:", *lines, ""])


def _leaves(tree: Mapping[str, Any], path: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in tree.items():
        found += _leaves(value, f"{path}{name}.") if isinstance(value, Mapping) else [(f"{path}{name}", value)]
    return found


class OverlongError(ConfigError):
    """Rows that the model has no positions for; ``rows`` are their indexes."""

    def __init__(self, problem: str, rows: Sequence[int]) -> None:
        super().__init__([problem])
        self.rows = frozenset(rows)


class LoadedModel:
    """One role of a checkpoint on all ranks."""

    def __init__(
        self,
        config: InferenceConfig,
        process: Process,
        *,
        untrained: bool = False,
        key: str = "checkpoint",
        source: SourceConfig | None = None,
    ) -> None:
        """``untrained``: fresh weights drawn from ``run.seed`` instead of the checkpoint's.

        ``key`` and ``source``: another checkpoint than ``config.checkpoint``, and what messages call it.
        """
        source = source or config.checkpoint
        folder = agreed_newest(source.load)
        if folder is None:
            raise ConfigError([f"{key}.load: {not_a_checkpoint(source.load)}"])
        manifest = read_manifest(folder)
        try:
            name = pick_role(folder, manifest, source.role)
        except CheckpointError as error:
            raise ConfigError([f"{key}.role: {error}"]) from None
        info = manifest.roles[name]
        self.key, self.folder, self.step, self.name, self.info = key, folder, manifest.step, name, info
        self.tokenizer: Tokenizer = _tokenizer(config.tokenizer, folder, manifest, info)
        stop_ids(config.sampling, self.tokenizer)  # a wrong name is told before a model is built
        self.template = _template(config.data.template or _trained_template(manifest.config), self.tokenizer, folder)
        self.world, self.process, self.seed = World.current(), process, config.run.seed
        placement = build_placements(config.parallel, {}, {ALL}, process.world_size, config.run.timeout_seconds)[ALL]
        if placement.groups is None:
            raise RuntimeError("this rank is outside the only placement")
        engine = build_engine(
            info.model,
            info.head,
            placement.groups,
            EngineConfig(**dataclasses.asdict(config.engine)),
            None,
            1,
            process.device,
            config.run.seed,
            awaits_weights=not untrained,
        )
        if not untrained:
            load(folder, {name: engine}, weights_only=True, tokenizer=self.tokenizer.fingerprint())
        self.role = Role(name, placement, engine, Exchange(process.activity))

    def continuations(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        on_progress: Callable[[int], None] | None = None,
        places: Sequence[str] | None = None,
    ) -> list[tuple[list[int], bool]]:
        """Sampled ids after each prompt, the stop token or string included, and whether there was one.

        ``places``: where each prompt is from, for errors.
        """
        self.require("lm", "answers")
        self._require_room(prompts, sampling.max_new_tokens, places)
        rollout = Rollout(sampling, stop_ids(sampling, self.tokenizer), self.seed, self.text)
        answers: list[tuple[list[int], bool]] = []
        for start, chunk in _chunks(prompts):
            local, first = self._share(chunk)
            batch = self._batch(local, torch.arange(start + first, start + first + len(local)))
            samples = self.role.generate(rollout.at_step(0), batch).local
            lengths, cut = samples.per_row["prompt_length"].tolist(), samples.per_row["truncated"].tolist()
            ids = [row[length:].tolist() for row, length in zip(samples.tokens.split(), lengths, strict=True)]
            answers += gather_in_order([(one, not off) for one, off in zip(ids, cut, strict=True)])
            if on_progress is not None:
                on_progress(len(answers))
        return answers

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        on_progress: Callable[[int], None] | None = None,
        places: Sequence[str] | None = None,
    ) -> list[tuple[str, bool]]:
        """Sampled texts, and whether each ended by itself; the arguments of ``continuations``."""
        found = self.continuations(prompts, sampling, on_progress, places)
        return [(self.text(ids), ended) for ids, ended in found]

    def text(self, ids: Sequence[int]) -> str:
        """What the ids say.  A model may have rows that the tokenizer has no piece for; such an id says nothing."""
        return self.tokenizer.decode([token_id for token_id in ids if token_id < self.tokenizer.vocab_size])

    def option_logprobs(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], places: Sequence[str] | None = None
    ) -> list[float]:
        """Sum of the log-probabilities (nats) of each option's ids after its prompt's."""
        return [math.fsum(logprobs) for logprobs in self.token_logprobs(pairs, places=places)]

    def token_logprobs(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        temperature: float = 1.0,
        places: Sequence[str] | None = None,
    ) -> list[list[float]]:
        """Log-probability (nats) of each id of each option after its prompt, at ``temperature``."""
        self.require("lm", "log-probabilities")
        self._require_room([[*prompt, *option] for prompt, option in pairs], 0, places)
        found: list[list[float]] = []
        for _, chunk in _chunks(pairs):
            local, _first = self._share(chunk)
            batch = self._batch([[*prompt, *option] for prompt, option in local], torch.arange(len(local)))
            logprobs = self.role.infer("logprobs", batch, temperature).wait()
            if not isinstance(logprobs, Rows):
                raise TypeError("expected a value a token")
            rows = zip(logprobs.split(), local, strict=True)
            found += gather_in_order([row[len(prompt) :].tolist() for row, (prompt, _option) in rows])
        return found

    def scores(self, rows: Sequence[Sequence[int]], places: Sequence[str] | None = None) -> list[float]:
        """The reward head's score of each whole row."""
        self.require("score", "scores")
        self._require_room(rows, 0, places)
        found: list[float] = []
        for _, chunk in _chunks(rows):
            local, _first = self._share(chunk)
            scores = self.role.infer("scores", self._batch(local, torch.arange(len(local)))).wait()
            if isinstance(scores, Rows):
                raise TypeError("expected a value a row")
            found += gather_in_order(scores.tolist())
        return found

    def require(self, head: HeadKind, what: str) -> None:
        """ConfigError unless the model has this head, which gives ``what``."""
        if self.info.head != head:
            kinds = {"lm": "a language model", "score": "a reward model", "value": "a critic"}
            raise ConfigError(
                [
                    f"{self.key}.load: {self.name!r} of {self.folder} is {kinds[self.info.head]} and gives no {what}; "
                    f"load {kinds[head]}, or set {self.key}.role to one"
                ]
            )

    def _require_room(self, rows: Sequence[Sequence[int]], new_tokens: int, places: Sequence[str] | None) -> None:
        """OverlongError, the same on every rank, where a row and what follows it exceed the model's positions."""
        positions = self.info.model.max_position_embeddings
        overlong = [index for index, row in enumerate(rows) if len(row) + new_tokens > positions]
        if not overlong:
            return
        row, place = rows[overlong[0]], "" if places is None else f"{places[overlong[0]]}: "
        text = f"({self.text(row)[:_SHOWN]!r} ...)"
        if new_tokens:
            problem = (
                f"{place}the prompt {text} has {len(row)} tokens, and with sampling.max_new_tokens = {new_tokens} that "
                f"is more than the model's {positions} positions; shorten the prompt or lower sampling.max_new_tokens"
            )
        else:
            problem = (
                f"{place}a row of {len(row)} tokens {text} is longer than the model's {positions} positions; "
                "shorten it, or leave it out"
            )
        raise OverlongError(problem, overlong)

    def _share(self, items: Sequence[Any]) -> tuple[Sequence[Any], int]:
        """This rank's contiguous part, and where it starts."""
        first, last = share(len(items), self.world.rank, self.world.size)
        return items[first:last], first

    def _batch(self, rows: Sequence[Sequence[int]], sample_ids: torch.Tensor) -> WorldBatch:
        tokens = Rows.of([torch.tensor(row, dtype=torch.int64) for row in rows], torch.int64)
        return WorldBatch.gather(Batch(tokens, {}, {"sample_id": sample_ids}))


def _chunks(items: Sequence[Any]) -> list[tuple[int, Sequence[Any]]]:
    return [(start, items[start : start + CHUNK_ROWS]) for start in range(0, len(items), CHUNK_ROWS)]


def _tokenizer(config: TokenizerConfig, folder: Path, manifest: Manifest, info: RoleInfo) -> Tokenizer:
    """The one that is named, else the checkpoint's own (a checkpoint converted without one has none)."""
    if config.path is None and not (folder / TOKENIZER).is_dir():
        raise ConfigError([f"tokenizer.path: {folder} holds no tokenizer; name the one its model was trained with"])
    if config.path is None:
        tokenizer = read_tokenizer(folder, manifest, config.special_tokens)
    else:
        tokenizer = load_tokenizer(config.path, config.special_tokens)
    if tokenizer.vocab_size > info.model.vocab_size:
        rows = f"the model of {folder} has {info.model.vocab_size} rows"
        path = config.path or folder / TOKENIZER
        raise ConfigError([f"tokenizer.path: {path} has {tokenizer.vocab_size} ids, and {rows}; name its own"])
    return tokenizer


def _template(name: str, tokenizer: Tokenizer, folder: Path) -> ChatTemplate:
    """ConfigError where the tokenizer lacks a token of the template; no weights are read for nothing."""
    template = chat_template(name)
    if missing := missing_tokens(template, tokenizer):
        others = [other for other in TEMPLATES if not missing_tokens(TEMPLATES[other], tokenizer)]
        raise ConfigError(
            [
                f"data.template: {name} needs the special token {missing[0]!r}, which the tokenizer of {folder} does "
                f"not have; set data.template={' or '.join(others)}, or import the model with "
                f"zj convert --special-tokens '{','.join(missing)}' and train it on them"
            ]
        )
    return template


def _trained_template(config: Any) -> str:
    """The template of the run that wrote the checkpoint; a pre-trained model has none and gets ziya."""
    return str(config.get("data", {}).get("template") or "ziya")
