"""Packed text: what each sample holds, blending, splits, and resume."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_zj.config.data import CorpusConfig
from megatron_zj.data.batch import Batch
from megatron_zj.data.corpus import shares
from megatron_zj.data.errors import DataError
from megatron_zj.data.stream import Stream, build_stream
from megatron_zj.data.tokenizer import SentencePieceTokenizer

VOCAB = 400


def write(prefix: Path, documents: list[list[int]]) -> str:
    """An indexed dataset as megatron's own preprocessing writes it."""
    import numpy

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def numbered(lengths: list[int], first: int = 10) -> list[list[int]]:
    """Documents whose tokens are all different: 10, 11, 12 ... end to end."""
    ids = iter(range(first, first + sum(lengths)))
    return [[next(ids) for _ in range(length)] for length in lengths]


def stream(tokenizer: SentencePieceTokenizer, *files: str, seed: int = 0, split: str = "train", **fields) -> Stream:
    return build_stream(CorpusConfig(files=files, **fields), tokenizer, seed, split)


def rows(batch: Batch) -> list[list[int]]:
    return [row.tolist() for row in batch.tokens.split()]


lengths = st.lists(st.integers(1, 12), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 1)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=lengths, length=st.integers(2, 9), data=st.data())
def test_an_epoch_predicts_every_token_of_a_document_but_its_first_exactly_once(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, sizes: list[int], length: int, data: st.DataObject
) -> None:
    documents = numbered(sizes)
    cuts = data.draw(st.integers(0, len(documents)))  # over one or two files
    parts = [part for part in (documents[:cuts], documents[cuts:]) if sum(map(len, part)) > 1]
    files = [write(tmp_path / f"part{i}", part) for i, part in enumerate(parts)]
    documents = [document for part in parts for document in part]
    if not files:
        return
    source = stream(tokenizer, *files, sequence_length=length)
    batch = source.next(source.num_units, 0, 1)
    predicted = Counter((row[i - 1], row[i]) for row in rows(batch) for i in range(1, len(row)))
    assert predicted == Counter((d[i - 1], d[i]) for d in documents for i in range(1, len(d)))
    assert all(2 <= len(row) <= length for row in rows(batch))
    assert batch.per_token["loss_mask"].values.unique().tolist() in ([1], [])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=lengths, length=st.integers(2, 9))
def test_without_document_boundaries_a_sample_is_one_row_of_the_running_text(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, sizes: list[int], length: int
) -> None:
    file = write(tmp_path / "all", numbered(sizes))
    source = stream(tokenizer, file, sequence_length=length, respect_documents=False)
    text = list(range(10, 10 + sum(sizes)))
    expected = [text[i : i + length] for i in range(0, len(text) - 1, length - 1)]
    assert sorted(rows(source.next(source.num_units, 0, 1))) == expected


def test_samples_cross_shards_and_keep_document_boundaries(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    write(folder / "a", [[10, 11, 12], [13, 14]])
    write(folder / "b", [[15, 16, 17, 18]])
    source = stream(tokenizer, str(folder), sequence_length=8)
    assert sorted(rows(source.next(source.num_units, 0, 1))) == [[10, 11, 12], [13, 14], [15, 16, 17], [17, 18]]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(st.integers(0, 15), st.integers(1, 4)), min_size=1, max_size=4), weighted=st.booleans())
def test_resumed_under_any_world_size_meets_the_same_samples(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, steps: list[tuple[int, int]], weighted: bool
) -> None:
    files = [write(tmp_path / "x", numbered([9, 4, 7])), write(tmp_path / "y", numbered([5, 8], 100))]

    def fresh() -> Stream:
        return stream(tokenizer, *files, sequence_length=4, weights=(3.0, 1.0) if weighted else None)

    straight, state = fresh(), fresh().state_dict()
    for count, world_size in steps:
        expected = rows(straight.next(count, 0, 1))
        found: list[list[int]] = []
        for rank in range(world_size):
            own = fresh()
            own.load_state_dict(json.loads(json.dumps(state)))
            found += rows(own.next(count, rank, world_size))
        state = own.state_dict()
        assert found == expected


