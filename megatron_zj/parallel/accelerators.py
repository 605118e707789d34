"""What megatron-core would take wherever it is installed, and must not: PyPI's apex, Transformer Engine on a CPU."""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from typing import Literal

_log = logging.getLogger(__name__)

ApexKind = Literal["absent", "nvidia", "foreign"]


def apex_kind() -> ApexKind:
    """Which ``apex`` this Python would import, found without importing it.

    NVIDIA's has the subpackage ``optimizers`` (FusedAdam); the one on PyPI is a web toolkit and has not.
    """
    if "apex" in sys.modules and sys.modules["apex"] is None:
        return "foreign"  # refused below, earlier
    try:
        spec = importlib.util.find_spec("apex")
    except ValueError:  # a stand-in module without a spec
        return "nvidia" if hasattr(sys.modules["apex"], "optimizers") else "foreign"
    if spec is None:
        return "absent"
    folders = [Path(folder) / "optimizers" for folder in spec.submodule_search_locations or ()]
    return "nvidia" if any(folder.is_dir() for folder in folders) else "foreign"


def refuse_foreign_apex() -> ApexKind:
    """Report PyPI's ``apex`` and make ``import apex`` fail, so that megatron-core falls back to torch's AdamW."""
    kind = apex_kind()
    if kind == "foreign" and sys.modules.get("apex", True) is not None:
        sys.modules["apex"] = None  # type: ignore[assignment]  # Python's own way to say "not importable"
        _log.warning(
            "the installed package 'apex' is not NVIDIA's apex but an unrelated project of the same name on PyPI; "
            "it is not used. Remove it (pip uninstall apex); NVIDIA's is built from github.com/NVIDIA/apex"
        )
    return kind


def hide_transformer_engine() -> None:
    """Make ``import transformer_engine`` fail, so that megatron-core does without; for processes without a GPU.

    Its fused Adam would be everybody's optimizer, and needs a GPU; so may importing it.
    """
    if importlib.util.find_spec("transformer_engine") is not None:
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]
