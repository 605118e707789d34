"""Where rows come from: tokenizer, files, chat template, and the policy for bad or long records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_zj.config.loader import ConfigError
from megatron_zj.config.ranges import check_ranges

OnBadRecord = Literal["error", "skip"]
Template = Literal["ziya", "chimed_gpt"]  # the tables of data/chat.py
FormatName = Literal[  # auto, or a name of data/formats
    "auto",
    "ranked",
    "medicalgpt_reward",
    "pairs",
    "disc_ranked",
    "zhongjing_ranking",
    "zhongjing_labels",
    "best_first",
    "cmdd",
    "cmdd_raw",
    "messages",
    "disc",
    "sharegpt",
    "bentsao",
    "toyhom",
    "turn_lists",
    "alpaca",
    "tcm_classics",
    "text_records",
    "strings",
    "tcm_book",
    "remedi",
    "text",
    "lines",
    "prompts",
    "questions",
]
Overlong = Literal["error", "truncate", "split", "skip"]


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A SentencePiece ``.model`` file or a Hugging Face tokenizer folder."""

    path: Path | None = None  # a run needs one; None only until it is named
    special_tokens: tuple[str, ...] = ()  # added after the tokenizer's own pieces, in this order


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Packed pre-training text: prepared (``zj prepare``) indexed datasets, blended by weight."""

    kind: Literal["corpus"] = "corpus"
    files: tuple[str, ...] = ()  # prepared prefixes (X for X.bin, X.idx) or folders holding them
    weights: tuple[float, ...] | None = None  # one a file; None: proportional to size
    sequence_length: int = 512  # tokens a row
    respect_documents: bool = True  # attention stops at document boundaries
    validation_fraction: float = 0.0  # of the samples, taken from the end

    def __post_init__(self) -> None:
        check_ranges(self, weights="[0, inf)", sequence_length="[2, inf)", validation_fraction="[0, 1)")


@dataclass(frozen=True, kw_only=True)
class RecordsConfig:
    """Records that become rows under a chat template."""

    files: tuple[str, ...] = ()  # raw files, folders of raw files, or prepared folders
    format: FormatName = "auto"  # auto: by each file's first record
    template: Template = "ziya"  # what is written around turns
    max_length: int = 512  # tokens a row
    overlong: Overlong = "truncate"  # what becomes of a longer record
    on_bad_record: OnBadRecord = "error"  # a record that cannot be used: stop, or leave it out and count

    def __post_init__(self) -> None:
        check_ranges(self, max_length="[2, inf)")
        if self.overlong == "split" and not isinstance(self, ChatConfig):
            raise ConfigError(["overlong: split is for dialogues (data.kind=chat); set error, truncate or skip"])


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig(RecordsConfig):
    """Records of which some may be kept for validation."""

    validation_files: tuple[str, ...] = ()  # held-out records
    validation_fraction: float = 0.0  # of the records, when there are no validation_files

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, validation_fraction="[0, 1)")


@dataclass(frozen=True, kw_only=True)
class ChatConfig(HeldOutConfig):
    """Multi-turn dialogues for SFT; every assistant turn and its eos carry loss."""

    kind: Literal["chat"] = "chat"


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig(HeldOutConfig):
    """Ranked responses (K >= 2 a prompt, ties allowed) for the reward model."""

    kind: Literal["preference"] = "preference"


@dataclass(frozen=True, kw_only=True)
class PromptsConfig(RecordsConfig):
    """Prompts for rollouts."""

    kind: Literal["prompts"] = "prompts"
    max_length: int = 256  # tokens a prompt


DataConfig = CorpusConfig | ChatConfig | PreferenceConfig | PromptsConfig
