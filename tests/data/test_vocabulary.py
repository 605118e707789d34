"""Vocabularies: trained, extended, and the embedding rows of new pieces."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from megatron_zj.cli.tokenizer import main
from megatron_zj.config.loader import ConfigError
from megatron_zj.data.errors import DataError
from megatron_zj.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from megatron_zj.data.vocabulary import (
    extend_vocabulary,
    mean_of_pieces,
    pieces_of_new_ids,
    texts_of_files,
    train_sentencepiece,
)
from tests.data.conftest import TEXTS

CHINESE = ("高血压患者按时服药", "糖尿病患者控制饮食", "高血压和糖尿病", "按时服药，控制饮食") * 8


@pytest.fixture(scope="module")
def english() -> SentencePieceTokenizer:
    """A vocabulary without a Chinese piece: every character is three bytes."""
    return train_sentencepiece(["hello world of words", "the doctor and the patient"] * 4, 300)


@pytest.fixture(scope="module")
def chinese() -> SentencePieceTokenizer:
    return train_sentencepiece(CHINESE, 310, character_coverage=1.0)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_trained_tokenizer_knows_every_text_and_repeats_itself(model_type: str) -> None:
    first, second = (train_sentencepiece(TEXTS * 4, 349, model_type=model_type) for _ in range(2))
    assert first.fingerprint() == second.fingerprint()
    assert first.vocab_size == 349
    for text in ("从未见过的字：鬱🩺", "a\tb  c\n", "１２"):
        assert first.decode(first.encode(text)) == text


def test_special_tokens_of_training_come_first_and_never_from_text(tokenizer: SentencePieceTokenizer) -> None:
    assert [tokenizer.special_id(token) for token in ("<human>", "<bot>")] == [4, 5]


def test_vocabulary_that_cannot_be_filled_says_what_to_change() -> None:
    for size in (270, 100_000):
        with pytest.raises(DataError, match=f"cannot train {size} pieces(.|\n)*change vocab_size"):
            train_sentencepiece(TEXTS, size, character_coverage=1.0)


def test_texts_without_a_line_are_told() -> None:
    with pytest.raises(DataError, match="cannot train 300 pieces: the texts have no line to learn from"):
        train_sentencepiece(["", " \n"], 300)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["data.files=[]"], "data.files: nothing to learn from; give data.files=[FILE,...]"),
        (["data.files=[x]", "special_tokens=['']"], "special_tokens: the text of a token is empty"),
        (["data.files=[x]", "character_coverage=0.5"], "character_coverage: must be in [0.98, 1], got 0.5"),
    ],
)
def test_what_no_tokenizer_can_be_trained_on_is_told_by_its_key(tmp_path: Path, words: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        main(["train", "vocab_size=600", f"out={tmp_path}", *words])


def test_a_bad_record_under_way_is_told_as_itself_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": text}) for text in TEXTS * 4]
    path.write_text("\n".join([*lines, '{"text": "\\ud800"}', *lines]), encoding="utf-8")
    with pytest.raises(
        DataError, match=rf"^{path}, record at line {len(lines) + 1}, field 'text': half of a character"
    ):
        train_sentencepiece(texts_of_files([str(path)]), 349)
    whole = train_sentencepiece(texts_of_files([str(path)], "skip"), 349)
    assert whole.fingerprint() == train_sentencepiece(TEXTS * 8, 349).fingerprint()


def test_extension_keeps_every_id_and_shortens_chinese(
    english: SentencePieceTokenizer, chinese: SentencePieceTokenizer
) -> None:
    extended = extend_vocabulary(english, chinese)
    assert [extended.piece(i) for i in range(english.vocab_size)] == [
        english.piece(i) for i in range(english.vocab_size)
    ]
    new = [extended.piece(i) for i in range(english.vocab_size, extended.vocab_size)]
    assert len(new) == len(set(new))
    assert "患者" in new
    assert extended.encode("hello world") == english.encode("hello world")
    text = "高血压患者控制饮食"
    assert extended.decode(extended.encode(text)) == text
    assert len(extended.encode(text)) < len(english.encode(text)) / 3
    assert (extended.bos_id, extended.eos_id) == (english.bos_id, english.eos_id)


def test_tokenizer_with_added_tokens_is_not_extended(
    english: SentencePieceTokenizer, chinese: SentencePieceTokenizer
) -> None:
    with pytest.raises(DataError, match=r"<human>(.|\n)*special_tokens"):
        extend_vocabulary(SentencePieceTokenizer(english.model, {}, ["<human>"]), chinese)


def test_new_pieces_are_spelt_in_old_ones_without_a_space_before_them(
    english: SentencePieceTokenizer, chinese: SentencePieceTokenizer
) -> None:
    extended = extend_vocabulary(english, chinese)
    with_token = SentencePieceTokenizer(extended.model, {}, ["<human>"])
    spelt = pieces_of_new_ids(english, with_token)
    assert len(spelt) == with_token.vocab_size - english.vocab_size
    for offset, ids in enumerate(spelt):
        piece = with_token.piece(english.vocab_size + offset)
        if not piece.startswith("▁"):
            assert bytes_of(english, ids) == piece.encode()
    with pytest.raises(DataError, match="does not extend the old one: id"):
        pieces_of_new_ids(chinese, english)


def bytes_of(tokenizer: SentencePieceTokenizer, ids: list[int]) -> bytes:
    """The bytes these ids stand for, a byte piece as its byte."""
    pieces = [tokenizer.piece(i) for i in ids]
    return b"".join(bytes([int(p[3:5], 16)]) if p.startswith("<0x") else p.encode() for p in pieces)


def test_new_embedding_rows_are_means_of_their_pieces() -> None:
    rows_VD = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]])
    resized = mean_of_pieces(rows_VD, [[0, 1], [2], [0, 1, 1, 2]], 8)
    worked = [[1.0, 2.0], [3.0, 6.0], [5.0, 1.0], [2.0, 4.0], [5.0, 1.0], [3.0, 3.75], [0.0, 0.0], [0.0, 0.0]]
    assert resized.tolist() == worked
    half = mean_of_pieces(rows_VD.to(torch.bfloat16), [[0, 1]], 4)
    assert half.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="5 rows cannot hold 3 old and 3 new"):
        mean_of_pieces(rows_VD, [[0], [1], [2]], 5)
    with pytest.raises(ValueError, match="new id 3 has no pieces"):
        mean_of_pieces(rows_VD, [[]], 4)


def test_commands_train_extend_and_show(
    tmp_path: Path, english: SentencePieceTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw.txt"
    raw.write_text("\n\n".join(CHINESE), encoding="utf-8")
    english.save(tmp_path / "english")
    train = ["train", f"data.files=[{raw}]", "vocab_size=310", "special_tokens=['<human>']", f"out={tmp_path / 'new'}"]
    assert main([*train, "character_coverage=1.0"]) == 0
    assert load_tokenizer(tmp_path / "new").special_id("<human>") == 4
    assert main([*train, "character_coverage=1.0"]) == 0  # again: the same tokenizer
    extend = ["extend", f"base={tmp_path / 'english'}", f"pieces={tmp_path / 'new'}"]
    for taken in (tmp_path / "english", tmp_path / "new"):
        with pytest.raises(DataError, match=f"{taken}/tokenizer.model is there already, and of another tokenizer"):
            main([*extend, f"out={taken}"])
    assert load_tokenizer(tmp_path / "english").fingerprint() == english.fingerprint()
    assert main([*extend, f"out={tmp_path / 'e'}"]) == 0
    assert load_tokenizer(tmp_path / "e").vocab_size > english.vocab_size
    capsys.readouterr()
    assert main(["show", f"path={tmp_path / 'e'}", "text=高血压"]) == 0
    assert "高血压" in capsys.readouterr().out
    assert main(["trian"]) == 2
