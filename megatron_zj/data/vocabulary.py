"""Vocabularies: train one, extend one, and give a model's new embedding rows a meaning to start from."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import sentencepiece
import torch
from sentencepiece import sentencepiece_model_pb2
from torch import Tensor

import megatron_zj.data.formats  # noqa: F401  (registers the formats)
from megatron_zj.config.data import OnBadRecord
from megatron_zj.data.errors import DataError
from megatron_zj.data.formats.registry import choose_format, convert_any, raw_items
from megatron_zj.data.raw import raw_files, usable
from megatron_zj.data.records import PreferenceRecord, Record, TextRecord
from megatron_zj.data.tokenizer import SentencePieceTokenizer, Tokenizer

ModelType = Literal["bpe", "unigram"]
_Model = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]  # made at import time
_SPACE = "▁"  # how SentencePiece writes a space
_MAX_SENTENCE_BYTES = 1 << 16  # longer lines are left out of the training


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    *,
    model_type: ModelType = "bpe",
    special_tokens: Sequence[str] = (),
    character_coverage: float = 0.9995,
) -> SentencePieceTokenizer:
    """A tokenizer as LLaMA's: byte fallback (no text is unknown), digits apart, unk 0, bos 1, eos 2, then pad 3.

    ``special_tokens`` follow at 4 ...; text never produces them.  Raises DataError when the texts cannot fill
    ``vocab_size``, or it cannot hold their characters.
    """
    model = io.BytesIO()
    bad: list[DataError] = []  # what stopped the texts: the library hands it on as a text of its own
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts, bad),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            character_coverage=character_coverage,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=_MAX_SENTENCE_BYTES,
            control_symbols=list(special_tokens),
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            num_threads=1,  # the same texts give the same model
            minloglevel=2,
        )
    except RuntimeError as error:
        if bad:
            raise bad[0] from error
        reason = str(error).splitlines()[-1].split("] ")[-1] or str(error)  # without the library's source line
        if "!sentences_.empty()" in reason:
            reason = f"the texts have no line to learn from, at most {_MAX_SENTENCE_BYTES} bytes long"
        raise DataError(f"cannot train {vocab_size} pieces: {reason}\n  -> change vocab_size or the texts") from error
    return SentencePieceTokenizer(model.getvalue(), {})


def _lines(texts: Iterable[str], bad: list[DataError]) -> Iterator[str]:
    try:
        for text in texts:
            yield from (line for line in text.splitlines() if line.strip())
    except DataError as error:
        bad.append(error)
        raise


def extend_vocabulary(base: SentencePieceTokenizer, pieces: SentencePieceTokenizer) -> SentencePieceTokenizer:
    """``base`` with the ordinary pieces of another model that it lacks, after its own; no id of ``base`` changes.

    As Chinese-LLaMA did (Cui et al. 2023, "Efficient and Effective Text Encoding for Chinese LLaMA and Alpaca",
    section 2.1): new pieces have score 0, so that merges into them come before LLaMA's own.  Tokens added to ``base``
    outside its model would change their ids, so they are refused.
    """
    if base.added:
        raise DataError(
            f"the base tokenizer has tokens added after its pieces ({', '.join(base.added)}), whose ids would change\n"
            "  -> extend the tokenizer without them, and name them in tokenizer.special_tokens afterwards"
        )
    merged, other = _Model(), _Model()
    merged.ParseFromString(base.model)
    other.ParseFromString(pieces.model)
    known = {piece.piece for piece in merged.pieces}
    ordinary = _Model.SentencePiece.NORMAL
    for piece in other.pieces:
        if piece.type == ordinary and piece.piece not in known:
            merged.pieces.add(piece=piece.piece, score=0.0, type=ordinary)
    merged.trainer_spec.vocab_size = len(merged.pieces)
    return SentencePieceTokenizer(merged.SerializeToString(), {})


def pieces_of_new_ids(old: SentencePieceTokenizer, new: Tokenizer) -> list[list[int]]:
    """For every id that ``new`` has and ``old`` has not: the ids of ``old`` that spell its text.

    Raises DataError unless ``new`` keeps every id of ``old``.
    """
    changed = [i for i in range(old.vocab_size) if i >= new.vocab_size or old.piece(i) != new.piece(i)]
    if changed:
        raise DataError(
            f"the new tokenizer does not extend the old one: id {changed[0]} ({old.piece(changed[0])!r}) differs"
        )
    proto = _Model()
    proto.ParseFromString(old.model)
    proto.normalizer_spec.add_dummy_prefix = False  # a piece in the middle of a word has no space before it
    spell = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    return [
        [int(i) for i in spell.encode(new.piece(token_id).replace(_SPACE, " "))]
        for token_id in range(old.vocab_size, new.vocab_size)
    ]


def mean_of_pieces(rows_VD: Tensor, pieces: Sequence[Sequence[int]], num_rows: int) -> Tensor:
    """Embedding rows [num_rows, D] of an extended vocabulary.

    rows_VD: [V, D] rows of the old ids, without padding rows.  ``pieces[k]``: the old ids whose mean (in fp64) row
    V + k becomes.  Rows beyond V + len(pieces), which pad the vocabulary, are 0.  Same dtype and device as ``rows_VD``.
    """
    num_old = rows_VD.shape[0]
    if num_rows < num_old + len(pieces):
        raise ValueError(f"{num_rows} rows cannot hold {num_old} old and {len(pieces)} new ids")
    resized = rows_VD.new_zeros(num_rows, rows_VD.shape[1])
    resized[:num_old] = rows_VD
    for offset, ids in enumerate(pieces):
        if not ids:
            raise ValueError(f"new id {num_old + offset} has no pieces")
        resized[num_old + offset] = rows_VD[list(ids)].to(torch.float64).mean(0).to(rows_VD.dtype)
    return resized


def texts_of_files(files: Sequence[str], on_bad_record: OnBadRecord = "error") -> Iterator[str]:
    """Every text in raw files of any format, for training a tokenizer: documents, turns, questions and answers."""
    for path in map(Path, raw_files(files)):
        form = choose_format(path, "auto")
        for record in usable(path, raw_items(path, form), partial(convert_any, form=form), on_bad_record):
            yield from _texts(record)


def _texts(record: Record) -> list[str]:
    if isinstance(record, TextRecord):
        return [record.text]
    if isinstance(record, PreferenceRecord):
        return [turn.content for turns in (record.prompt, *record.responses) for turn in turns]
    return [message.content for message in record.messages]
