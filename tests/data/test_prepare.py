"""zj prepare: what it writes, interruption at any shard, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_zj.cli.prepare import main
from megatron_zj.config.data import ChatConfig, CorpusConfig, PreferenceConfig, TokenizerConfig
from megatron_zj.config.loader import ConfigError
from megatron_zj.data import prepare as module
from megatron_zj.data.errors import DataError
from megatron_zj.data.prepare import TextConfig, prepare
from megatron_zj.data.prepared import read_manifest, verify
from megatron_zj.data.stream import build_stream
from megatron_zj.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from tests.data.preparations import content, text_config


def test_shards_hold_the_documents_in_order(source: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    manifest = prepare(text_config(source, tmp_path / "out"))
    assert manifest.counts["records"] == manifest.counts["units"] == 40
    assert len(manifest.shards) > 3
    corpus = CorpusConfig(files=(str(tmp_path / "out"),), sequence_length=100_000)
    stream = build_stream(corpus, load_tokenizer(tmp_path / "out" / "tokenizer"), 0)
    rows = stream.next(1, 0, 1).tokens.split()
    texts = [f"头痛{i}，" + "发热咳嗽。" * (i % 5) for i in range(40)]
    assert [row.tolist() for row in rows] == [[1, *tokenizer.encode(text), 2] for text in texts]
    assert manifest.counts["tokens"] == sum(len(row) for row in rows)


def test_several_processes_write_what_one_writes(source: Path, tmp_path: Path) -> None:
    prepare(text_config(source, tmp_path / "one"))
    prepare(text_config(source, tmp_path / "two", workers=2))
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_interrupted_anywhere_it_continues_to_the_same_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    num_shards = len(prepare(text_config(source, whole)).shards)
    write, written = module._write_task, []
    for stop in range(num_shards):

        def interrupted(task: Any, stop: int = stop) -> Any:
            if task.name == f"{stop:06d}":
                (task.folder / "shards" / f".{task.name}.partial.bin").write_bytes(b"half")
                (task.folder / "shards" / f"{task.name}.bin").write_bytes(b"half")  # renamed, no sidecar yet
                raise KeyboardInterrupt
            written.append(task.name)
            return write(task)

        monkeypatch.setattr(module, "_write_task", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(text_config(source, out))
        assert not (out / "manifest.json").exists()
        with pytest.raises(DataError, match="not a finished preparation"):
            build_stream(CorpusConfig(files=(str(out),)), load_tokenizer(source / "tokenizer"), 0)
    monkeypatch.setattr(module, "_write_task", write)
    prepare(text_config(source, out))
    assert written == [f"{i:06d}" for i in range(num_shards - 1)]  # each shard was written once
    assert content(out) == content(whole)


def test_a_finished_preparation_is_not_done_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(text_config(source, tmp_path))
    before = content(tmp_path)
    monkeypatch.setattr(module, "_write_task", lambda task: pytest.fail("written again"))
    prepare(text_config(source, tmp_path))
    assert content(tmp_path) == before


def test_a_shard_cut_short_or_of_another_preparation_is_written_again(source: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    prepare(text_config(source, whole))
    prepare(text_config(source, out))
    shard = out / "shards" / "000001.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    prepare(text_config(source, out))
    assert content(out) == content(whole)
    files = (str(source / "b.jsonl"), str(source / "a.jsonl"))
    (out / "job.json").unlink()
    (out / "manifest.json").unlink()
    prepare(text_config(source, out, data=TextConfig(files=files)))
    prepare(text_config(source, tmp_path / "other", data=TextConfig(files=files)))
    assert content(out) == content(tmp_path / "other")


@pytest.mark.parametrize("kind", ["chat", "preference"])
def test_prepared_rows_equal_rows_read_raw(source: Path, tmp_path: Path, kind: str) -> None:
    name = str(source / {"chat": "chat.jsonl", "preference": "rm.jsonl"}[kind])
    fields = {"max_length": 30, "overlong": "split" if kind == "chat" else "truncate"}
    schema = {"chat": ChatConfig, "preference": PreferenceConfig}[kind]
    config = schema(files=(name,), **fields)
    prepare(text_config(source, tmp_path, data=config, shard_chars=40))
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    raw = build_stream(config, tokenizer, 3)
    prepared = build_stream(schema(files=(str(tmp_path),), **fields), tokenizer, 3)
    assert prepared.num_units == raw.num_units
    first, second = raw.next(raw.num_units, 0, 1), prepared.next(raw.num_units, 0, 1)
    assert first.tokens.values.tolist() == second.tokens.values.tolist()
    assert first.tokens.lengths.tolist() == second.tokens.lengths.tolist()
    for fields_of in ("per_token", "per_row"):
        own, other = getattr(first, fields_of), getattr(second, fields_of)
        assert list(own) == list(other)
        for key in own:
            pair = (own[key].values, other[key].values) if fields_of == "per_token" else (own[key], other[key])
            assert pair[0].tolist() == pair[1].tolist()
    split = {"validation_fraction": 0.3}
    held_out = [
        build_stream(schema(files=(file,), **fields, **split), tokenizer, 0, "validation")
        for file in (name, str(tmp_path))
    ]
    tokens = [each.next(each.num_units, 0, 1).tokens.values.tolist() for each in held_out if each is not None]
    assert tokens[0] == tokens[1]


def test_prepared_with_other_settings_or_tokenizer_is_refused(source: Path, tmp_path: Path) -> None:
    name = str(source / "chat.jsonl")
    prepare(text_config(source, tmp_path, data=ChatConfig(files=(name,), max_length=64)))
    tokenizer = load_tokenizer(source / "tokenizer")
    out = (str(tmp_path),)
    for config, message in (
        (ChatConfig(files=out, max_length=32), r"prepared with data\.max_length=64, not 32"),
        (ChatConfig(files=out, max_length=64, template="chimed_gpt"), r"prepared with data\.template=ziya"),
        (ChatConfig(files=(*out, name), max_length=64), "mixes prepared folders and raw files"),
        (PreferenceConfig(files=out, max_length=64), r"prepared with data\.kind=chat"),
        (CorpusConfig(files=out), r"prepared with data\.kind=chat"),
    ):
        with pytest.raises(DataError, match=message):
            build_stream(config, tokenizer, 0)
    other = load_tokenizer(source / "tokenizer", ["<x>"])
    with pytest.raises(DataError, match=r"another tokenizer(.|\n)*tokenizer\.path="):
        build_stream(ChatConfig(files=out, max_length=64), other, 0)


def test_another_preparation_needs_another_folder(source: Path, tmp_path: Path) -> None:
    prepare(text_config(source, tmp_path))
    with pytest.raises(DataError, match="holds a preparation of other files or settings"):
        prepare(text_config(source, tmp_path, shard_chars=999))


def test_a_preparation_without_a_finished_shard_gives_way_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    """As the complaint about a bad record advises: correct the record, or the settings, and run it again."""
    out, path = tmp_path / "out", tmp_path / "bad.jsonl"
    path.write_text('{"text": "头痛"}\n{"text": 3}\n', encoding="utf-8")
    data = TextConfig(files=(str(path),))
    with pytest.raises(DataError, match="correct the record, or set"):
        prepare(text_config(source, out, data=data))
    (out / "shards" / "000007.bin").write_bytes(b"half")
    skipping = TextConfig(files=data.files, on_bad_record="skip")
    other = TokenizerConfig(path=source / "tokenizer", special_tokens=("<x>",))
    config = replace(text_config(source, out, data=skipping), tokenizer=other)
    assert prepare(config).counts["bad"] == 1
    prepare(replace(config, out=tmp_path / "whole"))
    assert content(out) == content(tmp_path / "whole")
    path.write_text('{"text": "头痛"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="holds a preparation of other files or settings"):
        prepare(text_config(source, out, data=data))


def test_a_preparation_whose_folder_another_took_ends(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(*arguments: Any) -> list:
        monkeypatch.undo()
        prepare(text_config(source, tmp_path, shard_chars=999))
        return []

    monkeypatch.setattr(module, "encode_items", overtaken)
    with pytest.raises(DataError, match="another zj prepare has taken"):
        prepare(text_config(source, tmp_path))
    verify([tmp_path])


def test_a_tokenizer_of_somebody_else_in_the_folder_is_not_replaced(source: Path, tmp_path: Path) -> None:
    load_tokenizer(source / "tokenizer", ["<x>"]).save(tmp_path / "tokenizer")
    before = content(tmp_path)
    with pytest.raises(DataError, match=rf"^{tmp_path}/tokenizer.* another tokenizer"):
        prepare(text_config(source, tmp_path))
    assert content(tmp_path) == before
    own = TokenizerConfig(path=tmp_path / "tokenizer")
    prepare(replace(text_config(source, tmp_path), tokenizer=own))
    assert before.items() <= content(tmp_path).items()


def test_full_disk_keeps_finished_shards_and_says_what_to_do(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = module.write_shard

    def full(prefix: Path, *arguments: Any) -> None:
        if prefix.name == ".000002.partial":
            Path(f"{prefix}.bin").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(prefix, *arguments)

    monkeypatch.setattr(module, "write_shard", full)
    with pytest.raises(DataError, match=r"000002 failed: No space left(.|\n)*make room(.|\n)*finished shards are kept"):
        prepare(text_config(source, tmp_path))
    assert not list((tmp_path / "shards").glob(".*partial*"))
    assert (tmp_path / "shards" / "000001.json").exists()
    assert not (tmp_path / "manifest.json").exists()


def test_a_damaged_sidecar_is_a_shard_to_write_again(source: Path, tmp_path: Path) -> None:
    prepare(text_config(source, tmp_path))
    before = content(tmp_path)
    path = tmp_path / "shards" / "000001.json"
    whole = path.read_text(encoding="utf-8")
    for name in ("bytes", "sha256", "counts", "records", "job", "files"):
        assert f'"{name}"' in whole
        path.write_text(whole.replace(f'"{name}"', f'"{name}s"'), encoding="utf-8")
        prepare(text_config(source, tmp_path))
        assert content(tmp_path) == before


def test_bad_records_stop_at_their_line_or_are_counted(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "头痛"}\n{"text": 3}\n{"text": "发热"}\n{', encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.jsonl, record at line 2, field 'text': expected text, found int"):
        prepare(text_config(source, tmp_path / "a", data=TextConfig(files=(str(path),))))
    skipping = TextConfig(files=(str(path),), on_bad_record="skip")
    counts = prepare(text_config(source, tmp_path / "b", data=skipping, shard_chars=1)).counts
    assert (counts["records"], counts["units"], counts["bad"]) == (4, 2, 2)
    assert [complaint.split(": ")[-1][:20] for complaint in counts["first_bad"]] == [
        "expected text, found",
        "the line is not JSON",
    ]


def test_command_line_uses_the_names_of_the_configuration(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "输出"
    arguments = [f"tokenizer.path={source / 'tokenizer'}", f"data.files=[{source / 'a.jsonl'}]", f"out={out}"]
    assert main(arguments) == 0
    assert "30 records -> 30 corpus units" in capsys.readouterr().out
    assert main(["verify", str(out)]) == 0
    chat = [f"tokenizer.path={source / 'tokenizer'}", f"data.files=[{source / 'chat.jsonl'}]", f"out={tmp_path / 'c'}"]
    assert main([*chat, "data.kind=chat", "data.template=chimed_gpt", "data.max_length=64"]) == 0
    assert read_manifest(tmp_path / "c").conversion["template"] == "chimed_gpt"
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "sharegpt" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"data was set to 5 before"):
        main(["data=5", *arguments])
    with pytest.raises(ConfigError, match=r"workers: must be in \[1, 1024\], got 100000000000"):
        main([*arguments, "workers=100000000000"])
    with pytest.raises(ValueError, match=r"data\.fils: unknown key.*did you mean 'files'"):
        main([*arguments, "data.fils=[x]"])


@pytest.mark.slow
def test_killed_in_the_middle_it_continues_and_leaves_no_process(source: Path, tmp_path: Path) -> None:
    big = tmp_path / "big.jsonl"
    big.write_text("".join(json.dumps({"text": "头痛发热" * 50 + str(i)}) + "\n" for i in range(20_000)))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "megatron_zj.cli.prepare", f"tokenizer.path={source / 'tokenizer'}"]
    command += [f"data.files=[{big}]", f"out={out}", "workers=2", "shard_chars=100000"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while len(list(out.glob("shards/*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    children = descendants(process.pid)
    assert len(children) >= 4  # fork server, resource tracker, two workers
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("shards/*.json")}
    assert len(kept) >= 3
    assert not (out / "manifest.json").exists()
    while any(alive(child) for child in children) and time.monotonic() < deadline + 30:
        time.sleep(0.1)
    assert not [child for child in children if alive(child)]
    assert subprocess.run(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode == 0
    again = {path.name: path.stat().st_mtime_ns for path in out.glob("shards/*.json")}
    assert kept.items() <= again.items()
    verify([out])


def descendants(process: int | str) -> list[str]:
    """Process ids below this one."""
    children = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True).stdout.split()
    return [*children, *(below for child in children for below in descendants(child))]


def alive(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
