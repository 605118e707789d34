"""What the compiler makes of every kernel, for GPUs that are not here.

A process of its own: ``python -m kernels.check compile``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from kernels import dispatch

if not dispatch.has_triton() or dispatch.interpreting():
    pytest.skip("compiles with Triton, never in its interpreter", allow_module_level=True)

import triton

from kernels import configs, resources, staleness, tune
from kernels.catalogue import entries
from kernels.fingerprint import host_hash, source_hash, timing_hash
from kernels.resources import ALL, BLOCKING, Job, Row

SHORT: list[Job] = [
    (arch, entry.label) for arch in BLOCKING for entry in entries() if resources.typical(entry) and arch in entry.only
]
LONG: list[Job] = [
    (arch, entry.label)
    for arch in ALL
    for entry in entries()
    if arch in entry.only and (arch, entry.label) not in SHORT
]


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> dict[Job, Row | str]:
    """Everything the selected tests need, compiled on two processes."""
    wanted = {
        item.callspec.params["job"] for item in request.session.items if "compiled" in getattr(item, "fixturenames", ())
    }
    return resources.compile_entries([job for job in [*SHORT, *LONG] if job in wanted])


@pytest.mark.parametrize(
    "job",
    [
        *[pytest.param(job, id=" ".join(job)) for job in SHORT],
        *[pytest.param(job, id=" ".join(job), marks=pytest.mark.slow) for job in LONG],
    ],
)
def test_kernel_compiles_and_keeps_its_promises(job: Job, compiled: dict[Job, Row | str]) -> None:
    arch, label = job
    row = compiled[job]
    assert not isinstance(row, str), row
    table = resources.load()
    ours = triton.__version__ == table["triton"]
    assert not resources.broken_promises(resources.by_label()[label], arch, row, spills=ours)
    if ours:
        committed = dict(table["rows"][arch][label])
        committed.pop("hash")
        assert not resources.differences(committed, row), "python -m kernels.check compile --write renews the table"


@pytest.mark.parametrize("arch", ALL)
def test_committed_table_is_of_this_source_and_keeps_every_promise(arch: str) -> None:
    table = resources.load()
    assert not resources.stale(table, arch), "python -m kernels.check compile --write renews the table"
    catalogue = resources.by_label()
    broken = {
        label: promises
        for label, row in table["rows"][arch].items()
        if (promises := resources.broken_promises(catalogue[label], arch, row))
    }
    assert not broken


@pytest.mark.parametrize(
    ("arch", "label", "other"),
    [
        ("sm_90", "attention_dq[256]", "HMMA"),
        ("sm_90", "decode_split[128]", "HGMMA"),
        ("gfx942", "logprob_forward", ""),
    ],
)
def test_another_kind_of_tensor_core_instruction_breaks_the_promise(arch: str, label: str, other: str) -> None:
    entry, row = resources.by_label()[label], resources.load()["rows"][arch][label]
    assert not resources.broken_promises(entry, arch, row)
    (broken,) = resources.broken_promises(entry, arch, {**row, "mma": {other: 9} if other else {}})
    assert "the tensor-core instruction promised" in broken


@pytest.mark.parametrize("arch", sorted(configs.TABLES.keys() - {"interpreter"}))
def test_every_entry_of_the_tables_is_compiled(arch: str) -> None:
    there = {(kernel, key) for kernel, table in configs.TABLES[arch].items() for key in table}
    used = {(e.name, configs.resolve(arch, e.name, e.key)) for e in entries() if arch in e.only}
    assert there == used


def test_both_widths_of_numbers_are_compiled_for_every_head_size_and_row_width() -> None:
    keys: dict[str, set[str]] = {}
    for entry in entries():
        keys.setdefault(entry.name, set()).add(entry.key)
    for name in ("rms_norm_forward", "rms_norm_backward"):
        assert keys[name] == {f"{width}{dtype}" for width in configs.WIDTHS for dtype in ("", "/fp32")}
    for name in ("attention_forward", "attention_dkdv", "attention_dq", "decode_split"):
        assert keys[name] >= {f"{dim}{dtype}" for dim in (64, 80, 96, 128, 256) for dtype in ("", "/fp32")}


def test_hash_follows_the_source_of_what_a_kernel_calls() -> None:
    by_name = {entry.name: source_hash(entry.kernel) for entry in entries()}
    assert len(set(by_name.values())) == len(by_name)
    forward = next(entry for entry in entries() if entry.name == "attention_forward")
    helper = forward.kernel.fn.__globals__["_visible"]
    before, original = source_hash(forward.kernel), helper.fn
    other = next(entry for entry in entries() if entry.name == "gae_scan").kernel.fn
    helper.fn = other
    try:
        assert source_hash(forward.kernel) != before
    finally:
        helper.fn = original
    assert source_hash(forward.kernel) == before


def test_a_published_timing_is_stale_once_its_kernel_has_changed(tmp_path: Path) -> None:
    hashes = {entry.label: timing_hash(entry, "sm_90") for entry in entries()}
    record = {"arch": "sm_90", "hashes": hashes}
    assert staleness.stale(record) == []
    record["hashes"] = {**hashes, "gae_scan": "0" * 16, "a kernel that is gone": "1" * 16}
    assert staleness.stale(record) == ["gae_scan", "a kernel that is gone"]
    assert "nothing has been measured" in staleness.summary(tmp_path)
    (tmp_path / "h200.json").write_text(json.dumps(record), encoding="utf-8")
    assert staleness.summary(tmp_path) == "h200.json: STALE for gae_scan, a kernel that is gone"


def test_a_timing_is_stale_once_the_code_that_launches_its_kernel_has_changed(tmp_path: Path) -> None:
    op = tmp_path / "linear_logprob"
    shutil.copytree(Path(configs.__file__).parent / "linear_logprob", op)
    before, text = host_hash(op), (op / "triton.py").read_text(encoding="utf-8")
    (op / "triton.py").write_text(f"# a remark\n{text}", encoding="utf-8")
    (op / "reference.py").write_text("", encoding="utf-8")
    assert host_hash(op) == before
    (op / "triton.py").write_text(text.replace("CHUNK_ROWS = 8192", "CHUNK_ROWS = 4096"), encoding="utf-8")
    assert host_hash(op) != before


def test_tuning_drops_blocks_that_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    space = {"ranking_forward": {"BLOCK": (32, 64), "num_warps": (4,), "num_stages": (2,)}}
    monkeypatch.setattr(tune, "_SPACE", space)
    (proposals,) = tune.propose("sm_90").values()
    assert [proposal["blocks"]["BLOCK"] for proposal in proposals] == [32]  # 64 spills
