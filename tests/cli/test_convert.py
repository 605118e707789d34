"""``zj convert``: options that mean nothing in its direction, or nothing at all, are refused at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_zj.cli.convert import main


def _refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-3", "nan", "inf", "much"])
def test_a_file_size_is_a_number_above_0(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = _refusal(["--from", "x", "--to", "y", f"--max-shard-gib={value}"], capsys)
    assert f"argument --max-shard-gib: must be a number > 0, got '{value}'" in error


@pytest.mark.parametrize("option", ["--role=actor", "--max-shard-gib=1"])
def test_options_of_the_way_out_are_refused_on_the_way_in(
    tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").touch()
    error = _refusal(["--from", str(tmp_path), "--to", str(tmp_path / "to"), option], capsys)
    assert "--role and --max-shard-gib are for a checkpoint; --from is a Hugging Face folder" in error
    assert not (tmp_path / "to").exists()
