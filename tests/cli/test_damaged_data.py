"""Prepared data that has changed on the disk stops training on every rank before a model is built."""

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
