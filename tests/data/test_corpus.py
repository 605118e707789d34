"""Packed text: what each sample holds, blending, splits, and resume."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_zj.config.data import CorpusConfig
from megatron_zj.data import corpus
from megatron_zj.data.batch import Batch
from megatron_zj.data.corpus import shares
from megatron_zj.data.errors import DataError
from megatron_zj.data.sources import verify_inputs
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


@settings(max_examples=80)
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


@settings(max_examples=40)
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


@settings(max_examples=25)
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


@pytest.mark.parametrize("rank", [0, 1])
def test_without_a_manifest_every_id_is_looked_at_before_training(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks share the ids in chunks of four, over two files; a bad one is found by the rank that has it alone."""
    monkeypatch.setattr(corpus, "_CHUNK", 4)
    good, bad = write(tmp_path / "good", numbered([9, 3])), write(tmp_path / "bad", numbered([5]))
    config = CorpusConfig(files=(good, bad))
    verify_inputs(config, tokenizer, rank, 2)
    for position, finder in ((0, 1), (4, 0)):  # chunks: 4 4 4 of the good file, then 4 1 of the bad one
        for wrong in (tokenizer.vocab_size, -1):
            documents = numbered([5])
            documents[0][position] = wrong
            write(tmp_path / "bad", documents)
            if rank == finder:
                with pytest.raises(DataError, match=rf"bad\.bin holds token id {wrong}, outside the vocabulary"):
                    verify_inputs(config, tokenizer, rank, 2)
            else:
                verify_inputs(config, tokenizer, rank, 2)


def test_a_line_says_which_data_has_no_checksums(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "folder").mkdir()
    named, inside = write(tmp_path / "named", numbered([9])), write(tmp_path / "folder/inside", numbered([9]))
    config = CorpusConfig(files=(named, str(tmp_path / "folder")))
    with caplog.at_level("INFO", logger="megatron_zj"):
        verify_inputs(config, tokenizer, 1, 2)
        assert not caplog.records  # rank 0 says it once
        verify_inputs(config, tokenizer, 0, 2)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"no manifest of zj prepare: {named}, {tmp_path / 'folder'}; checked are")
    assert f"below {tokenizer.vocab_size}, not the contents nor which tokenizer wrote them" in line
    Path(f"{inside}.bin").write_bytes(Path(f"{inside}.bin").read_bytes()[:-4])
    with pytest.raises(DataError, match=r"inside\.bin has 32 bytes where its index expects 36"):
        verify_inputs(config, tokenizer)


def test_an_index_that_is_cut_short_anywhere_or_out_of_order_is_refused(
    tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    file = write(tmp_path / "x", numbered([4, 5]))
    index = Path(f"{file}.idx")
    whole = index.read_bytes()
    header, lengths, pointers = 34, 2 * 4, 2 * 8
    assert len(whole) == header + lengths + pointers + 3 * 8
    damaged = {whole[:length]: "" for length in range(len(whole))}
    damaged |= {whole + b"\0": "header announces"}
    for start, value, why in (
        (17, b"\x06", "its ids are no integers"),  # 8-byte floats
        (17, b"\x63", "its ids are no integers"),
        (26, bytes(8), "header announces"),  # no document, not even the end of the last
        (header, b"\5\0\0\0\4\0\0\0", "do not follow each other"),  # lengths of 5 and 4; pointers say 4 and 5
        (header + lengths + 8, b"\x0c", "do not follow each other"),  # the second sequence begins within the first
        (header + lengths + pointers, b"\1", "do not follow each other"),  # a first document that begins late
        (len(whole) - 8, b"\1", "documents do not end with its sequences"),
    ):
        damaged[whole[:start] + value + whole[start + len(value) :]] = why
    for content, why in damaged.items():
        index.write_bytes(content)
        with pytest.raises(DataError, match=rf"x\.idx is not a readable index: .*{why}"):
            stream(tokenizer, file)
    index.write_bytes(whole)
    assert stream(tokenizer, file).num_units == 1


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
