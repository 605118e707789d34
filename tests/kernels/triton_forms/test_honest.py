"""The interpreter, made honest, notices what a GPU would get wrong."""

from __future__ import annotations

import pytest
import torch

from kernels import dispatch

if not dispatch.interpreting():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.kernels.cases import normal


@triton.jit
def _add(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i) + tl.load(y_ptr + i))


@triton.jit
def _round(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, (tl.load(x_ptr + i) * 1.0).to(out_ptr.dtype.element_ty))


@triton.jit
def _product(a_ptr, b_ptr, out_ptr, SIDE: tl.constexpr):
    i = tl.arange(0, SIDE)
    place = i[:, None] * SIDE + i[None, :]
    tl.store(out_ptr + place, tl.dot(tl.load(a_ptr + place), tl.load(b_ptr + place)))


@triton.jit
def _masked(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < count))


@triton.jit
def _shared(x_ptr, out_ptr, WRITE: tl.constexpr):
    program = tl.program_id(0)
    if WRITE:
        tl.store(out_ptr, program)
    else:
        tl.store(out_ptr + program, tl.load(out_ptr + 1 - program) + tl.load(x_ptr))


def test_bf16_sums_casts_and_products_are_those_of_torch() -> None:
    x, y = normal(64, dtype=torch.bfloat16), normal(64, dtype=torch.bfloat16, seed=1)
    out = torch.empty_like(x)
    _add[(1,)](x, y, out, BLOCK=64)
    assert torch.equal(out, x + y)
    wide = torch.cat((normal(61, dtype=torch.float32), torch.tensor([1.9999, float("inf"), 1e-40])))
    _round[(1,)](wide, out, BLOCK=64)
    assert torch.equal(out, wide.bfloat16())
    a, b = normal(16, 16, dtype=torch.bfloat16), normal(16, 16, dtype=torch.bfloat16, seed=1)
    product = torch.empty(16, 16)
    _product[(1,)](a, b, product, SIDE=16)
    torch.testing.assert_close(product, a.float() @ b.float(), rtol=1e-6, atol=1e-6)


def test_a_masked_load_without_other_is_poison() -> None:
    out = torch.empty(16)
    _masked[(1,)](torch.ones(16), out, 4, BLOCK=16)
    assert torch.equal(out.isnan(), torch.arange(16) >= 4)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_a_masked_load_of_integers_without_other_is_large_and_uneven(dtype: torch.dtype) -> None:
    out = torch.empty(16, dtype=dtype)
    _masked[(1,)](torch.ones(16, dtype=dtype), out, 4, BLOCK=16)
    assert (out[:4] == 1).all()
    assert (out[4:].abs() > torch.iinfo(dtype).max // 5).all()
    assert (out[5:] != out[4:-1]).all()


@pytest.mark.parametrize(
    ("kernel", "grid", "args", "fault"),
    [
        (_add, (1,), (torch.ones(8), torch.ones(16), torch.ones(16)), "in no argument"),
        (_add, (1,), (torch.ones(16), torch.ones(16), torch.ones(32)[:12]), "in no argument"),
        (_shared, (2,), (torch.ones(1), torch.zeros(2)), "race"),
        (_product, (1,), (torch.ones(8, 8), torch.ones(8, 8), torch.ones(8, 8)), "tensor cores"),
    ],
    ids=["a wild load", "a wild store", "a race", "a small dot"],
)
def test_what_a_gpu_would_not_forgive_is_an_error(
    kernel: object, grid: object, args: tuple[object, ...], fault: str
) -> None:
    constants = {"_add": {"BLOCK": 16}, "_shared": {"WRITE": False}, "_product": {"SIDE": 8}}
    with pytest.raises(InterpreterError, match=fault):
        kernel[grid](*args, **constants[kernel.fn.__name__])  # type: ignore[index, attr-defined]


def test_two_programs_that_write_one_address_are_a_race() -> None:
    with pytest.raises(InterpreterError, match="two programs write"):
        _shared[(2,)](torch.ones(1), torch.zeros(2), WRITE=True)
