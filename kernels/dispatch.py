"""Which body of an op runs: the Triton kernel on CUDA, the torch reference elsewhere.

A choice is made once, in the forward call, and travels with the autograd graph: a backward pass runs on the backend
of its forward pass, whatever thread it runs in.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Backend = Literal["triton", "torch"]
DenseForm = Literal["portable", "tma", "specialized"]
_HAS_TRITON = importlib.util.find_spec("triton") is not None  # once: torch.compile traces through ``backend_of``


class Registry:
    """The process-wide state of dispatch: the forced backend and the launches seen by ``record_launches``."""

    forced: Backend | None = None
    dense: DenseForm = "portable"
    recording: bool = False
    launches: ClassVar[Counter[str]] = Counter()


@contextmanager
def use(backend: Backend | None) -> Iterator[None]:
    """Force every op called inside to this backend; None gives the choice back to the device.

    ``use("triton")`` on CPU tensors works only under Triton's interpreter (TRITON_INTERPRET=1).
    """
    if backend not in ("triton", "torch", None):
        raise ValueError(f"backend must be 'triton', 'torch' or None, got {backend!r}")
    before = Registry.forced
    Registry.forced = backend
    try:
        yield
    finally:
        Registry.forced = before


@contextmanager
def use_dense(form: DenseForm) -> Iterator[None]:
    """Inside, attention over rows of one length takes this form where device, Triton and tensors allow it.

    "tma": bulk copies (sm_90 and newer).  "specialized": the copies have warps of their own besides (sm_90, and the
    Triton versions known to compile it).  "portable", the default: which form is faster has not been measured.
    """
    if form not in get_args(DenseForm):
        raise ValueError(f"form must be one of {get_args(DenseForm)}, got {form!r}")
    before = Registry.dense
    Registry.dense = form
    try:
        yield
    finally:
        Registry.dense = before


def backend_of(tensor: Tensor) -> Backend:
    """The backend for an op on this tensor.

    Raises NotImplementedError where Triton is forced and cannot run: no Triton, or a CPU tensor and no interpreter.
    """
    if Registry.forced == "torch" or (Registry.forced is None and not (tensor.is_cuda and has_triton())):
        return "torch"
    if not has_triton():
        raise NotImplementedError("the Triton kernels are forced but the package triton is not installed")
    if not tensor.is_cuda and not interpreting():
        raise NotImplementedError(
            f"the Triton kernels are forced on a {tensor.device.type} tensor: they need a CUDA device, "
            "or TRITON_INTERPRET=1 set before the process starts"
        )
    return "triton"


def eager(tensor: Tensor, backend: Backend) -> bool:
    """Whether an op on this tensor goes around ``torch.library``: the torch form on the CPU, outside torch.compile.

    An ``autograd.Function`` over the reference is called for a tenth of a registered op's price, and may keep for its
    backward pass what the registered schema has no place for.  Both give the same numbers.
    """
    return backend == "torch" and not tensor.is_cuda and not traced(tensor)


def traced(tensor: Tensor) -> bool:
    """Whether this tensor has a shape only, or its operations are being recorded by torch.compile."""
    return torch.compiler.is_compiling() or isinstance(tensor, FakeTensor)


def has_triton() -> bool:
    """Whether the package triton is installed."""
    return _HAS_TRITON


def interpreting() -> bool:
    """Whether this process runs Triton kernels in the interpreter."""
    return has_triton() and bool(importlib.import_module("triton").knobs.runtime.interpret)


def triton_form(op: str) -> ModuleType:
    """The module ``kernels.<op>.triton``, imported at first use so that torch alone is enough on a CPU."""
    return importlib.import_module(f"kernels.{op}.triton")


def launch(kernel: Any, grid: Sequence[int], *args: Any, **meta: Any) -> None:
    """Run a Triton kernel over ``grid``, on its arguments' device, and count it; a grid with a zero does nothing."""
    if 0 in grid:
        return
    if Registry.recording:
        Registry.launches[kernel.fn.__name__] += 1
    device = next((arg.device for arg in args if isinstance(arg, Tensor)), None)
    with torch.cuda.device(device) if device is not None and device.type == "cuda" else nullcontext():
        kernel[tuple(grid)](*args, **meta)


@contextmanager
def record_launches() -> Iterator[Counter[str]]:
    """Count the kernel launches inside, by kernel name."""
    Registry.launches = Counter()
    Registry.recording = True
    try:
        yield Registry.launches
    finally:
        Registry.recording = False
