"""Every Triton kernel, forward and every gradient, on adversarial shapes."""

from __future__ import annotations

import pytest

from tests.kernels.catalogue import CATALOGUE

NAMES = [(op, case) for op, cases in CATALOGUE.items() for case in cases]


@pytest.mark.parametrize(("op", "case"), NAMES, ids=[f"{op}: {case}" for op, case in NAMES])
def test_kernel_is_as_accurate_as_torch(op: str, case: str) -> None:
    CATALOGUE[op][case]()
