"""Files to raw items: containers, encodings, and errors that name the file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zj.data.errors import DataError
from megatron_zj.data.formats.reading import Item, container, detect_encoding, read_items, read_lines

RECORDS = [{"text": "发热，咳嗽"}, {"text": "头痛\n两天"}, {"text": 'a,b"c'}]


def values(path: Path) -> list:
    return [item.value for item in read_items(path)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_every_container_and_encoding_gives_the_same_records(tmp_path: Path, encoding: str, suffix: str) -> None:
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
    table = "text\n" + "".join('"' + record["text"].replace('"', '""') + '"\n' for record in RECORDS)
    contents = {
        "lines.jsonl": lines,
        "lines.json": lines,
        "array.json": json.dumps(RECORDS, ensure_ascii=False, indent=2),
        "mapping.json": json.dumps({str(i): r for i, r in enumerate(RECORDS)}, ensure_ascii=False),
        "table.csv": table,
        "table.tsv": table,
    }
    for name, content in contents.items():
        path = tmp_path / f"{name}{suffix}"
        data = content.encode(encoding)
        path.write_bytes(gzip.compress(data) if suffix else data)
        assert values(path) == RECORDS, name


def test_parquet_gives_the_same_records(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    assert values(path) == RECORDS
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match=r"rows\.parquet is no readable parquet"):
        values(path)


def test_one_object_is_one_record_however_it_is_printed(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    for content in (json.dumps(RECORDS[0]), json.dumps(RECORDS[0], indent=4)):
        path.write_text(content, encoding="utf-8")
        assert values(path) == [RECORDS[0]]


def test_line_numbers_are_those_an_editor_shows(tmp_path: Path) -> None:
    array = tmp_path / "a.json"
    array.write_text('[\n {"text":\n  "x"},\n\n {"text": "y"}, {"text": "z"}\n]\n')
    assert [item.line for item in read_items(array)] == [2, 5, 5]
    mapping = tmp_path / "m.json"
    mapping.write_text('\n{"a": {"text":\n  "x"},\n\n "b": {"text": "y"},\n"c":\n {"text": "z"}}\n')
    assert [item.line for item in read_items(mapping)] == [2, 5, 7]
    table = tmp_path / "t.csv"
    table.write_text('text,b\n"one\ntwo",1\nthree,2\n')
    assert [item.line for item in read_items(table)] == [2, 4]
    lines = tmp_path / "l.jsonl"
    lines.write_text('{"text": "x"}\n\n{"text": \n{"text": "y"}\n')
    found = list(read_items(lines))
    assert [(item.line, item.error is None) for item in found] == [(1, True), (3, False), (4, True)]


def test_cells_with_line_breaks_and_quotes_survive(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes('ask,answer\r\n"头痛\r\n两天","说""休息"""\r\n'.encode("gb18030"))
    assert values(path) == [{"ask": "头痛\r\n两天", "answer": '说"休息"'}]


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("a.jsonl", '{"text": "x", "text": "y"}\n{"text": "z"}', [1, 2]),
        ("a.json", '[{"text": "x",\n"text": "y"},\n{"text": "z"}]', [1, 3]),
        ("a.json", '{"p": {"text": "x", "text": "y"},\n"q": {"text": "z"}}', [1, 2]),
    ],
)
def test_an_object_with_one_key_twice_is_a_bad_record(tmp_path: Path, name: str, content: str, lines: list) -> None:
    path = tmp_path / name
    path.write_text(content)
    first, second = read_items(path)
    assert first.error is not None
    assert first.error.reason == "the key 'text' stands twice in one object"
    assert second.value == {"text": "z"}
    assert [first.line, second.line] == lines


def test_records_under_one_name_are_all_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"p": {"text": "x"}, "p": {"text": "y"}}')
    assert values(path) == [{"text": "x"}, {"text": "y"}]


