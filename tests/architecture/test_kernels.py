"""kernels/: every op is whole, and the package cannot be mistaken for Hugging Face's of the same name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import megatron_zj
from tests.architecture.source import ROOT

FILES = ("__init__.py", "reference.py", "triton.py")


def missing_parts(root: Path) -> list[str]:
    """What each ``kernels/<op>/`` lacks: a file, a test that names the op, an entry in kernels/bench.py."""
    bench = root / "kernels" / "bench.py"
    measured = bench.read_text(encoding="utf-8") if bench.exists() else ""
    tested = "\n".join(path.read_text(encoding="utf-8") for path in sorted((root / "tests" / "kernels").glob("*.py")))
    findings = []
    for op in sorted(path for path in (root / "kernels").iterdir() if (path / "__init__.py").exists()):
        findings += [f"{op.name}: no {name}" for name in FILES if not (op / name).exists()]
        findings += [f"{op.name}: no test names it"] if op.name not in tested else []
        findings += [f"{op.name}: no entry in kernels/bench.py"] if op.name not in measured else []
    return findings


def test_every_op_has_a_reference_a_kernel_a_test_and_a_bench_entry() -> None:
    assert missing_parts(ROOT) == []


def test_a_missing_part_is_found(tmp_path: Path) -> None:
    (tmp_path / "tests" / "kernels").mkdir(parents=True)
    op = tmp_path / "kernels" / "rope"
    op.mkdir(parents=True)
    (op / "__init__.py").touch()
    assert missing_parts(tmp_path) == [
        "rope: no reference.py", "rope: no triton.py", "rope: no test names it", "rope: no entry in kernels/bench.py",
    ]  # fmt: skip
    for name in FILES:
        (op / name).touch()
    (tmp_path / "tests" / "kernels" / "test_rope.py").write_text("from kernels.rope import rope")
    (tmp_path / "kernels" / "bench.py").write_text("OPS = ['rope']")
    assert missing_parts(tmp_path) == []


def test_the_package_itself_is_empty() -> None:
    assert (ROOT / "kernels" / "__init__.py").read_text() == ""  # transformers looks for names in it


def test_the_foreign_package_is_refused_with_what_to_do(tmp_path: Path) -> None:
    info = tmp_path / "kernels-0.18.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.3\n")
    program = f"import sys; sys.path.append({str(tmp_path)!r}); import megatron_zj"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "'kernels' (0.18.3) is installed" in result.stderr
    assert "pip uninstall kernels" in result.stderr
    megatron_zj.refuse_foreign_kernels()  # and silent where it is not installed


def test_transformers_does_not_take_ours_for_it() -> None:
    pytest.importorskip("transformers")
    program = "from transformers.utils.import_utils import is_kernels_available; assert not is_kernels_available()"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