def test_blend_takes_weights_and_runs_each_dataset_through_its_own_epochs(
    tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    """8 and 16 samples at 3 : 1 give 18 and 6 of 24 an epoch: the first comes round 2.25 times, evenly."""
    files = [write(tmp_path / "x", [list(range(10, 19))]), write(tmp_path / "y", [list(range(100, 117))])]
    source = stream(tokenizer, *files, sequence_length=2, weights=(3.0, 1.0))
    assert source.num_units == 24
    drawn = [Counter(row[0] for row in rows(source.next(24, 0, 1))) for _ in range(4)]
    assert [sum(n for token, n in epoch.items() if token < 100) for epoch in drawn] == [18] * 4
    total = sum(drawn, Counter())
    assert sorted(total[token] for token in range(10, 18)) == [9] * 8  # 4 x 18 / 8
    assert sum(total[token] for token in range(100, 116)) == 24
    assert max(total[token] for token in range(100, 116)) <= 2
    assert len(total) == 24


def test_shares_are_largest_remainders() -> None:
    assert shares(10, [1, 1, 1]) in ([4, 3, 3], [3, 4, 3], [3, 3, 4])
    assert shares(24, [3, 1]) == [18, 6]
    assert shares(7, [0, 2]) == [0, 7]


def test_validation_is_the_last_documents_and_never_trained(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    file = write(tmp_path / "x", numbered([10] * 10))
    train = stream(tokenizer, file, sequence_length=7, validation_fraction=0.25)
    held_out = stream(tokenizer, file, sequence_length=7, validation_fraction=0.25, split="validation")
    trained = {token for row in rows(train.next(train.num_units, 0, 1)) for token in row}
    validated = [token for row in rows(held_out.next(held_out.num_units, 0, 1)) for token in row]
    assert trained == set(range(10, 90))
    assert set(validated) == set(range(90, 110))
    assert validated == sorted(validated)  # stored order
    assert stream(tokenizer, file, sequence_length=7, split="validation") is None


def test_ids_outside_the_vocabulary_name_the_file(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    file = write(tmp_path / "x", [[10, tokenizer.vocab_size, 11]])
    with pytest.raises(
        DataError, match=rf"x\.bin holds token id {tokenizer.vocab_size}, outside(.|\n)*tokenizer\.path"
    ):
        stream(tokenizer, file).next(1, 0, 1)


def test_describe_names_the_document_of_a_sample(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    file = write(tmp_path / "x", numbered([4, 4, 4]))
    source = stream(tokenizer, file, sequence_length=5)
    batch = source.next(source.num_units, 0, 1)
    for row, draw in zip(rows(batch), batch.per_row["draw"].tolist(), strict=True):
        begins = {10: 0, 14: 1, 18: 2}  # samples begin at tokens 10, 14 and 18
        if row[0] in begins:
            assert source.describe(draw) == f"{file}.bin, document {begins[row[0]]} of its dataset"


def test_damaged_or_missing_datasets_are_named(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    file = Path(write(tmp_path / "x", numbered([9])))
    raw = tmp_path / "raw.txt"
    raw.write_text("头痛")
    (tmp_path / "none").mkdir()
    for name, message in ((raw, "zj prepare data.files"), (tmp_path / "none", "neither a prepared folder")):
        with pytest.raises(DataError, match=message):
            stream(tokenizer, str(name))
    content = Path(f"{file}.bin").read_bytes()
    Path(f"{file}.bin").write_bytes(content[:-4])
    with pytest.raises(DataError, match=r"x\.bin has 32 bytes where its index expects 36"):
        stream(tokenizer, str(file))
    Path(f"{file}.bin").unlink()
    with pytest.raises(DataError, match=r"x\.bin is missing"):
        stream(tokenizer, str(file))
    Path(f"{file}.bin").write_bytes(content)
    Path(f"{file}.idx").write_bytes(b"no index")
    with pytest.raises(DataError, match=r"x\.idx is not a readable index"):
        stream(tokenizer, str(file))


def test_settings_that_cannot_work_are_named(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    file = write(tmp_path / "x", numbered([9]))
    for fields, message in (
        ({"weights": (1.0, 1.0)}, "2 weights, 1 files"),
        ({"weights": (0.0,)}, "not all 0"),
    ):
        with pytest.raises(DataError, match=message):
            stream(tokenizer, file, **fields)
    with pytest.raises(DataError, match="has no text for training"):  # a single document cannot be split
        stream(tokenizer, file, validation_fraction=0.5)
