"""Propose blocks for an architecture: compile the candidates, drop what spills or does not fit, time the rest.

Without a device of that architecture the survivors are listed and none is chosen: a static score prunes, it does not
pick.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kernels import offline, resources
from kernels.catalogue import Entry, entries
from kernels.configs import Config

KEEP = 6  # candidates of a kernel that are worth a device's time
_SPACE: Mapping[str, Mapping[str, Sequence[int]]] = {
    "attention_forward": {"BM": (64, 128), "BN": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
    "attention_dkdv": {"BM": (32, 64), "BN": (64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3)},
    "attention_dq": {"BM": (64, 128), "BN": (32, 64), "num_warps": (4, 8), "num_stages": (1, 2, 3)},
    "decode_split": {"BN": (32, 64, 128), "CHUNK": (256, 512, 1024), "num_warps": (4,), "num_stages": (2, 3)},
    "logprob_forward": {"BT": (64, 128), "BV": (128, 256), "BD": (32, 64), "num_warps": (4, 8), "num_stages": (3, 4)},
    "logprob_dlogits": {"BT": (64, 128), "BV": (128, 256), "BD": (32, 64), "num_warps": (4, 8), "num_stages": (3, 4)},
}


def candidates(entry: Entry) -> Iterator[Config]:
    """All blocks worth compiling for this kernel; none where the table's are not in question."""
    space = _SPACE.get(entry.name, {})
    if space:
        for values in itertools.product(*space.values()):
            yield dict(zip(space, values, strict=True))


def survivors(entry: Entry, arch: str) -> list[tuple[Config, offline.Resources]]:
    """The candidates that compile and keep the entry's promises, the most promising ``KEEP`` first."""
    kept = []
    for table in candidates(entry):
        try:
            found = offline.compile_for(arch, entry.kernel, entry.args, entry.launch_meta(arch, table))
        except Exception:
            continue  # too large for the target, or a shape its compiler refuses: not a candidate
        if found.spills == 0 and not resources.broken_promises(entry, arch, found.row()):
            kept.append((table, found))
    return sorted(kept, key=lambda pair: _score(*pair))[:KEEP]


def _score(table: Config, found: offline.Resources) -> float:
    """Smaller is better: traffic falls with the rows a block shares, latency hides behind warps and stages."""
    rows = table.get("BM", table.get("BT", 64)) + table.get("BN", table.get("BV", 64))
    resident = max(1, 65536 // max(found.registers * found.threads, 1))
    return 64 / rows + 4 / (resident * found.threads / 32) + 0.2 * (table["num_stages"] < 3)


def propose(arch: str) -> dict[str, Any]:
    """Label to the surviving blocks, best guess first, with their registers and shared memory."""
    proposal: dict[str, Any] = {}
    for entry in entries():
        kept = survivors(entry, arch)
        if kept:
            proposal[entry.label] = [
                {"blocks": dict(table), "registers": found.registers, "shared": found.shared} for table, found in kept
            ]
    return proposal
