"""Input formats: each as its publisher writes it, to canonical records."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

import megatron_zj.data.formats  # noqa: F401
from megatron_zj.config.data import FormatName, Template
from megatron_zj.data.chat import TEMPLATES, Message, check_order
from megatron_zj.data.errors import BadRecord, DataError
from megatron_zj.data.formats.reading import Item
from megatron_zj.data.formats.registry import FORMATS, choose_format, convert_any, convert_item, raw_items
from megatron_zj.data.records import DialogueRecord, PreferenceRecord, PromptRecord, TextRecord


def turns(*contents: str) -> tuple[Message, ...]:
    return tuple(Message("assistant" if i % 2 else "user", content) for i, content in enumerate(contents))


def answers(*contents: str) -> tuple[tuple[Message, ...], ...]:
    return tuple((Message("assistant", content),) for content in contents)


CASES: list[tuple[str, Any, Any]] = [
    ("text_records", {"text": " 发热 "}, TextRecord("发热")),
    ("tcm_classics", {"title": "书", "section": "上", "author": "某", "text": "正文"}, TextRecord("书 上\n正文")),
    ("strings", "药品说明", TextRecord("药品说明")),
    ("alpaca", {"instruction": "问", "input": "", "output": "答"}, DialogueRecord(turns("问", "答"))),
    ("alpaca", {"instruction": "问", "input": "补充", "output": "答"}, DialogueRecord(turns("问\n补充", "答"))),
    (  # CMtMedQA
        "alpaca",
        {"id": "1", "instruction": "三", "input": "", "output": "四", "history": [["一", "二"]], "cate1": "内科"},
        DialogueRecord(turns("一", "二", "三", "四")),
    ),
    ("alpaca", {"instruct": "危险的问题", "output": "拒绝"}, DialogueRecord(turns("危险的问题", "拒绝"))),
    (  # Huatuo-26M test set
        "alpaca",
        {"id": "", "instruction": ["问"], "input": "", "output": ["答"]},
        DialogueRecord(turns("问", "答")),
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]},
        DialogueRecord(turns("问", "答")),
    ),
    (
        "disc",
        {"_id": 1, "conversation": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]},
        DialogueRecord(turns("问", "答")),
    ),
    (
        "cmdd",
        {
            "messages": [
                {"role": "doctor", "content": "在吗"},
                {"role": "patient", "content": "问"},
                {"role": "doctor", "content": "答"},
                {"role": "patient", "content": "谢谢"},
            ]
        },
        DialogueRecord(turns("问", "答")),
    ),
    (
        "cmdd_raw",
        {
            "dialogue-content": [
                {"speaker": "医生", "sentence": "你好"},
                {"speaker": "患者", "sentence": "问"},
                {"speaker": "患者", "sentence": "再问"},
                {"speaker": "医生", "sentence": "答"},
            ]
        },
        DialogueRecord(turns("问\n再问", "答")),
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]},
        DialogueRecord(turns("问", "答")),
    ),
    ("messages", {"messages": [{"role": "user", "content": "问"}]}, PromptRecord(turns("问"))),
    (
        "bentsao",
        {"instruction": " <user>: 一 <bot>: 二 <user>: 三", "input": "", "output": "四"},
        DialogueRecord(turns("一", "二", "三", "四")),
    ),
    (
        "toyhom",
        {"department": "心血管科", "title": "标题", "ask": "问题", "answer": "回答"},
        DialogueRecord(turns("标题\n问题", "回答")),
    ),
    (
        "toyhom",
        {"department": "心血管科", "title": "问题", "ask": "问题的全文", "answer": "回答"},
        DialogueRecord(turns("问题的全文", "回答")),
    ),
    ("turn_lists", {"prompt": ["一", "三"], "output": ["二", "四"]}, DialogueRecord(turns("一", "二", "三", "四"))),
    (
        "medicalgpt_reward",
        {"question": "问", "response_chosen": "好", "response_rejected": "坏"},
        PreferenceRecord(turns("问"), answers("好", "坏"), (0.0, 1.0)),
    ),
    (
        "pairs",
        {"id": "x", "prompt": "问", "chosen": "好", "rejected": "坏", "margin": 1},
        PreferenceRecord(turns("问"), answers("好", "坏"), (0.0, 1.0)),
    ),
    (
        "disc_ranked",
        {
            "prompt": "问",
            "candidates": [
                {"total": t, "conversation": [{"role": "patient", "content": "问"}, {"role": "doctor", "content": c}]}
                for t, c in ((20, "甲"), (18, "乙"), (20, "丙"))
            ],
        },
        PreferenceRecord(turns("问"), answers("甲", "乙", "丙"), (-20.0, -18.0, -20.0)),
    ),
    (
        "zhongjing_ranking",
        {
            "id": "0",
            "query": "三",
            "history": "[['一', '二']]",
            "rank1": "甲",
            "rank2": "乙",
            "rank3": "丙",
            "rank4": "丁",
        },
        PreferenceRecord(turns("一", "二", "三"), answers("甲", "乙", "丙", "丁"), (0.0, 1.0, 2.0, 3.0)),
    ),
    (
        "zhongjing_labels",
        {"query": "问", "history": [], "response_0": "甲", "response_1": "乙", "response_2": "丙", "ranks": [2, 3, 1]},
        PreferenceRecord(turns("问"), answers("甲", "乙", "丙"), (2.0, 3.0, 1.0)),
    ),
    (  # from a table, where lists are printed
        "zhongjing_labels",
        {"query": "问", "history": "[]", "response_0": "甲", "response_1": "乙", "ranks": "[2, 1]"},
        PreferenceRecord(turns("问"), answers("甲", "乙"), (2.0, 1.0)),
    ),
    (
        "best_first",
        {"instruction": "问", "output": ["好", "坏"]},
        PreferenceRecord(turns("问"), answers("好", "坏"), (0.0, 1.0)),
    ),
    (
        "ranked",
        {"prompt": "问", "responses": ["甲", "乙", "丙"], "ranks": [1, 0, 1]},
        PreferenceRecord(turns("问"), answers("甲", "乙", "丙"), (1.0, 0.0, 1.0)),
    ),
    (
        "ranked",
        {"messages": [{"role": "user", "content": "问"}], "responses": ["甲", "乙"]},
        PreferenceRecord(turns("问"), answers("甲", "乙"), (0.0, 1.0)),
    ),
    ("prompts", {"id": "x", "prompt": "问"}, PromptRecord(turns("问"))),
    ("questions", {"question": "问", "ICD-10": "x"}, PromptRecord(turns("问"))),
]


def texts_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Every text of a record, with its place."""
    if isinstance(value, str):
        yield path, value
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        yield from texts_in(inner, (*path, key))


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, value, _ in CASES])
def test_half_of_a_character_in_any_text_that_is_used_makes_a_bad_record(name: str, value: Any) -> None:
    plain = convert_any(Item(1, value), FORMATS[name])
    used = 0
    for path, text in texts_in(value):
        halved = copy.deepcopy([value])
        spot: Any = halved
        for key in (0, *path[:-1]) if path else ():
            spot = spot[key]
        spot[path[-1] if path else 0] = f"{text}\ud800"
        try:
            found: Any = convert_any(Item(1, halved[0]), FORMATS[name])
        except BadRecord:
            used += 1
        else:
            assert found == plain, path  # a text that the record does not use
    assert used


