"""Streams of dialogues, rankings and prompts: order, resume at any point and world size, fields."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zj.config.data import ChatConfig, PreferenceConfig, PromptsConfig
from megatron_zj.data.batch import Batch
from megatron_zj.data.chat import TEMPLATES, Message, render
from megatron_zj.data.errors import DataError
from megatron_zj.data.stream import Stream, build_stream, share
from megatron_zj.data.tokenizer import SentencePieceTokenizer

NUM = 13  # records


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows")

    def write(name: str, records: list[dict]) -> None:
        (path / name).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")

    write(
        "chat.jsonl",
        [
            {"instruction": f"头痛{i}", "output": "休息" * (1 + i % 4), "history": [["发热", "多久？"]] * (i % 3)}
            for i in range(NUM)
        ],
    )
    write(
        "preference.jsonl",
        [
            {"prompt": f"头痛{i}", "responses": ["甲", "乙", "丙"][: 2 + i % 2], "ranks": [0, 1, 0][: 2 + i % 2]}
            for i in range(NUM)
        ],
    )
    write("prompts.jsonl", [{"prompt": f"头痛{i}"} for i in range(NUM)])
    return path


def stream(kind: str, folder: Path, tokenizer: SentencePieceTokenizer, seed: int = 1) -> Stream:
    configs = {"chat": ChatConfig, "preference": PreferenceConfig, "prompts": PromptsConfig}
    return build_stream(configs[kind](files=(str(folder / f"{kind}.jsonl"),)), tokenizer, seed)


def rows(batch: Batch) -> list[tuple]:
    """Everything a batch says, a tuple a row."""
    per_token = [field.split() for field in batch.per_token.values()]
    per_row = [field.tolist() for field in batch.per_row.values()]
    return [
        (tuple(tokens.tolist()), *(tuple(f[i].tolist()) for f in per_token), *(f[i] for f in per_row))
        for i, tokens in enumerate(batch.tokens.split())
    ]


@settings(max_examples=60)
@given(num_units=st.integers(0, 50), world_size=st.integers(1, 9))
def test_share_is_tensor_split(num_units: int, world_size: int) -> None:
    expected = [part.tolist() for part in torch.tensor_split(torch.arange(num_units), world_size)]
    assert [list(range(*share(num_units, rank, world_size))) for rank in range(world_size)] == expected


@settings(max_examples=40)
@given(
    kind=st.sampled_from(["chat", "preference", "prompts"]),
    steps=st.lists(st.tuples(st.integers(0, 2 * NUM), st.integers(1, 5)), min_size=1, max_size=5),
    stop=st.integers(0, 4),
)
def test_resumed_under_any_world_size_meets_the_same_rows(
    folder: Path, tokenizer: SentencePieceTokenizer, kind: str, steps: list[tuple[int, int]], stop: int
) -> None:
    """One rank reads straight through; against it: another world size each step, and a restart from JSON."""
    straight = stream(kind, folder, tokenizer)
    expected = [rows(straight.next(count, 0, 1)) for count, _ in steps]
    sample = stream(kind, folder, tokenizer)
    for step, (count, world_size) in enumerate(steps):
        if step == stop:
            state = json.loads(json.dumps(sample.state_dict()))
            sample = stream(kind, folder, tokenizer)
            sample.load_state_dict(state)
        state = sample.state_dict()
        found: list[tuple] = []
        after = []
        for rank in range(world_size):  # each rank its own stream object at the same state
            own = sample if rank == world_size - 1 else stream(kind, folder, tokenizer)
            own.load_state_dict(state)
            found += rows(own.next(count, rank, world_size))
            after.append(own.state_dict())
        assert found == expected[step]
        assert all(each == after[0] for each in after)
    assert sample.state_dict() == straight.state_dict()


def test_an_epoch_holds_every_record_once_and_epochs_differ(folder: Path, tokenizer: SentencePieceTokenizer) -> None:
    source = stream("prompts", folder, tokenizer)
    assert source.num_units == NUM
    epochs = [[row[0] for row in rows(source.next(NUM, 0, 1))] for _ in range(3)]
    assert len(set(epochs[0])) == NUM
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    other = [row[0] for row in rows(stream("prompts", folder, tokenizer, seed=2).next(NUM, 0, 1))]
    assert other != epochs[0]


def test_chat_rows_are_the_rendered_dialogues_with_their_mask(folder: Path, tokenizer: SentencePieceTokenizer) -> None:
    source = stream("chat", folder, tokenizer)
    batch = source.next(NUM, 0, 1)
    found = {(row[0], row[1]) for row in rows(batch)}
    expected = set()
    for i in range(NUM):
        earlier = [Message("user", "发热"), Message("assistant", "多久？")] * (i % 3)
        messages = (*earlier, Message("user", f"头痛{i}"), Message("assistant", "休息" * (1 + i % 4)))
        spans = render(messages, TEMPLATES["ziya"], tokenizer)
        mask = tuple(int(span.target) for span in spans for _ in span.ids)
        expected.add((tuple(i for span in spans for i in span.ids), mask))
    assert found == expected


def test_ranking_stays_together_and_two_epochs_never_share_a_group(
    folder: Path, tokenizer: SentencePieceTokenizer
) -> None:
    source = stream("preference", folder, tokenizer)
    batch = source.next(3 * NUM, 0, 1)
    groups = batch.per_row["group"].tolist()
    assert groups == sorted(groups)
    assert len(set(groups)) == 3 * NUM
    for unit in batch.units():
        ranks = batch.per_row["rank"][unit].tolist()
        assert ranks in ([0, 1], [0, 1, 0])
        prompts = {tuple(batch.tokens.split()[row][: batch.per_row["prompt_length"][row]].tolist()) for row in unit}
        assert len(prompts) == 1


def test_sample_ids_count_draws(folder: Path, tokenizer: SentencePieceTokenizer) -> None:
    source = stream("prompts", folder, tokenizer)
    source.next(NUM - 2, 0, 1)
    batch = source.next(6, 1, 2)
    assert batch.per_row["sample_id"].tolist() == [NUM + 1, NUM + 2, NUM + 3]
    assert batch.per_row["prompt_length"].tolist() == batch.tokens.lengths.tolist()


def test_describe_names_the_file_and_line_of_a_draw(folder: Path, tokenizer: SentencePieceTokenizer) -> None:
    source = stream("prompts", folder, tokenizer)
    batch = source.next(4, 0, 1)
    for row, draw in zip(batch.tokens.split(), batch.per_row["draw"].tolist(), strict=True):
        place = source.describe(draw)
        line = int(place.rsplit(" ", 1)[1])
        assert place == f"{folder / 'prompts.jsonl'}, record at line {line}"
        assert f"头痛{line - 1}\n" in tokenizer.decode(row.tolist())


def test_empty_share_has_the_fields_of_a_full_one(folder: Path, tokenizer: SentencePieceTokenizer) -> None:
    for kind in ("chat", "preference", "prompts"):
        full = stream(kind, folder, tokenizer).next(1, 0, 2)
        empty = stream(kind, folder, tokenizer).next(1, 1, 2)
        assert empty.num_rows == 0
        assert list(empty.per_row) == list(full.per_row)
        assert list(empty.per_token) == list(full.per_token)
        for name, values in full.per_row.items():
            assert empty.per_row[name].dtype == values.dtype
        assert Batch.concat([full, empty]).num_rows == full.num_rows


def test_state_of_other_data_or_another_seed_is_refused(folder: Path, tokenizer: SentencePieceTokenizer) -> None:
    state = stream("chat", folder, tokenizer).state_dict()
    with pytest.raises(DataError, match="other data: checksum"):
        stream("prompts", folder, tokenizer).load_state_dict(state)
    with pytest.raises(DataError, match="seed was 1, is 2"):
        stream("chat", folder, tokenizer, seed=2).load_state_dict(state)


def test_validation_is_the_same_for_every_seed_and_disjoint_from_training(
    folder: Path, tokenizer: SentencePieceTokenizer
) -> None:
    config = ChatConfig(files=(str(folder / "chat.jsonl"),), validation_fraction=0.3)
    parts = []
    for seed in (0, 1):
        train, held_out = build_stream(config, tokenizer, seed), build_stream(config, tokenizer, seed, "validation")
        assert held_out is not None
        assert train.num_units + held_out.num_units == NUM
        assert held_out.num_units == 4
        parts.append(([r[0] for r in rows(held_out.next(4, 0, 1))], {r[0] for r in rows(train.next(NUM - 4, 0, 1))}))
    assert parts[0] == parts[1]
    assert not set(parts[0][0]) & parts[0][1]


def test_validation_files_are_read_in_their_order(folder: Path, tokenizer: SentencePieceTokenizer) -> None:
    name = str(folder / "chat.jsonl")
    held_out = build_stream(ChatConfig(files=(name,), validation_files=(name,)), tokenizer, 0, "validation")
    assert held_out is not None
    assert [held_out.describe(draw).rsplit(" ", 1)[1] for draw in range(3)] == ["1", "2", "3"]
    assert build_stream(ChatConfig(files=(name,)), tokenizer, 0, "validation") is None
    assert build_stream(PromptsConfig(files=(name,)), tokenizer, 0, "validation") is None


def test_bad_records_stop_or_are_counted(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"instruction": "问", "output": "答"}\n{"instruction": "问", "output": ""}\nnot json\n')
    with pytest.raises(
        DataError, match=r"bad\.jsonl, record at line 2, field 'output': the text is empty\n  -> .*skip"
    ):
        build_stream(ChatConfig(files=(str(path),)), tokenizer, 0)
    with caplog.at_level("WARNING"):
        kept = build_stream(ChatConfig(files=(str(path),), on_bad_record="skip"), tokenizer, 0)
    assert kept.num_units == 1
    assert "left out: 2 bad" in caplog.text
    assert "record at line 3: the line is not JSON" in caplog.text
    path.write_text('{"instruction": "问", "output": ""}\n')
    with pytest.raises(DataError, match="no usable unit"):
        build_stream(ChatConfig(files=(str(path),), on_bad_record="skip"), tokenizer, 0)


def test_settings_that_cannot_work_are_named(folder: Path, tokenizer: SentencePieceTokenizer) -> None:
    name = str(folder / "chat.jsonl")
    for config, message in (
        (ChatConfig(), r"data\.files is empty"),
        (PreferenceConfig(files=(name,)), "gives chat records, and no preference record"),
        (
            ChatConfig(files=(name,), max_length=8, overlong="error"),
            r"record at line 1: \d+ tokens, and data.max_length",
        ),
    ):
        with pytest.raises(DataError, match=message):
            build_stream(config, tokenizer, 0)
    plain = SentencePieceTokenizer(tokenizer.model.replace(b"<human>", b"<hamun>"), {})
    with pytest.raises(DataError, match=r"tokenizer\.special_tokens=\['<human>'\]"):
        build_stream(ChatConfig(files=(name,)), plain, 0)
    with pytest.raises(ValueError, match="rank"):
        stream("chat", folder, tokenizer).next(1, 2, 2)


@pytest.mark.parametrize(
    ("file", "kind", "expected"),
    [
        ("preference", "chat", ": each ranking gives a dialogue with its first best response; the others are unused"),
        ("preference", "prompts", ": each ranking gives its prompt; its responses are unused"),
        ("chat", "prompts", ": each dialogue gives a prompt: all but its last answer"),
        ("chat", "chat", None),
        ("preference", "preference", None),
    ],
)
def test_a_file_of_another_kind_is_used_and_one_line_says_how(
    folder: Path,
    tokenizer: SentencePieceTokenizer,
    caplog: pytest.LogCaptureFixture,
    file: str,
    kind: str,
    expected: str | None,
) -> None:
    configs = {"chat": ChatConfig, "preference": PreferenceConfig, "prompts": PromptsConfig}
    path = folder / f"{file}.jsonl"
    with caplog.at_level("INFO", logger="megatron_zj"):
        assert build_stream(configs[kind](files=(str(path),)), tokenizer, 1).num_units == NUM
    told = [record.getMessage() for record in caplog.records if " for data.kind=" in record.getMessage()]
    assert [(line.startswith(f"{path} ("), line.endswith(str(expected))) for line in told] == (
        [(True, True)] if expected else []
    )
