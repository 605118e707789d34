"""Tokenizers: one interface over SentencePiece and Hugging Face folders."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zj.config.data import TokenizerConfig
from megatron_zj.data.errors import DataError
from megatron_zj.data.tokenizer import HFTokenizer, SentencePieceTokenizer, build_tokenizer, load_tokenizer
from tests.data.conftest import TEXTS


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE in a Hugging Face folder, with its special tokens named as transformers writes them."""
    folder = tmp_path_factory.mktemp("hf")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(TEXTS, trainer)
    model.save(str(folder / "tokenizer.json"))
    names = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    return folder


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0▁"), max_size=30)


@settings(max_examples=150)
@given(value=text)
def test_text_survives_encode_and_decode(tokenizer: SentencePieceTokenizer, hf_folder: Path, value: str) -> None:
    assert tokenizer.decode(tokenizer.encode(value)) == value
    hugging_face = load_tokenizer(hf_folder)
    assert hugging_face.decode(hugging_face.encode(value)) == value


@settings(max_examples=50)
@given(before=text, token=st.sampled_from(["<s>", "</s>", "<human>", "<bot>", "<pad>", "<new>"]), after=text)
def test_text_never_becomes_a_special_token(
    tokenizer: SentencePieceTokenizer, hf_folder: Path, before: str, token: str, after: str
) -> None:
    for known in (
        SentencePieceTokenizer(tokenizer.model, {}, ["<new>"]),
        load_tokenizer(hf_folder, ["<human>", "<bot>", "<new>"]),
    ):
        ids = known.encode(before + token + after)
        assert not set(ids) & set(known.specials.values())


def test_ids_are_those_of_sentencepiece(tokenizer: SentencePieceTokenizer) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    for value in TEXTS:
        assert tokenizer.encode(value) == reference.encode(value)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 3)


def test_added_tokens_follow_the_vocabulary_in_order_and_known_ones_keep_their_ids(
    tokenizer: SentencePieceTokenizer, hf_folder: Path
) -> None:
    more = SentencePieceTokenizer(tokenizer.model, {}, ["<bot>", "<x>", "<y>"])
    assert more.special_id("<bot>") == tokenizer.special_id("<bot>")
    assert [more.special_id("<x>"), more.special_id("<y>")] == [tokenizer.vocab_size, tokenizer.vocab_size + 1]
    assert more.vocab_size == tokenizer.vocab_size + 2
    plain, added = load_tokenizer(hf_folder), load_tokenizer(hf_folder, ["</s>", "<x>"])
    assert added.special_id("</s>") == plain.eos_id
    assert added.special_id("<x>") == plain.vocab_size


def test_saved_folder_gives_the_same_tokenizer(
    tokenizer: SentencePieceTokenizer, hf_folder: Path, tmp_path: Path
) -> None:
    originals = [SentencePieceTokenizer(tokenizer.model, {}, ["<x>"]), load_tokenizer(hf_folder, ["<x>"])]
    for number, original in enumerate(originals):
        original.save(tmp_path / str(number))
        again = build_tokenizer(TokenizerConfig(path=tmp_path / str(number), special_tokens=("<x>",)))
        assert type(again) is type(original)
        assert again.fingerprint() == original.fingerprint()
        assert dict(again.specials) == dict(original.specials)
        assert (again.bos_id, again.eos_id, again.pad_id) == (original.bos_id, original.eos_id, original.pad_id)
        assert again.encode(TEXTS[0]) == original.encode(TEXTS[0])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "added_tokens.json"])
def test_a_folder_with_another_tokenizer_or_a_file_of_one_is_left_as_it_is(
    tokenizer: SentencePieceTokenizer, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=f"{name} is there already, and of another tokenizer\n  -> choose another"):
        tokenizer.save(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "{}"}


