"""A row ends at the token that completes a stop string, wherever the tokens' and characters' boundaries fall."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zj.config.sampling import SamplingConfig
from megatron_zj.data.vocabulary import train_sentencepiece
from megatron_zj.rollout.stop_text import StopText

TEXT = "病人发热咳嗽三天，请问需要做什么检查？建议先查血常规。hello world 123\nUser: 头痛 <end> stop it"
PIECES = train_sentencepiece([TEXT] * 4, 360, special_tokens=("<human>",), character_coverage=1.0)


def _byte_level() -> tokenizers.Tokenizer:
    """Byte-level BPE as Llama 3 has it: a token may hold a character and a part of the next."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator([TEXT] * 4, trainer)
    return made


BYTES = _byte_level()
KINDS: dict[str, tuple[Callable[[str], list[int]], Callable[[Sequence[int]], str]]] = {
    "sentencepiece with byte fallback": (PIECES.encode, lambda ids: PIECES.decode(list(ids))),
    "byte-level": (lambda text: BYTES.encode(text).ids, lambda ids: BYTES.decode(list(ids))),
}
STRINGS = ("。", "\nUser:", "<end>", "stop", "🙂", "é b", " 头", "aab")
ALPHABET = st.sampled_from("aab 头痛。\n🙂é囧<end>" + "病") | st.sampled_from(["\nUser:", "stop", "é b", "囍囍"])


def _first_end(
    ids: Sequence[int], decode: Callable[[Sequence[int]], str], strings: Sequence[str], least: int = 0
) -> int | None:
    """The number of tokens, ``least`` or more, whose whole text first holds a string that ends in the last of them."""
    for count in range(max(1, least), len(ids) + 1):
        known, text = len(decode(ids[: count - 1]).rstrip("\ufffd")), decode(ids[:count])
        if any(text.find(string, max(0, known - len(string) + 1)) >= 0 for string in strings):
            return count
    return None


def _watched_end(
    ids: Sequence[int], decode: Callable[[Sequence[int]], str], strings: Sequence[str], least: int = 0
) -> int | None:
    watch = StopText(strings, decode, least)
    return next((count for count, token in enumerate(ids, 1) if watch.ends(token)), None)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@given(st.lists(ALPHABET, max_size=25), st.sets(st.sampled_from(STRINGS), min_size=1, max_size=3), st.integers(0, 12))
def test_a_row_ends_where_its_whole_text_first_holds_a_string(
    kind: str, parts: list[str], strings: set[str], least: int
) -> None:
    encode, decode = KINDS[kind]
    ids = encode("".join(parts))
    assert _watched_end(ids, decode, sorted(strings), least) == _first_end(ids, decode, sorted(strings), least)


def test_characters_of_several_tokens_and_strings_over_boundaries_are_found() -> None:
    encode, decode = KINDS["sentencepiece with byte fallback"]
    assert len(encode("🙂")) >= 4  # a character that no piece holds
    ids = encode("囧囧🙂a")
    assert _watched_end(ids, decode, ["🙂"]) == _first_end(ids, decode, ["🙂"]) == len(ids) - 1
    ids = encode("头痛 <end> stop it")
    end = _watched_end(ids, decode, ["d> st"])
    assert end is not None
    assert "d> st" in decode(ids[:end])
    assert "d> st" not in decode(ids[: end - 1])


def test_special_tokens_between_do_not_hide_a_string_and_broken_bytes_do_not_hide_what_follows() -> None:
    encode, decode = KINDS["sentencepiece with byte fallback"]
    hidden = [PIECES.special_id("<human>")] * 20
    ids = [*encode("sto"), *hidden, *encode("ap"), *encode("p stop")]
    assert _watched_end(ids, decode, ["stop"]) == _first_end(ids, decode, ["stop"])
    half = encode("🙂")[-3:-1]
    assert _watched_end([*half * 9, *encode("x<end>y")], decode, ["<end>"]) is not None


def test_only_a_handful_of_tokens_is_decoded_a_step() -> None:
    encode, decode = KINDS["sentencepiece with byte fallback"]
    most: list[int] = []

    def counting(ids: Sequence[int]) -> str:
        most.append(len(ids))
        return decode(ids)

    assert _watched_end(encode("囧病人 hello。" * 60), counting, ["no such text"]) is None
    assert max(most) <= 16


def test_a_string_before_the_minimum_length_does_not_end_the_row() -> None:
    ids = [1, 2, 3, 1, 2, 3]
    assert _watched_end(ids, lambda some: "".join("-ab."[i] for i in some), ["."]) == 3
    assert _watched_end(ids, lambda some: "".join("-ab."[i] for i in some), ["."], least=4) == 6


def test_a_short_string_that_a_longer_one_keeps_in_sight_does_not_end_the_row_later() -> None:
    ids = list(range(6))
    assert _watched_end(ids, lambda some: "".join("xabcde"[i] for i in some), ["ab", "wxyz"], least=4) is None
    assert _watched_end(ids, lambda some: "".join("xababz"[i] for i in some), ["ab", "wxyz"], least=4) == 5
    assert _watched_end(ids, lambda some: "".join("aaaaaa"[i] for i in some), ["aa", "wxyz"], least=4) == 4


def test_empty_and_broken_strings_are_refused() -> None:
    for strings in (("",), ("a", "\ufffd")):
        with pytest.raises(ValueError, match="whole character"):
            SamplingConfig(stop_strings=strings)
