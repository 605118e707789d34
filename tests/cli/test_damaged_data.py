"""Data that has changed on the disk, or never was right, stops training on every rank before a model is built."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.commands import zj
from tests.cli.conftest import train_argv


@pytest.mark.parametrize(("ranks", "suffix"), [(1, "bin"), (2, "bin"), (2, "idx"), (2, "units.npy")])
def test_a_flipped_bit_of_prepared_data_stops_training(world: Path, tmp_path: Path, ranks: int, suffix: str) -> None:
    """Of three files each of two ranks has some, and the complaint of either is told, once, by name."""
    folder = tmp_path / "text"
    shutil.copytree(world / "data/encyclopaedia", folder)
    shard = folder / "shards" / f"000000.{suffix}"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    argv = train_argv("pretrain", world, "unused", data__files=f"[{folder}]", run__dir=tmp_path / "run")
    outcome = zj(argv, ranks=ranks)
    assert outcome.codes == (1,) * ranks
    assert outcome.output.count("error: ") == 1
    assert f"error: {shard} is damaged" in outcome.output
    assert f"-> delete {folder}/shards/000000.json and run the same zj prepare again" in outcome.output
    assert not (tmp_path / "run/checkpoints").exists()
    assert outcome.seconds < 20


@pytest.mark.parametrize("ranks", [1, 2])
def test_data_without_a_manifest_trains_and_says_what_was_not_checked(world: Path, tmp_path: Path, ranks: int) -> None:
    """As Megatron-LM's own preprocessing leaves it: a .bin and an .idx.  A cut .bin stops all ranks by name."""
    prefix = tmp_path / "text_document"
    for suffix in (".bin", ".idx"):
        shutil.copy(world / f"data/encyclopaedia/shards/000000{suffix}", f"{prefix}{suffix}")
    argv = train_argv("pretrain", world, "unused", data__files=f"[{prefix}]", run__dir=tmp_path / "run")
    outcome = zj(argv, ranks=ranks)
    assert outcome.codes == (0,) * ranks, outcome.output
    assert outcome.output.count(f"no manifest of zj prepare: {prefix}; checked are") == 1
    content = Path(f"{prefix}.bin").read_bytes()
    Path(f"{prefix}.bin").write_bytes(content[:-100])
    outcome = zj([*argv, f"run.dir={tmp_path / 'cut'}"], ranks=ranks)
    assert outcome.codes == (1,) * ranks
    wanted = f"{prefix}.bin has {len(content) - 100} bytes where its index expects {len(content)}"
    assert outcome.error.startswith(f"error: {wanted}")
