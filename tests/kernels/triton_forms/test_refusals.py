"""What the Triton kernels do not take is refused before a launch; what they do is the same twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

from kernels import dispatch
from kernels.attention import attention
from kernels.gae import gae
from kernels.linear_logprob import linear_logprob
from kernels.reward_head import reward_head
from kernels.rms_norm import rms_norm
from kernels.swiglu import swiglu
from tests.kernels.cases import ends, normal
from tests.kernels.proofs import DEVICE

DOUBLE = torch.float64
REFUSED: dict[str, Callable[[], object]] = {
    "head size 264": lambda: attention(*(torch.zeros(4, 2, 264, device=DEVICE),) * 3, ends((4,)).to(DEVICE)),
    "fp64 attention": lambda: attention(
        *(torch.zeros(4, 2, 64, dtype=DOUBLE, device=DEVICE),) * 3, ends((4,)).to(DEVICE)
    ),
    "width 20000": lambda: rms_norm(torch.zeros(2, 20000, device=DEVICE), torch.ones(20000, device=DEVICE), 1e-6),
    "fp64 swiglu": lambda: swiglu(torch.zeros(2, 8, dtype=DOUBLE, device=DEVICE)),
    "fp64 weight": lambda: linear_logprob(
        torch.zeros(2, 8, device=DEVICE),
        torch.zeros(9, 8, dtype=DOUBLE, device=DEVICE),
        torch.zeros(2, dtype=torch.int64, device=DEVICE),
    ),
    "fp64 gae": lambda: gae(
        *(torch.zeros(4, dtype=DOUBLE, device=DEVICE),) * 2, ends((4,)).to(DEVICE), gamma=1.0, lam=1.0
    ),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_no_kernel_takes_is_refused_before_a_launch(case: str) -> None:
    with (
        dispatch.use("triton"),
        dispatch.record_launches() as launches,
        pytest.raises(NotImplementedError, match="Triton"),
    ):
        REFUSED[case]()
    assert not launches


def test_rows_that_share_a_last_token_share_its_gradient() -> None:
    hidden, weight, norm = (normal(*shape, dtype=torch.float32).to(DEVICE) for shape in ((6, 40), (40,), (40,)))
    last, slope = torch.tensor([2, 5, 2, -1, 2], device=DEVICE), normal(5, dtype=torch.float32, seed=1).to(DEVICE)
    found = []
    for backend in ("triton", "torch"):
        leaf = hidden.clone().requires_grad_()
        with dispatch.use(backend):  # type: ignore[arg-type]
            scores = reward_head(leaf, last, weight, norm_weight_D=norm)
            found.append(torch.autograd.grad(scores, leaf, slope)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", ["attention", "gae"])
def test_sequence_ends_of_64_bits_reach_the_kernels_as_32(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form, seen = dispatch.triton_form(op), []
    original = form.launch

    def spy(kernel: Any, grid: Any, *args: Any, **meta: Any) -> None:
        seen.extend(x.dtype for x in args if isinstance(x, torch.Tensor) and not x.is_floating_point())
        original(kernel, grid, *args, **meta)

    monkeypatch.setattr(form, "launch", spy)
    cu = ends((5, 3)).to(DEVICE, torch.int64)
    q = normal(8, 2, 16, dtype=torch.float32).to(DEVICE).requires_grad_()
    with dispatch.use("triton"):
        if op == "gae":
            gae(*(torch.zeros(8, device=DEVICE),) * 2, cu, gamma=1.0, lam=1.0)
        else:
            attention(q, q, q, cu)[0].sum().backward()
    assert set(seen) == {torch.int32}


def test_a_head_beyond_two_to_the_31_is_found() -> None:
    far = 1 << 30  # from one head to the next: the third is 2^31 numbers away
    memory = torch.from_numpy(numpy.zeros(2 * far + 64, numpy.float16)).to(DEVICE)  # a CPU gives only the touched pages
    q = memory.as_strided((4, 3, 16), (16, far, 1))
    q.copy_(normal(4, 3, 16, dtype=torch.float32))
    k, cu = normal(4, 3, 16, dtype=torch.float32, seed=1).to(DEVICE, torch.float16), ends((4,)).to(DEVICE)
    dout = normal(4, 3, 16, dtype=torch.float32, seed=2).to(DEVICE, torch.float16)
    found = []
    with dispatch.use("triton"):
        for query, key in ((q, k), (k, q)):
            for one, other in ((query, key), (query.contiguous(), key.contiguous())):
                out, lse = attention(one, other, other, cu)
                grads = dispatch.triton_form("attention").backward(
                    dout, one, other, other, out, lse, cu, cu, None, [0, 4], [0, 4], 0.25, True, 0
                )
                found.append((out, lse, *grads))
            for near, whole in zip(*found[-2:], strict=True):
                assert torch.equal(near, whole)


def test_backward_is_bit_for_bit_repeatable() -> None:
    q, k, v = (normal(40, heads, 64, dtype=torch.float32, seed=heads).to(DEVICE) for heads in (4, 2, 2))
    cu = ends((33, 7)).to(DEVICE)

    def gradients() -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, _ = attention(leaves[0], leaves[1], leaves[2], cu)
        return list(torch.autograd.grad(out.square().sum(), leaves))

    with dispatch.use("triton"):
        for first, second in zip(gradients(), gradients(), strict=True):
            assert torch.equal(first, second)
