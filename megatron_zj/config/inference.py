"""Using a trained checkpoint: generate, chat, evaluate.  Shape, tokenizer and template come from the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_zj.config.algorithm import SamplingConfig
from megatron_zj.config.data import OnBadRecord
from megatron_zj.config.optim import EngineConfig
from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.config.run import ProcessSettings

Suite = Literal["exam", "clinic", "preference", "safety", "dialogue", "ner", "cami", "mica"]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Which weights."""

    load: Path  # a checkpoint, or the run or checkpoints folder it is in
    role: str | None = None  # None: the only one, or the actor


@dataclass(frozen=True, kw_only=True)
class QuestionsConfig:
    """What is asked."""

    files: tuple[str, ...] = ()  # prompts, exams, cases, rankings ...
    format: str = "auto"  # a name of data/formats
    template: str | None = None  # None: the one the checkpoint was trained with
    on_bad_record: OnBadRecord = "error"  # stop at a record that cannot be used, or leave it out


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """One use of a checkpoint."""

    checkpoint: SourceConfig  # the weights to use
    run: ProcessSettings = field(default_factory=ProcessSettings)  # where answers and results go, seed, device
    parallel: ParallelConfig = field(default_factory=ParallelConfig)  # any layout reads any checkpoint
    engine: EngineConfig = field(default_factory=EngineConfig)  # precision and micro-batches
    sampling: SamplingConfig = field(default_factory=SamplingConfig)  # how answers are drawn
    data: QuestionsConfig = field(default_factory=QuestionsConfig)  # what is asked
    limit: int = 0  # first records only; 0: all


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(InferenceConfig):
    """What ``zj evaluate`` has besides."""

    suites: tuple[Suite, ...] = ()  # one for all data.files, or one for each of them
    against: Path | None = None  # run.dir of another model's evaluation: win, tie and loss item by item
    margin: float = 0.0  # a difference of scores up to this is a tie
    untrained: bool = False  # ignore the weights and draw fresh ones from run.seed: the baseline
