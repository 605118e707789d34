"""The committed table of what every compiled kernel takes, and the promises each row must keep.

``python -m kernels.check compile --write`` makes it anew after a kernel or its blocks have changed.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import triton

from kernels import offline
from kernels.catalogue import Entry, entries
from kernels.fingerprint import entry_hash

TABLE = Path(__file__).parent / "resources.json"
BLOCKING = ("sm_80", "sm_90")
ALL = ("sm_80", "sm_90", "sm_100", "gfx942")
# The entry of each kernel that is compiled in every run; the others when they change, and in the long form.
TYPICAL = {"attention_forward_dense": "128", "attention_forward_specialized": "128",
           "attention_forward": "128", "attention_dkdv": "128", "attention_dq": "128", "decode_split": "128",
           "rms_norm_forward": "4096", "rms_norm_backward": "4096"}  # fmt: skip
# Spill instructions that are accepted, with the reason.
SPILL_BUDGET: Mapping[tuple[str, str], tuple[int, str]] = {
    ("sm_90", "attention_dkdv[128]"): (4, "blocks without any spill are too small for HGMMA, or give up the pipeline"),
    ("sm_90", "attention_dkdv[80]"): (4, "as 128, whose blocks they are"),
    ("sm_90", "attention_dkdv[96]"): (4, "as 128, whose blocks they are"),
    ("sm_90", "attention_dkdv[128, slots]"): (32, "as 128; the queries' places and their mask take more registers"),
    ("sm_90", "attention_dkdv[128, window]"): (38, "as 128; both ends of a window are masked"),
}
# The same for every kernel of an architecture whose blocks nobody has chosen yet.
UNTUNED: Mapping[str, tuple[int, str]] = {
    "sm_100": (226, "sm_90's blocks, until a device has been measured"),
    "gfx942": (232, "sm_80's blocks, until a device has been measured"),
}

Job = tuple[str, str]  # architecture, label
Row = dict[str, Any]


def typical(entry: Entry) -> bool:
    """Whether this entry stands for its kernel in the short form."""
    return TYPICAL.get(entry.name, "") == entry.key and not entry.variant


def compile_entries(jobs: Sequence[Job], processes: int = 2) -> dict[Job, Row | str]:
    """Compile these entries; a row of resources each, or what went wrong as text."""
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        return dict(pool.imap_unordered(_compile, jobs))


def _compile(job: Job) -> tuple[Job, Row | str]:
    arch, label = job
    entry = by_label()[label]
    try:
        found = offline.compile_for(arch, entry.kernel, entry.args, entry.launch_meta(arch))
    except Exception as error:
        return job, f"{type(error).__name__}: {str(error)[-200:]}"
    return job, found.row()


def by_label() -> dict[str, Entry]:
    """The catalogue by label."""
    return {entry.label: entry for entry in entries()}


def cubins(arch: str) -> dict[str, str]:
    """Hash of every kernel's binary on an architecture, by label."""
    found = {}
    for label, entry in by_label().items():
        found[label] = offline.compile_for(arch, entry.kernel, entry.args, entry.launch_meta(arch)).code
    return found


def broken_promises(entry: Entry, arch: str, row: Row, *, spills: bool = True) -> list[str]:
    """What this compiled entry promised and does not keep.

    ``spills`` False: under another Triton than the table's, whose register allocator the blocks were not chosen for.
    """
    found = []
    budget, _ = SPILL_BUDGET.get((arch, entry.label), UNTUNED.get(arch, (0, "")))
    if (spills or entry.specialized) and row["spills"] > budget:
        found.append(f"{row['spills']} spill instructions, budget {budget}")
    if row["shared"] > offline.SHARED_PER_BLOCK[arch]:
        found.append(f"{row['shared']} bytes of shared memory do not fit {offline.SHARED_PER_BLOCK[arch]}")
    kind = entry.promised_mma(arch)
    if kind is not None and not row["mma"].get(kind):
        found.append(f"no {kind}, the tensor-core instruction promised (found: {row['mma'] or 'none'})")
    if entry.tma and not row["tma"]:
        found.append("no bulk tensor copy")
    if entry.specialized and not row["setmaxnreg"]:
        found.append("no specialised warps")
    if entry.aligned and not arch.startswith("gfx"):
        wide = row["loads"].get("128", 0)
        narrow = sum(count for width, count in row["loads"].items() if width in ("U16", "S16"))
        if not wide:
            found.append("no 128-bit global load")
        if narrow > entry.scalars:
            found.append(f"{narrow} 16-bit global loads")
    return found


def differences(committed: Row, found: Row) -> list[str]:
    """Where a fresh row is not the committed one."""
    names = sorted(found)
    return [f"{name}: {committed.get(name)} -> {found[name]}" for name in names if committed.get(name) != found[name]]


def load() -> dict[str, Any]:
    """The committed table: {"triton": version, "rows": {architecture: {label: row}}}."""
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def stale(table: Mapping[str, Any], arch: str) -> list[str]:
    """Labels whose source or blocks are not those of the committed row."""
    rows = table["rows"].get(arch, {})
    return [
        entry.label
        for entry in entries()
        if arch in entry.only and rows.get(entry.label, {}).get("hash") != entry_hash(entry, arch)
    ]


def write(archs: Iterable[str]) -> list[str]:
    """Compile what is stale on these architectures and commit the rows; the errors, if any."""
    table = load() if TABLE.exists() else {"rows": {}}
    if table.get("triton") != triton.__version__:
        table = {"triton": triton.__version__, "rows": {}}
    jobs = [(arch, label) for arch in archs for label in stale(table, arch)]
    catalogue = by_label()
    errors = []
    for (arch, label), row in compile_entries(jobs).items():
        if isinstance(row, str):
            errors.append(f"{arch} {label}: {row}")
            continue
        row["hash"] = entry_hash(catalogue[label], arch)
        table["rows"].setdefault(arch, {})[label] = row
    for arch, rows in table["rows"].items():
        table["rows"][arch] = {label: rows[label] for label in sorted(rows) if label in catalogue}
    TABLE.write_text(_one_line_a_row(table), encoding="utf-8")
    return errors


def _one_line_a_row(table: Mapping[str, Any]) -> str:
    lines = []
    for arch, rows in sorted(table["rows"].items()):
        body = ",\n".join(f'   "{label}": {json.dumps(row)}' for label, row in rows.items())
        lines.append(f'  "{arch}": {{\n{body}\n  }}')
    body = ",\n".join(lines)
    return f'{{\n "triton": "{table["triton"]}",\n "rows": {{\n{body}\n }}\n}}\n'