@pytest.mark.parametrize(("name", "value", "expected"), CASES)
def test_record_is_detected_and_converted(tmp_path: Path, name: str, value: Any, expected: Any) -> None:
    path = tmp_path / "one.json"
    path.write_text(json.dumps([value], ensure_ascii=False), encoding="utf-8")
    form = choose_format(path, "auto")
    assert form.name == name
    assert [convert_any(item, form) for item in raw_items(path, form)] == [expected]


def test_a_configuration_knows_every_format_and_template_by_name() -> None:
    assert get_args(FormatName) == ("auto", *FORMATS)
    assert get_args(Template) == tuple(TEMPLATES)


def test_every_structured_format_has_a_case() -> None:
    assert {name for name, form in FORMATS.items() if form.items is None} == {name for name, _, _ in CASES}


REMEDI = """\
<|endoftext|> <|context|> <|endofcontext|> <|currentuser|> 一 <|endofcurrentuser|> <|intent|> <|endofintent|> \
<|knowledge|>  <|endofknowledge|> <|action|> <|endofaction|> <|response|> 二 <|endofresponse|>  <|endoftext|>
<|endoftext|> <|context|> <|user|> 一 <|system|> 二<|endofcontext|> <|currentuser|> 三 <|endofcurrentuser|> \
<|response|> 四 <|endofresponse|>  <|endoftext|>

<|endoftext|> <|context|> <|endofcontext|> <|currentuser|> 五 <|endofcurrentuser|> <|response|> 六 <|endofresponse|>
"""


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("text", "第一篇\n第二行\n\n\n第二篇\n", [(1, TextRecord("第一篇\n第二行")), (5, TextRecord("第二篇"))]),
        (
            "tcm_book",
            "<篇名>书\n书名：书\n作者：某\n\n<目录>\n\n<篇名>上\n\n属性：一。\n二。\n<篇名>下\n属性：三。\n",
            [(7, TextRecord("上\n一。\n二。")), (11, TextRecord("下\n三。"))],
        ),
        (
            "remedi",
            REMEDI,
            [(2, DialogueRecord(turns("一", "二", "三", "四"))), (4, DialogueRecord(turns("五", "六")))],
        ),
    ],
)
def test_text_file_is_detected_and_converted(tmp_path: Path, name: str, content: str, expected: list) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes(content.encode("gb18030"))
    form = choose_format(path, "auto")
    assert form.name == name
    assert [(item.line, convert_any(item, form)) for item in raw_items(path, form)] == expected