def test_a_row_with_other_cells_than_the_header_is_a_bad_record(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n1,2,3\n3,4\n")
    found = list(read_items(path))
    assert [item.value for item in found] == [{"a": "1", "b": "2"}, None, {"a": "3", "b": "4"}]
    assert found[1].error is not None
    assert "3 cells under 2 column names" in found[1].error.reason


@pytest.mark.parametrize("line", [b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_a_line_beyond_all_measure_is_a_bad_record_and_the_next_is_read(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(line + b'\n{"text": "x"}\n')
    first, second = read_items(path)
    assert first.error is not None
    assert "JSON beyond all measure" in first.error.reason
    assert second == Item(2, {"text": "x"})


def test_parquet_text_in_another_encoding_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    column = pyarrow.array(["发热".encode("gb18030")], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    with pytest.raises(DataError, match=r"rows\.parquet is no readable parquet file: 'utf-8' codec"):
        values(path)


def test_times_that_python_cannot_hold_do_not_matter_as_a_column_and_name_the_file_inside_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    far, fine = (pyarrow.array([(1 << 62) + 1]).view(pyarrow.timestamp(unit)) for unit in ("us", "ns"))
    pyarrow.parquet.write_table(pyarrow.table({"far": far, "text": ["发热"], "fine": fine}), path)
    assert values(path) == [{"text": "发热"}]
    pyarrow.parquet.write_table(pyarrow.table({"turns": pyarrow.StructArray.from_arrays([far], ["seen"])}), path)
    with pytest.raises(DataError, match=r"rows\.parquet, in a row after 0: (.|\n)*-> leave out the column"):
        values(path)


def test_parquet_with_one_column_name_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, ["output", "output"]), path)
    with pytest.raises(DataError, match=r"rows\.parquet: two columns are called 'output'"):
        values(path)


def test_lines_are_read_without_their_ends(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes("一\r\n二\n\n三".encode("gb18030"))
    assert list(read_lines(path)) == [(1, "一"), (2, "二"), (3, ""), (4, "三")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.docx", b"x", r"one of .json, .jsonl, .csv, .tsv, .parquet, .txt"),
        ("a.json", "头痛".encode("utf-16"), "neither UTF-8 nor GB18030"),
        ("a.json", b"\xff\xff\xff", "neither UTF-8 nor GB18030"),
        ("a.json", b'[{"text": "x"},\n{"text" "y"}]', r"a.json, line 2, column 9"),
        ("a.json", b'[{"text": "x"}\n{"text": "y"}]', r"a.json, line 2: expected ',' or ']'"),
        ("a.json", b'[{"text": "x"},\n', r"a.json, line 2"),
        ("a.json", b'[{"text": "x"}]\n\n[{"text": "y"}]', r"a.json, line 3: there is more after the end"),
        ("a.json", b'[{"text": "x"}] and garbage {', r"a.json, line 1: there is more after the end"),
        ("a.json", b'[{"text": "x"}]\n[{"text": "y"}]\n', r"a.json, line 2: there is more after the end"),
        ("a.json", b'{\n"text": "x"}\n{\n"text": "y"}\n', r"a.json, line 3: there is more after the end"),
        ("a.json", b'"x"\n"y"', r"a.json, line 2: there is more after the end"),
        ("a.json", b'{\n1: {"text": "x"}}', r"a.json, line 2: a name in double quotes"),
        ("a.json", b'{"a"\n{"text": "x"}}', r"a.json, line 2: expected ':', found '{'"),
        ("a.jsonl", b'{"text": "x"}\n' * 99999 + b'{"text": "\0"}\n{}', r"a zero byte in line 100000, as"),
        ("a.json", b'{\n"text": ', "a.json, line 2"),
        (
            "a.jsonl",
            b'{"text": "x"}\n' * 99999 + '{"text": "头"}\n'.encode() * 99999 + '{"text": "咳"}\n'.encode("gb18030"),
            r"a.jsonl is neither UTF-8 .*utf-8-sig: invalid .* in line 199999; gb18030: .* in line 100000\)",
        ),
        ("a.json", "头痛".encode()[:-1], r"utf-8-sig: unexpected end of data in line 1; gb18030: "),
        ("a.jsonl.gz", b"not gzip", "a.jsonl.gz is no complete gzip"),
        # the time would be in the test's name, and two workers that collect in different seconds would not agree
        ("b.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:40], "b.jsonl.gz is no complete gzip"),
        ("a.csv", b'a,b\n"1,2\n', r"a.csv, line 2"),
        ("a.csv", b"a,b,a\n1,2,3\n", r"a.csv, line 1: two columns are called 'a'"),
        ("a.csv.gz", gzip.compress(b"", mtime=0), r"a.csv.gz, line 1: no header"),
        ("a.parquet.gz", b"PAR1", r"a.parquet.gz: parquet is compressed inside and not read from .gz"),
        ("a.json", b"[" * 100_000, "a.json, line 1: maximum recursion depth"),
        ("a.json", b'{"a": ' * 100_000, "a.json, line 1: maximum recursion depth"),
        ("a.json", b'[\n{"a": ' + b"9" * 5000 + b"}]", "a.json, line 2: Exceeds the limit"),
        ("a.txt", b"text", "a.txt: records are wanted"),
    ],
)
def test_unreadable_files_are_named_with_what_to_change(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        values(path)
    assert "\n  -> " in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json does not exist"):
        values(tmp_path / "none.json")


def test_encoding_is_decided_by_the_whole_file(tmp_path: Path) -> None:
    """A file that begins as ASCII for more than one buffer, with GB18030 at its end."""
    path = tmp_path / "late.txt"
    path.write_bytes(b"a" * (1 << 20) + b"\n" + "发热咳嗽".encode("gb18030"))
    assert detect_encoding(path) == "gb18030"
    path.write_bytes(b"a" * ((1 << 20) - 1) + "头痛".encode())  # a character across the buffer's edge
    assert detect_encoding(path) == "utf-8-sig"


def test_container_looks_through_gz() -> None:
    assert container(Path("x.v1.JSONL.gz")) == ".jsonl"
    with pytest.raises(DataError, match="unknown kind"):
        container(Path("x.gz"))


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab头", min_size=1), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=80)
@given(records=st.lists(plain, max_size=4), indent=st.none() | st.integers(0, 3))
def test_any_json_array_is_read_as_json_reads_it(tmp_path: Path, records: list, indent: int | None) -> None:
    path = tmp_path / "any.json"
    path.write_text(json.dumps(records, ensure_ascii=False, indent=indent), encoding="utf-8")
    assert values(path) == records


@settings(max_examples=80)
@given(
    data=st.binary(min_size=1, max_size=60), name=st.sampled_from(["x.json", "x.jsonl", "x.csv", "x.tsv", "x.jsonl.gz"])
)
def test_any_bytes_give_items_or_a_data_error(tmp_path: Path, data: bytes, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    named = str(path)
    try:
        items = list(read_items(path))
    except DataError as error:
        items, named = [], str(error)
    assert str(path) in named
    assert all(isinstance(item, Item) for item in items)
