"""The proofs notice every planted bug; without that, green proofs would prove little."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

import pytest

from kernels import dispatch
from tests.kernels import mutations
from tests.kernels.mutations import BUGS, Bug

NAMED = ("no scale", "accumulator in bf16", "tail")  # one bug of a kernel's short form is of these kinds


def _short() -> set[str]:
    """Two bugs a kernel: the first, and one that only a tail, an accumulator or a boundary shows."""
    chosen = set()
    for kernel, bugs in groupby(BUGS, key=lambda bug: bug.kernel):
        listed = list(bugs)
        subtle = [bug for bug in listed[1:] if any(word in bug.name for word in ("tail", "bf16", "boundary", "one "))]
        chosen |= {f"{kernel}: {bug.name}" for bug in (listed[0], (subtle or listed[1:])[0])}
    return chosen


SHORT = _short()


@pytest.mark.parametrize(
    "bug",
    [
        pytest.param(
            bug,
            id=f"{bug.kernel}: {bug.name}",
            marks=[] if f"{bug.kernel}: {bug.name}" in SHORT else [pytest.mark.slow],
        )
        for bug in BUGS
    ],
)
def test_proofs_notice_the_bug(bug: Bug) -> None:
    if not dispatch.interpreting():
        pytest.skip("bugs are planted in the interpreter only")
    assert mutations.killer(bug) is not None, f"{bug.op}/{bug.kernel}: nothing noticed {bug.name!r}"


def test_every_kernel_has_eight_bugs() -> None:
    assert min(Counter(bug.kernel for bug in BUGS).values()) >= 8
