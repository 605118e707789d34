"""zj prepare: what it writes, interruption at any shard, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_zj.cli.prepare import main
from megatron_zj.config.data import ChatConfig, CorpusConfig, PreferenceConfig, TokenizerConfig
from megatron_zj.data import prepare as module
from megatron_zj.data import prepared
from megatron_zj.data.errors import DataError
from megatron_zj.data.prepare import PrepareConfig, TextConfig, prepare
from megatron_zj.data.prepared import read_manifest, verify
from megatron_zj.data.sources import verify_inputs
from megatron_zj.data.stream import build_stream
from megatron_zj.data.tokenizer import SentencePieceTokenizer, load_tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tokenizer: SentencePieceTokenizer) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    tokenizer.save(folder / "tokenizer")
    texts = [json.dumps({"text": f"头痛{i}，" + "发热咳嗽。" * (i % 5)}, ensure_ascii=False) for i in range(40)]
    (folder / "a.jsonl").write_text("\n".join(texts[:30]), encoding="utf-8")
    (folder / "b.jsonl").write_text("\n".join(texts[30:]), encoding="gb18030")
    chats = [{"instruction": f"头痛{i}", "output": "休息" * (1 + i % 9)} for i in range(20)]
    (folder / "chat.jsonl").write_text("\n".join(json.dumps(c, ensure_ascii=False) for c in chats), encoding="utf-8")
    ranked = [{"prompt": f"头痛{i}", "responses": ["甲", "乙", "丙"], "ranks": [1, 0, 1]} for i in range(9)]
    (folder / "rm.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in ranked), encoding="utf-8")
    return folder


def text_config(source: Path, out: Path, **fields: Any) -> PrepareConfig:
    files = (str(source / "a.jsonl"), str(source / "b.jsonl"))
    return PrepareConfig(
        out=out,
        data=fields.pop("data", TextConfig(files=files)),
        tokenizer=TokenizerConfig(path=source / "tokenizer"),
        shard_chars=fields.pop("shard_chars", 120),
        **fields,
    )


def content(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


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


def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".units.npy"])
@pytest.mark.parametrize("kind", ["corpus", "chat"])
def test_one_flipped_bit_is_refused_by_name_and_preparing_again_mends_it(
    source: Path, tmp_path: Path, kind: str, suffix: str
) -> None:
    data = TextConfig(files=(str(source / "a.jsonl"),)) if kind == "corpus" else chat_config(source)
    command = text_config(source, tmp_path, data=data)
    prepare(command)
    whole = content(tmp_path)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    config = CorpusConfig(files=(str(tmp_path),)) if kind == "corpus" else chat_config(tmp_path)
    verify_inputs(config, tokenizer)
    shard = tmp_path / "shards" / f"000001{suffix}"
    for byte in (0, shard.stat().st_size // 2, -1):
        flip(shard, byte)
        for check in (lambda: verify([tmp_path]), lambda: verify_inputs(config, tokenizer)):
            with pytest.raises(DataError) as error:
                check()
            sidecar = shard.with_name("000001.json")
            assert str(error.value).startswith(f"{shard} is damaged")
            assert str(error.value).endswith(f"-> delete {sidecar} and run the same zj prepare again")
        sidecar.unlink()
        prepare(command)
        verify_inputs(config, tokenizer)
        assert content(tmp_path) == whole


def chat_config(path: Path) -> ChatConfig:
    name = path / "chat.jsonl"
    return ChatConfig(files=(str(name if name.is_file() else path),), max_length=64)


def test_held_out_folders_are_checked_too(source: Path, tmp_path: Path) -> None:
    for name in ("train", "held_out"):
        prepare(text_config(source, tmp_path / name, data=chat_config(source)))
    config = ChatConfig(files=(str(tmp_path / "train"),), validation_files=(str(tmp_path / "held_out"),), max_length=64)
    tokenizer = load_tokenizer(tmp_path / "train" / "tokenizer")
    verify_inputs(config, tokenizer)
    flip(tmp_path / "held_out/shards/000000.bin", 0)
    with pytest.raises(DataError, match=r"held_out/shards/000000\.bin is damaged"):
        verify_inputs(config, tokenizer)


@pytest.mark.parametrize("world_size", [1, 2, 3, 50])
def test_every_file_is_read_by_one_rank(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    prepare(text_config(source, tmp_path))
    shares: list[list[Path]] = [[] for _ in range(world_size)]
    checksum = prepared.checksum
    for rank, share in enumerate(shares):
        monkeypatch.setattr(prepared, "checksum", lambda path, share=share: share.append(path) or checksum(path))
        verify([tmp_path], rank, world_size)
    files = sorted(path for path in (tmp_path / "shards").iterdir() if path.suffix != ".json")  # without sidecars
    assert sorted(path for share in shares for path in share) == files
    sizes = [sum(path.stat().st_size for path in share) for share in shares]
    assert max(sizes) - min(sizes) <= max(path.stat().st_size for path in files)


def test_a_check_of_seconds_shows_how_far_it_is(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(text_config(source, tmp_path))
    verify([tmp_path], progress=True)
    assert "checking data" not in capsys.readouterr().err
    monkeypatch.setattr(prepared, "QUIET_SECONDS", 0.0)
    verify([tmp_path])
    assert "checking data" not in capsys.readouterr().err
    verify([tmp_path], progress=True)
    assert "checking data: 100%" in capsys.readouterr().err


def test_a_shard_cut_short_and_a_damaged_manifest_are_refused(source: Path, tmp_path: Path) -> None:
    prepare(text_config(source, tmp_path))
    shard = tmp_path / "shards" / "000001.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"000001\.bin has \d+ bytes, not \d+"):
        build_stream(CorpusConfig(files=(str(tmp_path),)), load_tokenizer(source / "tokenizer"), 0)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        read_manifest(tmp_path)


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
