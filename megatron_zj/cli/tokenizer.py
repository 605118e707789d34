"""``zj tokenizer train | extend | show``: make a tokenizer, give one Chinese pieces, see how one cuts a text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_zj.cli.main import guarded
from megatron_zj.cli.prepare import require_folder, settings
from megatron_zj.config.data import OnBadRecord
from megatron_zj.config.loader import ConfigError, load
from megatron_zj.config.ranges import check_ranges
from megatron_zj.data.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer
from megatron_zj.data.vocabulary import extend_vocabulary, texts_of_files, train_sentencepiece

_HELP = """zj tokenizer: SentencePiece tokenizers

usage: zj tokenizer train  data.files=[FILE,...] vocab_size=N out=DIR [model_type=bpe|unigram]
                           [special_tokens=[<human>,<bot>]] [character_coverage=0.9995]
       zj tokenizer extend base=PATH pieces=PATH out=DIR    (base's ids stay; pieces it lacks follow)
       zj tokenizer show   path=PATH text=TEXT

PATH is a .model file or a tokenizer folder.  Give out as tokenizer.path to the other commands.
"""


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """Raw files of any format, or folders of them."""

    files: tuple[str, ...]  # all their texts are used
    on_bad_record: OnBadRecord = "error"  # skip: leave out


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A new tokenizer."""

    data: TextFiles  # what it is trained on
    out: Path  # folder to write
    vocab_size: int  # ids, bytes and special tokens included
    model_type: Literal["bpe", "unigram"] = "bpe"  # of SentencePiece
    special_tokens: tuple[str, ...] = ()  # text never gives these; ids 4, 5 ...
    character_coverage: float = 0.9995  # of the texts' characters, from 0.98 on; the rest is spelt in bytes

    def __post_init__(self) -> None:
        check_ranges(self, vocab_size="[1, inf)", character_coverage="[0.98, 1]")
        if not self.data.files:
            raise ConfigError(["data.files: nothing to learn from; give data.files=[FILE,...]"])
        if "" in self.special_tokens:
            raise ConfigError(["special_tokens: the text of a token is empty; give it one, or leave it out"])


@dataclass(frozen=True, kw_only=True)
class ExtendConfig:
    """A tokenizer with more pieces."""

    base: Path  # whose ids stay
    pieces: Path  # whose pieces follow
    out: Path  # folder to write


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """A text, cut."""

    path: Path  # a .model file or a folder
    text: str  # what to cut
    special_tokens: tuple[str, ...] = ()  # as tokenizer.special_tokens


def main(argv: Sequence[str]) -> int:
    """Run one action.  Returns the exit code."""
    actions = {"train": _train, "extend": _extend, "show": _show}
    if not argv or argv[0] not in actions:
        asked = bool(argv) and argv[0] in ("-h", "--help")
        (sys.stdout if asked else sys.stderr).write(_HELP)
        return 0 if asked else 2
    sys.stdout.write(actions[argv[0]](argv[1:]))
    return 0


def _train(argv: Sequence[str]) -> str:
    config = load(TrainConfig, settings(argv, {}))
    require_folder("out", config.out)
    tokenizer = train_sentencepiece(
        texts_of_files(config.data.files, config.data.on_bad_record),
        config.vocab_size,
        model_type=config.model_type,
        special_tokens=config.special_tokens,
        character_coverage=config.character_coverage,
    )
    tokenizer.save(config.out)
    return _saved(tokenizer, config.out)


def _extend(argv: Sequence[str]) -> str:
    config = load(ExtendConfig, settings(argv, {}))
    require_folder("out", config.out)
    base, pieces = load_tokenizer(config.base), load_tokenizer(config.pieces)
    if not isinstance(base, SentencePieceTokenizer) or not isinstance(pieces, SentencePieceTokenizer):
        raise ConfigError(["base and pieces must be SentencePiece tokenizers (a .model file, or a folder with one)"])
    extended = extend_vocabulary(base, pieces)
    extended.save(config.out)
    added = extended.vocab_size - base.vocab_size
    return f"{added:,} pieces added to {base.vocab_size:,}\n{_saved(extended, config.out)}"


def _show(argv: Sequence[str]) -> str:
    config = load(ShowConfig, settings(argv, {}))
    tokenizer = load_tokenizer(config.path, config.special_tokens)
    ids = tokenizer.encode(config.text)
    pieces = " ".join(f"{tokenizer.piece(token_id)}({token_id})" for token_id in ids)
    return f"{pieces}\n{len(ids)} tokens for {len(config.text)} characters\n"


def _saved(tokenizer: Tokenizer, out: Path) -> str:
    ids = f"bos {tokenizer.bos_id}, eos {tokenizer.eos_id}, pad {tokenizer.pad_id}"
    return f"{out}: {tokenizer.vocab_size:,} ids, {ids}, checksum {tokenizer.fingerprint()[:12]}\n"


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
