"""Markers that follow from what a test file uses, and one thread a process: ranks are forked, OpenMP cannot be."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, settings

_RESUME_FILES = ("test_resume", "test_kill")

# How long an example takes says how busy the machine is, and nothing about the claim; a folder that examples share is
# written anew by each.
_FINE = (HealthCheck.too_slow, HealthCheck.function_scoped_fixture)
settings.register_profile("a busy machine", deadline=None, suppress_health_check=_FINE)
settings.load_profile("a busy machine")


def pytest_configure() -> None:
    """Before any test makes a thread pool."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``resume`` by file name; ``ranks`` where the module, or a test module it takes things from, starts ranks."""
    known: dict[str, bool] = {}
    for item in items:
        if item.path.stem.startswith(_RESUME_FILES):
            item.add_marker(pytest.mark.resume)
        elif isinstance(item, pytest.Function) and _starts_ranks(item.module, known):
            item.add_marker(pytest.mark.ranks)


def _starts_ranks(module: ModuleType, known: dict[str, bool]) -> bool:
    if module.__name__ not in known:
        known[module.__name__] = False  # a circle ends here
        owners = {getattr(value, "__module__", None) for value in vars(module).values()}
        parts = [value for value in vars(module).values() if isinstance(value, ModuleType)]
        names = {part.__name__ for part in parts} | {str(owner) for owner in owners}
        others = [name for name in names if name.startswith("tests.") and name != module.__name__]
        known[module.__name__] = "tests.helpers.ranks" in others or any(
            _starts_ranks(sys.modules[name], known) for name in others if name in sys.modules
        )
    return known[module.__name__]
