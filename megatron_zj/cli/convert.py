"""``zj convert --from DIR --to DIR``: a Hugging Face LLaMA into a checkpoint, or a checkpoint into one."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_zj.checkpoint.errors import CheckpointError
from megatron_zj.checkpoint.hf import export_hf, import_hf
from megatron_zj.checkpoint.manifest import read_manifest
from megatron_zj.checkpoint.retention import newest
from megatron_zj.cli.main import entry

_SHARD_GIB = 2.0


def main(argv: Sequence[str]) -> int:
    """Convert in the direction that --from says.  Returns the exit code."""
    parser = argparse.ArgumentParser(prog="zj convert", description=(__doc__ or "").replace("``", ""))
    parser.add_argument(
        "--from", dest="source", type=Path, required=True, help="Hugging Face folder; or step, checkpoints, run folder"
    )
    parser.add_argument("--to", dest="target", type=Path, required=True, help="new folder")
    parser.add_argument("--role", help="which model of a checkpoint with several; default: the actor")
    parser.add_argument(
        "--max-shard-gib",
        type=_gib,
        metavar="GIB",
        help="largest safetensors file to write (2, unless a tensor is larger)",
    )
    parser.add_argument("--tokenizer", type=Path, help="an extended tokenizer: new rows become means of their pieces")
    parser.add_argument("--special-tokens", default="", help="tokens to add after the tokenizer's own, with commas")
    options = parser.parse_args(list(argv))
    if newest(options.source) is not None:
        if options.tokenizer or options.special_tokens:
            parser.error("--tokenizer and --special-tokens extend a Hugging Face model; --from is a checkpoint")
        size = int((options.max_shard_gib or _SHARD_GIB) * 2**30)
        target = export_hf(options.source, options.target, role=options.role, max_shard_bytes=size)
        sys.stdout.write(f"wrote the Hugging Face folder {target}\n")
        return 0
    if not (options.source / "config.json").is_file():
        read_manifest(options.source)  # says what is there instead
        raise CheckpointError(f"{options.source} holds neither a checkpoint nor a Hugging Face model")
    if options.role or options.max_shard_gib:
        parser.error("--role and --max-shard-gib are for a checkpoint; --from is a Hugging Face folder")
    special = tuple(token for token in options.special_tokens.split(",") if token)
    target = import_hf(options.source, options.target, tokenizer=options.tokenizer, special_tokens=special)
    sys.stdout.write(f"wrote the checkpoint {target}; use it as checkpoint.load={target}\n")
    return 0


def _gib(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number > 0, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(entry("convert", sys.argv[1:]))
