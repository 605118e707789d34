"""Published GPU timings, and which of them no longer speak of this source.

A timing is a file that ``python -m kernels.bench`` wrote on a device and somebody committed under ``docs/timings``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernels.fingerprint import timing_hash
from kernels.resources import by_label

FOLDER = Path(__file__).parent.parent / "docs" / "timings"


def stale(record: Mapping[str, Any]) -> list[str]:
    """Kernels of a timing record whose source, blocks or host code have changed since it was measured."""
    catalogue = by_label()
    found = []
    for label, measured in record["hashes"].items():
        entry = catalogue.get(label)
        if entry is None or timing_hash(entry, record["arch"]) != measured:
            found.append(label)
    return found


def summary(folder: Path = FOLDER) -> str:
    """One line: what is published, and what of it is stale."""
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if not files:
        return "no timing is published: nothing has been measured on a GPU"
    lines = []
    for file in files:
        old = stale(json.loads(file.read_text(encoding="utf-8")))
        lines.append(f"{file.name}: " + (f"STALE for {', '.join(old)}" if old else "current"))
    return "; ".join(lines)
