"""PyPI's apex is recognised, reported and never imported, NVIDIA's is left alone; no Transformer Engine on a CPU."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_zj.parallel import accelerators


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    return tmp_path


def _package(site: Path, *folders: str) -> None:
    for folder in ("apex", *folders):
        (site / folder).mkdir()
        (site / folder / "__init__.py").write_text("raise RuntimeError('this must not be imported')\n")


def test_pypi_apex_is_reported_and_cannot_be_imported(
    site: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    _package(site, "apex/amp")
    monkeypatch.setitem(sys.modules, "apex", None)  # restored (removed) at the end, whatever happens
    del sys.modules["apex"]
    with caplog.at_level(logging.WARNING):
        assert accelerators.refuse_foreign_apex() == "foreign"
    assert "not NVIDIA's apex" in caplog.text
    assert "pip uninstall apex" in caplog.text
    with pytest.raises(ImportError):
        __import__("apex.optimizers")
    caplog.clear()
    assert accelerators.refuse_foreign_apex() == "foreign"  # said once
    assert not caplog.records


def test_nvidia_apex_is_left_alone(site: Path, caplog: pytest.LogCaptureFixture) -> None:
    _package(site, "apex/optimizers")
    assert accelerators.refuse_foreign_apex() == "nvidia"
    assert "apex" not in sys.modules  # and not imported either
    assert not caplog.records


def test_no_apex_is_no_problem(site: Path) -> None:
    assert accelerators.refuse_foreign_apex() == "absent"


def test_transformer_engine_is_left_alone_by_a_process_without_a_gpu(site: Path) -> None:
    """As on a GPU machine whose devices are hidden from a run on the CPU."""
    (site / "transformer_engine").mkdir()
    (site / "transformer_engine/__init__.py").write_text("raise OSError('libcuda.so.1: cannot open')\n")
    optimizer = "import megatron_zj.parallel, megatron.core.optimizer as o, torch; assert o.Adam is torch.optim.AdamW"
    environment = {**os.environ, "PYTHONPATH": str(site), "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-c", optimizer]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
