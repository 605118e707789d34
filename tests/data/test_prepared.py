"""Prepared folders: damage to any file of one is refused, by name and with what to do."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from megatron_zj.config.data import ChatConfig, CorpusConfig
from megatron_zj.data import prepared
from megatron_zj.data.errors import DataError
from megatron_zj.data.prepare import TextConfig, prepare
from megatron_zj.data.prepared import read_manifest, verify
from megatron_zj.data.sources import verify_inputs
from megatron_zj.data.stream import build_stream
from megatron_zj.data.tokenizer import load_tokenizer
from tests.data.preparations import content, text_config


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


def test_no_flipped_bit_of_the_manifest_passes_or_ends_in_a_traceback(source: Path, tmp_path: Path) -> None:
    data = TextConfig(files=(str(source / "b.jsonl"),))
    prepare(text_config(source, tmp_path, data=data, shard_chars=999))
    path = tmp_path / "manifest.json"
    whole, manifest = path.read_bytes(), read_manifest(tmp_path)
    for byte in range(len(whole)):
        flip(path, byte)
        with contextlib.suppress(DataError):
            assert read_manifest(tmp_path) == manifest  # of white space, say
        path.write_bytes(whole)


@pytest.mark.parametrize("early", [False, True])  # the first manifests had no checksum
@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer": None},
        {"shards": []},
        {"shards": [{"name": "000000", "job": "", "counts": {"units": 10}, "files": [1]}]},
        {"shards": [{"name": "000000", "job": "", "counts": {"units": 10}, "files": {".bin": {"bytes": 1}}}]},
        {"counts": None},
    ],
)
def test_a_manifest_of_another_shape_is_refused(source: Path, tmp_path: Path, changes: dict, early: bool) -> None:
    command = text_config(source, tmp_path, data=TextConfig(files=(str(source / "b.jsonl"),)), shard_chars=999)
    prepare(command)
    path = tmp_path / "manifest.json"
    whole = path.read_bytes()
    found = json.loads(whole)
    if early:
        del found["checksum"]
        path.write_text(json.dumps(found), encoding="utf-8")
        verify([tmp_path])
    path.write_text(json.dumps(found | changes), encoding="utf-8")
    for check in (lambda: verify([tmp_path]), lambda: build_stream(CorpusConfig(files=(str(tmp_path),)), None, 0)):
        with pytest.raises(DataError, match=r"manifest\.json is damaged: (.|\n)*-> run the same zj prepare again"):
            check()
    prepare(command)
    assert path.read_bytes() == whole
