"""Propose blocks for an architecture: compile the candidates, drop what spills or does not fit, order the rest.

The order is a guess from registers, shared memory and traffic: it prunes, it does not pick.  What decides is
``python -m kernels.bench`` on a device, with a proposal put into ``configs.py``.
"""

from __future__ import annotations

import itertools
import multiprocessing
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


def _compile(job: tuple[str, str, Config]) -> tuple[str, Config, offline.Resources] | None:
    arch, label, table = job
    entry = resources.by_label()[label]
    try:
        found = offline.compile_for(arch, entry.kernel, entry.args, entry.launch_meta(arch, table))
    except Exception:
        return None  # too large for the target, or a shape its compiler refuses: not a candidate
    if found.spills or resources.broken_promises(entry, arch, found.row()):
        return None
    return label, table, found


def _score(table: Config, found: offline.Resources) -> float:
    """Smaller is better: traffic falls with the rows a block shares, latency hides behind warps and stages."""
    rows = table.get("BM", table.get("BT", 64)) + table.get("BN", table.get("BV", 64))
    resident = max(1, 65536 // max(found.registers * found.threads, 1))
    return 64 / rows + 4 / (resident * found.threads / 32) + 0.2 * (table["num_stages"] < 3)


def propose(arch: str, processes: int = 2) -> dict[str, Any]:
    """For the typical entry of each kernel the best ``KEEP`` blocks that compile without spills and keep its promises.

    Label to a list, best guess first, with registers (a thread) and shared memory (bytes a block).
    """
    jobs = [
        (arch, entry.label, table)
        for entry in entries()
        if resources.typical(entry) and arch in entry.only
        for table in candidates(entry)
    ]
    kept: dict[str, list[tuple[Config, offline.Resources]]] = {}
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        for result in pool.imap_unordered(_compile, jobs):
            if result is not None:
                kept.setdefault(result[0], []).append(result[1:])
    return {
        label: [
            {"blocks": dict(table), "registers": found.registers, "shared": found.shared}
            for table, found in sorted(pairs, key=lambda pair: _score(*pair))[:KEEP]
        ]
        for label, pairs in sorted(kept.items())
    }
