"""The Triton kernels themselves: in the interpreter (a process of its own) or on a CUDA device.

``python -m kernels.check interpreter`` and ``python -m kernels.check gpu`` run this folder.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernels import dispatch

if dispatch.interpreting():
    from tests.kernels import honest

    honest.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the folder where the kernels can neither be interpreted nor run."""
    if dispatch.interpreting() or (torch.cuda.is_available() and dispatch.has_triton()):
        return
    skip = pytest.mark.skip(reason="needs TRITON_INTERPRET=1 or CUDA: python -m kernels.check interpreter")
    for item in items:
        if "tests/kernels/triton_forms/" in item.path.as_posix():
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _poisoned_outputs() -> Iterator[None]:
    """Memory from ``torch.empty`` starts as NaN (integers: the largest), so that what a kernel forgets shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # this is what fills new memory; cuBLAS may warn
    yield
    torch.use_deterministic_algorithms(before)
