"""The registered ops on Triton: schema, FakeTensor and autograd agree with what the kernels do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.proofs import DEVICE
from tests.kernels.test_library import CALLS


def _there(argument: object) -> object:
    if not isinstance(argument, Tensor):
        return argument
    return argument.detach().to(DEVICE).requires_grad_(argument.requires_grad)


@pytest.mark.parametrize("name", sorted(CALLS))
def test_opcheck_accepts_the_triton_form(name: str) -> None:
    op, arguments = CALLS[name]
    assert arguments[-1] == "torch"
    torch.library.opcheck(op, (*(_there(argument) for argument in arguments[:-1]), "triton"))