def test_lines_format_takes_a_document_a_line(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("一\n\n二\n", encoding="utf-8")
    form = choose_format(path, "lines")
    assert [convert_any(item, form) for item in raw_items(path, form)] == [TextRecord("一"), TextRecord("二")]


@pytest.mark.parametrize("ranks", list(itertools.permutations(range(1, 5))))
def test_every_ranking_of_an_annotator_stays_with_its_responses(ranks: tuple[int, ...]) -> None:
    """``ranks[i]`` is the place of response i.  Ordering the responses by indexing with the ranks is another matter,
    wrong for 14 of the 24 rankings."""
    value = {"query": "问", "history": [], **{f"response_{i}": f"第{rank}名" for i, rank in enumerate(ranks)}}
    record = convert_any(Item(1, {**value, "ranks": list(ranks)}), FORMATS["zhongjing_labels"])
    assert isinstance(record, PreferenceRecord)
    said = [response[0].content for response in record.responses]
    assert [said[record.dense_ranks().index(place)] for place in range(4)] == ["第1名", "第2名", "第3名", "第4名"]


def test_ranks_are_dense_and_ties_stay_ties() -> None:
    record = PreferenceRecord(turns("问"), answers("甲", "乙", "丙", "丁"), (-18.0, -20.0, -18.0, -3.0))
    assert record.dense_ranks() == (1, 0, 1, 2)


CANDIDATE = {"conversation": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]}
ASKED, SAID = {"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}
LABELS = {"query": "问", "history": [], "response_0": "甲", "response_1": "乙", "ranks": [1, 2]}


@pytest.mark.parametrize(
    ("name", "value", "field", "reason"),
    [
        ("alpaca", {"instruction": "问", "output": ""}, "output", "empty"),
        ("alpaca", {"instruction": "问", "output": 3}, "output", "found int"),
        ("alpaca", {"instruction": "问", "output": "答", "history": [["一"]]}, "history[0]", "[question, answer]"),
        ("sharegpt", {"conversations": [{"from": "bob", "value": "问"}]}, "conversations[0].from", "'bob'"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "conversations[0]", "'from' and 'value'"),
        ("cmdd", {"messages": [{"role": "doctor", "content": "在吗"}]}, "messages", "followed by an answer"),
        ("bentsao", {"instruction": "你好 <user>: 问", "output": "答"}, "instruction", "text before"),
        ("turn_lists", {"prompt": ["一", "三"], "output": ["二"]}, "output", "2 questions and 1 answers"),
        ("ranked", {"prompt": "问", "responses": ["甲"], "ranks": [0]}, "responses", "at least two"),
        ("ranked", {"prompt": "问", "responses": ["甲", "乙"], "ranks": [0]}, "ranks", "1 ranks for 2"),
        ("ranked", {"prompt": "问", "responses": ["甲", "乙"], "ranks": [1, 1]}, "ranks", "same rank"),
        ("ranked", {"prompt": "问", "responses": ["甲", "乙"], "ranks": ["a", "b"]}, "ranks", "numbers"),
        ("ranked", {"prompt": "问", "responses": ["甲", "甲"], "ranks": [0, 1]}, "responses", "two equal"),
        ("ranked", {"prompt": "问", "responses": ["甲", "乙"], "ranks": [0, float("nan")]}, "ranks", "finite"),
        ("disc_ranked", {"prompt": "问", "candidates": [CANDIDATE | {"total": "high"}] * 2}, None, "'high'"),
        ("disc_ranked", {"prompt": "问", "candidates": [CANDIDATE | {"total": 10**400}] * 2}, None, "too large"),
        ("zhongjing_labels", LABELS | {"ranks": "第一"}, "ranks", "neither JSON"),
        ("zhongjing_labels", LABELS | {"ranks": "[1, 'b']"}, None, "'b'"),
        ("zhongjing_labels", LABELS | {"history": "[" * 100000}, "history", "neither JSON"),
        ("zhongjing_ranking", {"query": "问", "history": "os.system()", "rank1": "甲"}, "history", "neither JSON"),
        ("text_records", {"text": None}, "text", "found NoneType"),
        ("toyhom", {"title": "x", "ask": "y"}, None, "no 'answer'"),
        ("alpaca", None, None, "the record is null"),
        ("messages", {"messages": []}, "messages", "list of turns is empty"),
        ("turn_lists", {"prompt": [], "output": []}, "prompt", "list of questions is empty"),
        ("disc", CANDIDATE | {"conversation": [ASKED]}, "conversation", "followed by an answer"),
        ("ranked", {"prompt": "问", "responses": ["甲", []]}, "responses[1]", "list of turns is empty"),
        ("ranked", {"prompt": "问", "responses": ["甲", [ASKED]]}, "responses[1][0].role", "turn 1 is from 'user'"),
        ("ranked", {"prompt": "问", "responses": ["甲", [SAID, ASKED]]}, "responses[1]", "end with the assistant"),
    ],
)
def test_bad_record_names_its_field(name: str, value: Any, field: str | None, reason: str) -> None:
    with pytest.raises(BadRecord) as caught:
        convert_any(Item(1, value), FORMATS[name])
    assert caught.value.field == field
    assert reason in caught.value.reason


def test_records_serve_other_kinds_where_they_can() -> None:
    ranking, dialogue = FORMATS["ranked"], FORMATS["alpaca"]
    ranked = Item(1, {"prompt": "问", "responses": ["坏", "好"], "ranks": [1, 0]})
    talked = Item(1, {"instruction": "三", "output": "四", "history": [["一", "二"]]})
    assert convert_item(ranked, ranking, "prompts") == PromptRecord(turns("问"))
    assert convert_item(ranked, ranking, "chat") == DialogueRecord(turns("问", "好"))
    assert convert_item(talked, dialogue, "prompts") == PromptRecord(turns("一", "二", "三"))
    assert convert_item(talked, dialogue, "corpus") == TextRecord("一\n二\n三\n四")
    with pytest.raises(BadRecord, match="gives chat records, and no preference record"):
        convert_item(talked, dialogue, "preference")
    asked = Item(7, {"messages": [{"role": "user", "content": "问"}]})
    with pytest.raises(BadRecord, match="ends with the user, so it has no answer") as caught:
        convert_item(asked, FORMATS["messages"], "chat")
    assert "x.jsonl, record at line 7: the dialogue ends" in str(caught.value.located("x.jsonl", 7))
    assert "add the answer, or set data.on_bad_record=skip" in str(caught.value.located("x.jsonl", 7))


def test_unknown_format_and_unknown_shape_list_the_formats(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"foo": 1, "bar": 2}\n')
    with pytest.raises(DataError, match=r"keys foo, bar(.|\n)*sharegpt(.|\n)*alpaca"):
        choose_format(path, "auto")
    with pytest.raises(DataError, match=r"data\.format: no format 'alpca'; did you mean 'alpaca'"):
        choose_format(path, "alpca")
    with pytest.raises(DataError, match=r"'remedi' does not read \.jsonl files"):
        choose_format(path, "remedi")
    path.write_text('{"text": "x"},\n' * 30)
    with pytest.raises(DataError, match=r"x\.jsonl, record at line 1: the line is not JSON \(Extra data"):
        choose_format(path, "auto")
    path.write_text('{\n[1]\n{"foo": 1}\n')
    with pytest.raises(DataError, match=r"x\.jsonl, record at line 2: no format matches it \(a list\)"):
        choose_format(path, "auto")
    path.write_text(json.dumps({f"key {number}": number for number in range(5000)}))
    with pytest.raises(DataError, match=r"\(5000 keys key 0, key 1, ") as caught:
        choose_format(path, "auto")
    assert max(map(len, str(caught.value).splitlines())) < 500
    path.write_text("\n")
    with pytest.raises(DataError, match=r"x\.jsonl holds no record"):
        choose_format(path, "auto")


@pytest.mark.parametrize(
    "first", ["null", "{}", '{"instruction": "x"}', '{"messages": null}', '{"messages": []}', '{"text": ""}', "{", "[]"]
)
def test_a_format_is_chosen_by_the_first_good_record(tmp_path: Path, first: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(first + '\n{"instruction": "问", "output": "答"}\n', encoding="utf-8")
    assert choose_format(path, "auto").name == "alpaca"


def test_where_no_record_is_good_the_first_that_looks_like_one_decides(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{}\n{"messages": []}\n{"instruction": "问", "output": ""}\n', encoding="utf-8")
    assert choose_format(path, "auto").name == "messages"


def test_converted_dialogues_are_in_order() -> None:
    for _name, _value, expected in CASES:
        if isinstance(expected, DialogueRecord):
            check_order(expected.messages)
