"""What is in a checkpoint: python tools/inspect_checkpoint.py DIR [--tensors] [--verify].

DIR is a step, checkpoints or run folder.  Nothing is loaded; ``--verify`` reads every file and compares checksums.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_zj.checkpoint.errors import CheckpointError
from megatron_zj.checkpoint.manifest import Manifest, read_manifest, verify
from megatron_zj.checkpoint.retention import complete_steps, newest
from megatron_zj.checkpoint.save import ROLES
from megatron_zj.checkpoint.shards import ShardReader


def main(argv: Sequence[str]) -> int:
    """Print the newest complete checkpoint.  Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="DIR")
    parser.add_argument("--tensors", action="store_true", help="list every tensor, the optimizer's too")
    parser.add_argument("--verify", action="store_true", help="compare every file with its checksum")
    options = parser.parse_args(list(argv))
    try:
        folder = newest(options.path) or options.path
        manifest = read_manifest(folder)
        print(describe(folder, manifest, options.tensors))
        if options.verify:
            verify(folder, manifest)
            print(f"verified {len(manifest.files)} files")
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def describe(folder: Path, manifest: Manifest, tensors: bool) -> str:
    """The manifest and the roles, as text."""
    total = sum(record.size for record in manifest.files.values())
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    lines = [
        f"{folder}: step {manifest.step}, {len(manifest.files)} files, {total / 2**20:,.1f} MiB",
        f"written    {manifest.created} by {versions}",
        f"tokenizer  {manifest.tokenizer or 'none'}",
    ]
    siblings = list(complete_steps(folder.parent))
    if len(siblings) > 1:
        lines.append(f"beside it  steps {', '.join(map(str, siblings))}")
    for name, role in manifest.roles.items():
        model = role.model
        layout = " ".join(f"{axis}{size}" for axis, size in role.layout.items())
        optimizer = "with optimizer" if role.has_optimizer else "weights only"
        lines += [
            f"role {name}: {role.head} head, {optimizer}, written under {layout}",
            f"  {model.num_layers} layers x {model.hidden_size}, {model.num_attention_heads} heads "
            f"({model.kv_heads} key/value), {model.vocab_size:,} vocabulary rows",
            *_tensors(folder / ROLES / name, tensors),
        ]
    return "\n".join(lines)


def _tensors(folder: Path, listed: bool) -> list[str]:
    with ShardReader(folder) as reader:
        index = reader.index
    weights = {key: t for key, t in index.tensors.items() if not key.startswith("optimizer.")}
    count = sum(math.prod(t.shape) for t in weights.values())
    lines = [f"  {count:,} parameters in {len(weights)} tensors, {len(index.tensors) - len(weights)} of the optimizer"]
    for key, stored in sorted(index.tensors.items()) if listed else []:
        dtype = str(stored.dtype).removeprefix("torch.")
        lines.append(f"  {key} {list(stored.shape)} {dtype}, {len(stored.chunks)} pieces")
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
