"""What the tests of prepared folders share: a small preparation of text, and what a folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_zj.config.data import TokenizerConfig
from megatron_zj.data.prepare import PrepareConfig, TextConfig


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
