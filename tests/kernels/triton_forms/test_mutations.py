"""The proofs notice every planted bug; without that, green proofs would prove little."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from kernels import dispatch
from tests.kernels import mutations
from tests.kernels.mutations import BUGS, Bug

# Kinds of bugs, by their names.
KINDS = {
    "accumulator": r"in bf16",
    "tail": r"tail|padding|too many|last .*(skipped|dropped)|rows skipped|newest",
    "scale": r"scale",
    "mask": r"mask.*(early|late|off|forgotten)",
    "group": r"group|key head|head of the",
    "rescale": r"rescaled",
    "boundary": r"boundary|neighbour|batch|first row|rows overlap|length ignored",
}
OF_ALL = {"accumulator", "tail"}
REQUIRED = {
    "attention_forward": {*KINDS},
    "attention_forward_dense": {*KINDS},
    "attention_forward_specialized": {*KINDS},
    "attention_dkdv": {*KINDS} - {"rescale"},
    "attention_dq": {*KINDS} - {"rescale"},
    "decode_split": {*KINDS},
    "logprob_forward": {*OF_ALL, "rescale"},
}
EXEMPT = {
    ("rope_rotate", "accumulator"): "it accumulates nothing",
}


def _short() -> set[str]:
    """Two bugs a kernel: the first, and one that only a tail, an accumulator or a boundary shows."""
    chosen = set()
    for kernel in {bug.kernel for bug in BUGS}:
        listed = [bug for bug in BUGS if bug.kernel == kernel]
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


def test_every_kernel_has_the_named_bugs() -> None:
    missing = []
    for kernel in {bug.kernel for bug in BUGS}:
        names = [bug.name for bug in BUGS if bug.kernel == kernel]
        for kind in sorted(REQUIRED.get(kernel, OF_ALL)):
            if (kernel, kind) not in EXEMPT and not any(re.search(KINDS[kind], name) for name in names):
                missing.append(f"{kernel}: {kind}")
    assert not sorted(missing)
