"""Using a trained checkpoint: generate, chat, evaluate.  Shape, tokenizer and template come from the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_zj.config.data import FormatName, OnBadRecord, Template, TokenizerConfig
from megatron_zj.config.loader import ConfigError
from megatron_zj.config.optim import ForwardConfig
from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.config.ranges import check_ranges
from megatron_zj.config.run import OutputSettings, ProcessSettings
from megatron_zj.config.sampling import SamplingConfig

Suite = Literal["exam", "clinic", "preference", "safety", "dialogue", "ner", "cami", "mica"]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Which weights."""

    load: Path  # a checkpoint, or the run or checkpoints folder it is in
    role: str | None = None  # None: the only one, or the actor


@dataclass(frozen=True, kw_only=True)
class TemplateConfig:
    """How turns are written."""

    template: Template | None = None  # None: the one the checkpoint was trained with


@dataclass(frozen=True, kw_only=True)
class QuestionsConfig(TemplateConfig):
    """What is asked."""

    files: tuple[str, ...] = ()  # prompts, exams, cases, rankings ...
    format: FormatName = "auto"  # auto: by each file's first record
    on_bad_record: OnBadRecord = "error"  # stop at a record that cannot be used, or leave it out


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """One use of a checkpoint; of ``zj chat``, all there is."""

    checkpoint: SourceConfig  # the weights to use
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)  # for a checkpoint that holds none
    run: ProcessSettings = field(default_factory=ProcessSettings)  # seed, device
    parallel: ParallelConfig = field(default_factory=ParallelConfig)  # any layout reads any checkpoint
    engine: ForwardConfig = field(default_factory=ForwardConfig)  # precision and micro-batches
    sampling: SamplingConfig = field(default_factory=SamplingConfig)  # how answers are drawn
    data: TemplateConfig = field(default_factory=TemplateConfig)  # how turns are written

    def __post_init__(self) -> None:
        if self.tokenizer.special_tokens and self.tokenizer.path is None:
            raise ConfigError(
                ["tokenizer.special_tokens: has no effect without tokenizer.path; the checkpoint's is used"]
            )


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(InferenceConfig):
    """What ``zj generate`` and ``zj evaluate`` have besides."""

    run: OutputSettings = field(default_factory=OutputSettings)  # where answers and results go, seed, device
    data: QuestionsConfig = field(default_factory=QuestionsConfig)  # what is asked
    limit: int = 0  # first records only; 0: all

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, limit="[0, inf)")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(GenerationConfig):
    """What ``zj evaluate`` has besides."""

    suites: tuple[Suite, ...] = ()  # one for all data.files, or one for each of them
    against: Path | None = None  # run.dir of another model's evaluation: win, tie and loss item by item
    margin: float = 0.0  # a difference of scores up to this is a tie
    untrained: bool = False  # ignore the weights and draw fresh ones from run.seed: the baseline
    reference: SourceConfig | None = None  # reference.load=DIR: the model that the answers' KL is measured to

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, margin="[0, inf)")
        if self.reference is not None and not self.sampling.draws_from_the_model:
            raise ConfigError(
                [
                    "reference: KL is estimated from draws of the model itself; greedy answers, top_k, top_p, "
                    "repetition_penalty and min_new_tokens give others. Leave these settings of sampling out, or "
                    "reference"
                ]
            )
