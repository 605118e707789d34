"""Using a trained checkpoint: generate, chat, evaluate.  Model shape, tokenizer and template come from the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_zj.config.algorithm import SamplingConfig
from megatron_zj.config.data import OnBadRecord, Overlong
from megatron_zj.config.optim import EngineConfig
from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.config.run import RunSettings

Suite = Literal["exam", "clinic", "preference", "safety", "dialogue", "ner"]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Which weights."""

    load: Path  # a checkpoint, or the run or checkpoints folder it is in
    role: str | None = None  # None: the only one, or the actor


@dataclass(frozen=True, kw_only=True)
class QuestionsConfig:
    """What is asked."""

    files: tuple[str, ...] = ()
    format: str = "auto"
    template: str | None = None  # None: the one the checkpoint was trained with
    max_length: int | None = None  # tokens a prompt; None: what the model's positions leave for the answer
    overlong: Overlong = "error"
    on_bad_record: OnBadRecord = "error"


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """One use of a checkpoint."""

    checkpoint: SourceConfig
    run: RunSettings = RunSettings()
    parallel: ParallelConfig = ParallelConfig()
    engine: EngineConfig = EngineConfig()
    sampling: SamplingConfig = SamplingConfig()
    data: QuestionsConfig = QuestionsConfig()
    suites: tuple[Suite, ...] = ()  # ``zj evaluate`` only: one for all data.files, or one for each of them
    limit: int = 0  # first records only; 0: all
    untrained: bool = False  # ignore the weights and draw fresh ones from run.seed: the baseline