def test_saving_again_completes_and_changes_nothing(
    tokenizer: SentencePieceTokenizer, hf_folder: Path, tmp_path: Path
) -> None:
    for original in (tokenizer, load_tokenizer(hf_folder)):
        folder = tmp_path / type(original).__name__
        original.save(folder)
        whole = {path.name: path.read_bytes() for path in folder.iterdir()}
        original.save(folder)
        (folder / ("tokenizer.model" if original is tokenizer else "tokenizer.json")).unlink()  # an interrupted one
        original.save(folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    before = {path.name: path.read_bytes() for path in hf_folder.iterdir()}
    load_tokenizer(hf_folder).save(hf_folder)  # written by another program: the same tokenizer in other bytes
    assert {path.name: path.read_bytes() for path in hf_folder.iterdir()} == before


def test_fingerprint_tells_tokenizers_apart(tokenizer: SentencePieceTokenizer, hf_folder: Path) -> None:
    known = [
        tokenizer,
        SentencePieceTokenizer(tokenizer.model, {}, ["<x>"]),
        SentencePieceTokenizer(tokenizer.model, {}, ["<y>"]),
        load_tokenizer(hf_folder),
        load_tokenizer(hf_folder, ["<x>"]),
    ]
    assert len({each.fingerprint() for each in known}) == len(known)


def test_decode_shows_or_leaves_out_special_tokens(tokenizer: SentencePieceTokenizer) -> None:
    ids = [tokenizer.bos_id, tokenizer.special_id("<human>"), *tokenizer.encode("头痛"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "头痛"
    assert tokenizer.decode(ids, skip_special=False) == "<s><human>头痛</s>"


def test_ids_outside_the_vocabulary_are_refused(tokenizer: SentencePieceTokenizer) -> None:
    for token_id in (-1, tokenizer.vocab_size):
        with pytest.raises(DataError, match=f"{token_id} is outside the vocabulary of {tokenizer.vocab_size}"):
            tokenizer.decode([token_id])


def test_sentencepiece_folder_with_added_tokens_json_keeps_their_ids(
    tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model)
    (tmp_path / "added_tokens.json").write_text(
        json.dumps({"<a>": tokenizer.vocab_size + 1, "<b>": tokenizer.vocab_size})
    )
    loaded = load_tokenizer(tmp_path)
    assert loaded.special_id("<a>") == tokenizer.vocab_size + 1
    assert loaded.vocab_size == tokenizer.vocab_size + 2


def test_added_tokens_may_name_pieces_of_the_model_at_their_own_ids(
    tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    size = tokenizer.vocab_size
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model)
    named = {"0": "<unk>", "1": "<s>", "2": "</s>", str(size): "<x>"}
    decoder = {token_id: {"content": token} for token_id, token in named.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": size}))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.vocab_size, loaded.special_id("<x>"), loaded.bos_id) == (size + 1, size, tokenizer.bos_id)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("added_tokens.json", {"<x>": 300}, "'<x>' has id 300, which is the piece '"),
        ("added_tokens.json", {"<x>": -3}, "from 0 on, found '<x>': -3"),
        ("added_tokens.json", {"<x>": None}, "from 0 on, found '<x>': None"),
        ("added_tokens.json", {"<x>": "abc"}, "from 0 on, found '<x>': 'abc'"),
        ("added_tokens.json", {"": 420}, "from 0 on, found '': 420"),
        ("added_tokens.json", {"<x>": 999999999999}, "'<x>' has id 999999999999; after the model's 420 pieces"),
        ("added_tokens.json", {"<x>": 420, "<y>": 420}, "'<y>' has id 420; after the model's 420 pieces"),
        ("added_tokens.json", {"<s>": 420}, "'<s>' has id 420, and is the model's piece 1 too"),
        ("added_tokens.json", {"<unk>": 420}, "'<unk>' has id 420, and is the model's piece 0 too"),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, "added_tokens_decoder must be an object, found list"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"420": "tok"}}, "from 0 on, found None: 420"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"420": {}}}, "from 0 on, found None: 420"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<x>"}}}, "from 0 on, found '<x>': 'x'"),
    ],
)
def test_added_tokens_that_cannot_be_are_refused(
    tokenizer: SentencePieceTokenizer, tmp_path: Path, name: str, content: object, words: str
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model)
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(DataError, match=re.escape(words)) as refused:
        load_tokenizer(tmp_path)
    assert str(refused.value).startswith(str(tmp_path))


def test_unusable_tokenizers_name_the_file_and_what_to_change(
    tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.model"
    broken.write_bytes(b"not a model")
    empty = tmp_path / "empty.model"
    empty.touch()
    folder = tmp_path / "folder"
    folder.mkdir()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "tokenizer.json").write_text("{")
    (damaged / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "tokenizer.json").write_bytes(b"\xff")
    for path, message in (
        (tmp_path / "none.model", "does not exist"),
        (broken, "broken.model is not a SentencePiece model"),
        (empty, "empty.model is empty"),
        (folder, "holds neither tokenizer.json nor tokenizer.model"),
        (damaged, "is not a usable tokenizer"),
        (foreign, "foreign/tokenizer.json is not a usable tokenizer: 'utf-8' codec"),
    ):
        with pytest.raises(DataError, match=message):
            load_tokenizer(path)
    with pytest.raises(DataError, match=r"tokenizer\.path"):
        build_tokenizer(TokenizerConfig())
    with pytest.raises(DataError, match=r"special_tokens=\['<nurse>'\]"):
        tokenizer.special_id("<nurse>")
    tokenizer.save(tmp_path / "whole")
    with pytest.raises(DataError, match=r"tokenizer\.special_tokens: the text of a token is empty"):
        load_tokenizer(tmp_path / "whole", [""])


def test_hf_folder_without_eos_is_refused(hf_folder: Path, tmp_path: Path) -> None:
    content = (hf_folder / "tokenizer.json").read_text(encoding="utf-8")
    with pytest.raises(DataError, match="eos_token"):
        HFTokenizer(content, {"bos_token": "<s>"})
