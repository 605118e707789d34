"""Records to token rows under each policy for overlong ones."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_zj.data.chat import TEMPLATES, Message, render, render_prompt
from megatron_zj.data.errors import BadRecord
from megatron_zj.data.records import DialogueRecord, PreferenceRecord, PromptRecord, TextRecord
from megatron_zj.data.rows import Counts, Encoder, TooLong, Unit
from megatron_zj.data.tokenizer import SentencePieceTokenizer

ZIYA = TEMPLATES["ziya"]
content = st.text(st.sampled_from("头痛发热咳嗽，？ab1"), min_size=1, max_size=20)
pairs_of_turns = st.lists(st.tuples(content, content), min_size=1, max_size=4)


def dialogue(pairs: list[tuple[str, str]]) -> tuple[Message, ...]:
    return tuple(m for q, a in pairs for m in (Message("user", q), Message("assistant", a)))


def ids(row: tuple) -> list[int]:
    return [i for span in row for i in span.ids]


def encode(tokenizer: SentencePieceTokenizer, record, max_length: int, overlong: str) -> tuple[list[Unit], Counts]:
    counts = Counts()
    return Encoder(tokenizer, ZIYA, max_length, overlong)(record, counts), counts


def test_document_is_bos_text_eos_whatever_its_length(tokenizer: SentencePieceTokenizer) -> None:
    units, counts = encode(tokenizer, TextRecord("头痛" * 50), 2, "error")
    assert ids(units[0].rows[0]) == [1, *tokenizer.encode("头痛" * 50), 2]
    assert counts.tokens == len(ids(units[0].rows[0]))


@settings(max_examples=100)
@given(pairs=pairs_of_turns, max_length=st.integers(2, 120))
def test_truncated_dialogue_is_a_prefix_that_ends_in_an_answer(
    tokenizer: SentencePieceTokenizer, pairs: list[tuple[str, str]], max_length: int
) -> None:
    whole = render(dialogue(pairs), ZIYA, tokenizer)
    record = DialogueRecord(dialogue(pairs))
    if len(whole[0].ids) >= max_length:  # the first question leaves no room for an answer
        return
    units, counts = encode(tokenizer, record, max_length, "truncate")
    row = units[0].rows[0]
    assert ids(row) == ids(tuple(whole))[: len(ids(row))]
    assert len(ids(row)) <= max_length
    assert row[-1].target
    assert (counts.shortened == 0) == (ids(row) == ids(tuple(whole)))


@settings(max_examples=100)
@given(pairs=pairs_of_turns, max_length=st.integers(40, 120), system=st.booleans())
def test_split_dialogue_keeps_every_exchange_once_in_rows_that_fit(
    tokenizer: SentencePieceTokenizer, pairs: list[tuple[str, str]], max_length: int, system: bool
) -> None:
    messages = ((Message("system", "医生"),) if system else ()) + dialogue(pairs)
    units, _ = encode(tokenizer, DialogueRecord(messages), max_length, "split")
    rows = [unit.rows[0] for unit in units]
    assert all(len(ids(row)) <= max_length for row in rows)
    assert all(row[0].ids[0] == tokenizer.bos_id for row in rows)
    answers = [list(span.ids) for row in rows for span in row if span.target]
    assert len(answers) == len(pairs)
    for answer, (_, text) in zip(answers, pairs, strict=True):
        expected = [*tokenizer.encode(text), tokenizer.eos_id]
        assert answer == expected[: len(answer)]  # cut only where a single exchange is too long
    whole = len(ids(tuple(render(messages, ZIYA, tokenizer))))
    assert (len(rows) == 1) if whole <= max_length else (len(rows) > 1 or len(pairs) == 1)


@pytest.mark.parametrize("overlong", ["truncate", "split"])
@settings(max_examples=60)
@given(pairs=pairs_of_turns, question=st.text("头痛发热，？", min_size=30, max_size=60), max_length=st.integers(20, 30))
def test_a_question_that_fills_its_row_is_cut_so_that_its_answer_is_still_learnt(
    tokenizer: SentencePieceTokenizer, overlong: str, pairs: list[tuple[str, str]], question: str, max_length: int
) -> None:
    asked = [(question, pairs[0][1]), *pairs[1:]]
    answer = [*tokenizer.encode(asked[0][1]), tokenizer.eos_id]
    room = max(max_length // 2, max_length - len(answer))
    cuts = [render_prompt([Message("user", question[:n])], ZIYA, tokenizer) for n in range(1, len(question) + 1)]
    assume(len(cuts[-1]) >= max_length)
    units, counts = encode(tokenizer, DialogueRecord(dialogue(asked)), max_length, overlong)
    row = units[0].rows[0]
    assert list(row[0].ids) == [cut for cut in cuts if len(cut) <= room][-1]  # as many characters as fit
    assert [span.target for span in row[:2]] == [False, True]
    assert list(row[1].ids) == answer[: max_length - len(row[0].ids)]
    assert counts.shortened == 1
    assert overlong == "truncate" or len(units) >= min(len(pairs), 2)
    assert all(len(ids(unit.rows[0])) <= max_length and unit.rows[0][-1].target for unit in units)


def test_a_dialogue_whose_frame_fills_its_row_names_the_settings_to_change(tokenizer: SentencePieceTokenizer) -> None:
    record = DialogueRecord((Message("system", "医生" * 20), *dialogue([("头痛", "多久？")])))
    least = len(render_prompt((record.messages[0], Message("user", "头")), ZIYA, tokenizer))
    with pytest.raises(BadRecord, match=f"frame alone takes {least} tokens") as caught:
        encode(tokenizer, record, 20, "truncate")
    located = str(caught.value.located("a.jsonl", 3))
    assert "a.jsonl, record at line 3" in located
    assert "raise data.max_length (now 20)" in located
    assert "data.overlong=skip" in located
    assert encode(tokenizer, record, 20, "skip")[0] == []


def test_overlong_dialogue_is_an_error_or_skipped_as_the_policy_says(tokenizer: SentencePieceTokenizer) -> None:
    record = DialogueRecord(dialogue([("头痛", "多久？" * 30)]))
    with pytest.raises(TooLong, match=r"data\.max_length is 20(.|\n)*data\.overlong"):
        encode(tokenizer, record, 20, "error")
    units, counts = encode(tokenizer, record, 20, "skip")
    assert (units, counts.too_long, counts.units) == ([], 1, 0)


def test_ranking_rows_share_the_prompt_and_end_in_eos(tokenizer: SentencePieceTokenizer) -> None:
    prompt = (*dialogue([("头痛", "多久？")]), Message("user", "三天"))
    responses = ((Message("assistant", "休息"),), (Message("assistant", "去医院"), *dialogue([("好", "再见")])))
    units, _ = encode(tokenizer, PreferenceRecord(prompt, responses, (3.0, 1.0)), 200, "error")
    head = render_prompt(prompt, ZIYA, tokenizer)
    assert units[0].ranks == (1, 0)
    for row, response in zip(units[0].rows, responses, strict=True):
        assert list(row[0].ids) == head
        assert ids(row) == ids(tuple(render((*prompt, *response), ZIYA, tokenizer)))
        assert ids(row)[-1] == tokenizer.eos_id


@settings(max_examples=80)
@given(
    pairs=pairs_of_turns,
    question=content,
    answers=st.lists(content, min_size=2, max_size=4, unique=True),
    room=st.integers(40, 90),
)
def test_truncated_ranking_fits_and_still_shares_its_prompt(
    tokenizer: SentencePieceTokenizer, pairs: list, question: str, answers: list[str], room: int
) -> None:
    prompt = (*dialogue(pairs), Message("user", question))
    responses = tuple((Message("assistant", answer),) for answer in answers)
    record = PreferenceRecord(prompt, responses, tuple(float(i) for i in range(len(answers))))
    units, counts = encode(tokenizer, record, room, "truncate")
    (unit,) = units
    assert len({row[0].ids for row in unit.rows}) == 1
    assert all(len(ids(row)) <= room for row in unit.rows)
    assert all(row[1].target for row in unit.rows)
    whole, counts_whole = encode(tokenizer, record, 10_000, "error")
    assert counts_whole.shortened == 0
    assert (unit == whole[0]) == (counts.shortened == 0)


@settings(max_examples=100)
@given(pairs=pairs_of_turns, question=content, room=st.integers(14, 60))
def test_truncated_prompt_drops_the_oldest_exchanges_and_keeps_its_frame(
    tokenizer: SentencePieceTokenizer, pairs: list[tuple[str, str]], question: str, room: int
) -> None:
    messages = (*dialogue(pairs), Message("user", question))
    units, _ = encode(tokenizer, PromptRecord(messages), room, "truncate")
    got = ids(units[0].rows[0])
    assert len(got) <= room
    candidates = [render_prompt(messages[2 * k :], ZIYA, tokenizer) for k in range(len(pairs) + 1)]
    longest_that_fits = next((c for c in candidates if len(c) <= room), None)
    if longest_that_fits is not None:
        assert got == longest_that_fits
    else:  # the question itself was cut: as many characters as fit
        cut = [render_prompt([Message("user", question[:n])], ZIYA, tokenizer) for n in range(1, len(question))]
        assert got == [c for c in cut if len(c) <= room][-1]


def test_dialogue_without_an_answer_at_its_end_is_a_bad_record(tokenizer: SentencePieceTokenizer) -> None:
    with pytest.raises(BadRecord, match="ends without an answer"):
        encode(tokenizer, DialogueRecord((Message("user", "头痛"),)), 50, "error")


def test_prompt_whose_frame_alone_is_too_long_is_a_bad_record(tokenizer: SentencePieceTokenizer) -> None:
    with pytest.raises(BadRecord, match="frame alone"):
        encode(tokenizer, PromptRecord((Message("user", "头痛" * 9),)), 5, "truncate")
