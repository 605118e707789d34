"""``zj prepare tokenizer.path=... data.files=[...] out=DIR``: raw files into a folder that training reads."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_zj.cli.compose import parse_overrides
from megatron_zj.cli.main import guarded
from megatron_zj.config.checks import no_folder
from megatron_zj.config.loader import ConfigError, load
from megatron_zj.data.formats.registry import FORMATS
from megatron_zj.data.prepare import PrepareConfig, prepare
from megatron_zj.data.prepared import PreparedManifest, read_manifest, verify

_HELP = """zj prepare: raw files into a folder that training reads

usage: zj prepare tokenizer.path=PATH data.files=[FILE,...] out=DIR [key=value ...]
       zj prepare verify DIR

  data.kind           corpus (default), chat, preference or prompts
  data.format         auto (default) or one of those below
  data.on_bad_record  error (default) or skip
  data.template, data.max_length, data.overlong   as in training, for all kinds but corpus
  tokenizer.special_tokens=[<human>,<bot>]
  workers             processes that tokenize (1)
  shard_chars         characters of input a shard, about (4000000)

An interrupted preparation continues when the same command is run again.  Files: txt json jsonl csv tsv, each also .gz,
in UTF-8 or GB18030, and parquet; a folder stands for those in it.  Formats:
"""


def main(argv: Sequence[str]) -> int:
    """Prepare or verify.  Returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        rows = "".join(f"  {form.name:<18} {form.shape}\n" for form in FORMATS.values())
        sys.stdout.write(_HELP + rows)
        return 0 if argv else 2
    if argv[0] == "verify":
        return _verify(argv[1:])
    config = load(PrepareConfig, settings(argv, {"data": {"kind": "corpus"}}))
    require_folder("out", config.out)
    manifest = prepare(config, progress=True)
    sys.stdout.write(_summary(config, manifest))
    return 0


def settings(overrides: Sequence[str], defaults: dict[str, Any]) -> dict[str, Any]:
    """``a.b=value`` overrides, in Hydra's grammar, as nested dicts over ``defaults``."""
    tree = dict(defaults)
    for override in parse_overrides(overrides):
        if override.is_delete() or override.is_sweep_override():
            raise ConfigError([f"{override.input_line!r}: only key=value is understood here"])
        node = tree
        *folders, name = override.key_or_group.split(".")
        for folder in folders:
            inside = node.get(folder) or {}
            if not isinstance(inside, dict):
                raise ConfigError([f"{override.input_line!r}: {folder} was set to {inside!r} before; leave that out"])
            node[folder] = dict(inside)
            node = node[folder]
        node[name] = override.value()
    return tree


def require_folder(key: str, path: Path) -> None:
    """ConfigError unless ``path`` is a folder, or can become one."""
    if (problem := no_folder(path)) is not None:
        raise ConfigError([f"{key}: {problem}"])


def _verify(folders: Sequence[str]) -> int:
    if len(folders) != 1:
        raise ConfigError(["zj prepare verify takes one folder"])
    config = load(PrepareConfig, {"out": folders[0]})
    verify([config.out], progress=True)
    sys.stdout.write(f"{config.out}: {len(read_manifest(config.out).shards)} shards, every checksum is right\n")
    return 0


def _summary(config: PrepareConfig, manifest: PreparedManifest) -> str:
    counts = manifest.counts
    lines = [
        f"{config.out}: {counts['records']:,} records -> {counts['units']:,} {manifest.kind} units, "
        f"{counts['tokens']:,} tokens, {len(manifest.shards)} shards",
        *(f"  {entry['path']}: {entry['format']}" for entry in manifest.inputs),
    ]
    if counts["bad"] or counts["too_long"] or counts["shortened"]:
        lines.append(
            f"  left out: {counts['bad']} bad, {counts['too_long']} too long; shortened: {counts['shortened']}"
        )
        lines += [f"    {complaint}" for complaint in counts["first_bad"]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
