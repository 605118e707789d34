"""Make Triton's interpreter tell the truth.  Install after TRITON_INTERPRET=1 has been set and triton imported.

Left alone, it computes with the bits of bf16 numbers as integers and truncates casts to bf16, gives 0 where a masked
load names no ``other`` (on a GPU: anything), runs programs one after the other (so no race shows), and lets a store
outside every tensor overwrite what is there.  Here bf16 is rounded to nearest even, such a load gives NaN or large
integers, and a wild address or two programs at one address are errors.  Works on Triton 3.6 to 3.9.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder
_COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)
_BITS = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
_NOBODY, _SEVERAL = 0, -1


class KernelFault(AssertionError):
    """A kernel did what a GPU would not forgive."""


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: Any) -> Any:
    """A bf16 handle (bits in uint16) as fp32; others unchanged."""
    if not _is_bf16(handle):
        return handle
    bits = np.ascontiguousarray(handle.data).astype(np.uint32) << 16
    return Handle(bits.view(np.float32).reshape(np.shape(handle.data)), tl.float32)


def _narrow(values: Any) -> Any:
    """fp32 numbers as a bf16 handle, rounded by torch."""
    wide = torch.from_numpy(np.array(values, dtype=np.float32))
    bits = wide.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return Handle(bits.reshape(np.shape(values)), tl.bfloat16)


def _install_bf16() -> None:
    plain_cast, plain_convert = Builder.cast_impl, Builder.create_fp_to_fp
    plain_binary, plain_unary, plain_ternary = Builder.binary_op, Builder.unary_op, Builder.ternary_op
    plain_fma, plain_dot = Builder.create_fma, Builder.create_dot

    def cast(self: Any, source: Any, target: Any) -> Any:
        if _is_bf16(source) and target.scalar != tl.bfloat16:
            return plain_cast(self, _widen(source), target)
        if target.scalar == tl.bfloat16 and not _is_bf16(source):
            return _narrow(source.data.astype(np.float32))
        return plain_cast(self, source, target)

    def convert(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if {source.dtype.scalar, target.scalar} == {tl.float32, tl.bfloat16}:
            return cast(self, source, target)
        return plain_convert(self, source, target, rounding)

    def binary(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not (_is_bf16(left) and _is_bf16(right)) or op in _BITS:
            return plain_binary(self, left, right, op)
        result = op(_widen(left).data, _widen(right).data)
        return Handle(result, tl.int1) if op in _COMPARISONS else _narrow(result)

    def unary(self: Any, arg: Any, op: Any) -> Any:
        return _narrow(op(_widen(arg).data)) if _is_bf16(arg) else plain_unary(self, arg, op)

    def ternary(self: Any, a: Any, b: Any, c: Any, op: Any) -> Any:
        if _is_bf16(c) and op is not np.where:
            return _narrow(op(_widen(a).data, _widen(b).data, _widen(c).data))
        return plain_ternary(self, a, b, c, op)

    def fma(self: Any, a: Any, b: Any, c: Any) -> Any:
        if _is_bf16(a):
            return _narrow(_widen(a).data * _widen(b).data + _widen(c).data)
        return plain_fma(self, a, b, c)

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        sides = (*a.data.shape[-2:], b.data.shape[-1])
        if min(sides) < 16:
            raise KernelFault(f"a dot with sides {sides}: tensor cores take 16 and more")
        if a.dtype.scalar != b.dtype.scalar:
            raise KernelFault(f"a dot of {a.dtype.scalar} and {b.dtype.scalar}")
        if d.data.dtype == np.float16:
            raise KernelFault("a dot that accumulates in fp16")
        return plain_dot(self, _widen(a), _widen(b), d, *rest)

    Builder.cast_impl, Builder.create_fp_to_fp = cast, convert
    Builder.binary_op, Builder.unary_op, Builder.ternary_op = binary, unary, ternary
    Builder.create_fma, Builder.create_dot = fma, dot
    for name in ("sum", "min_max"):
        _refuse_bf16(name)


def _refuse_bf16(name: str) -> None:
    plain = getattr(interpreter.ReduceOps, name)

    def reduce(self: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        first = values[0] if isinstance(values, tuple) else values
        if first.dtype.scalar == tl.bfloat16:
            raise KernelFault("a reduction over bf16: cast to fp32 first")
        return plain(self, values, *args, **kwargs)

    setattr(interpreter.ReduceOps, name, reduce)


def _install_index() -> None:
    """Loop bounds are arrays of one element, which numpy >= 2.4 no longer turns into an int (Triton 3.6)."""
    plain = interpreter._patch_lang_tensor

    def index(tensor: Any) -> int:
        return int(np.asarray(tensor.handle.data).reshape(-1)[0])

    def patch(tensor: Any, *scope: Any) -> None:
        plain(tensor, *scope)
        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    interpreter._patch_lang_tensor = patch


class _Memory:
    """The tensors of the running kernel, and which program touched which element."""

    def __init__(self, args: Any) -> None:
        spans: list[tuple[int, int, int]] = []
        self._collect(args, spans)
        merged: list[list[int]] = []
        for start, end, size in sorted(spans):
            if merged and start < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
                merged[-1][2] = min(merged[-1][2], size)
            else:
                merged.append([start, end, size])
        self.starts = np.array([span[0] for span in merged], dtype=np.int64)
        self.ends = np.array([span[1] for span in merged], dtype=np.int64)
        self.sizes = np.array([span[2] for span in merged], dtype=np.int64)
        cells = -(-(self.ends - self.starts) // np.maximum(self.sizes, 1))
        self.offsets = np.concatenate(([0], np.cumsum(cells)))
        self.writer = np.zeros(int(self.offsets[-1]), dtype=np.int32)
        self.reader = np.zeros(int(self.offsets[-1]), dtype=np.int32)

    def _collect(self, arg: Any, spans: list[tuple[int, int, int]]) -> None:
        if isinstance(arg, (tuple, list)):
            for item in arg:
                self._collect(item, spans)
        elif hasattr(arg, "base") and hasattr(arg, "block_shape"):
            self._collect(arg.base, spans)
        elif hasattr(arg, "data_ptr") and hasattr(arg, "stride") and arg.numel():
            last = sum((size - 1) * stride for size, stride in zip(arg.shape, arg.stride(), strict=True))
            start, size = arg.data_ptr(), arg.element_size()
            spans.append((start, start + (last + 1) * size, size))

    def cells(self, pointers: Any, mask: Any, size: int, what: str) -> Any:
        """Index of every active address; a fault where one is in no tensor."""
        shape = np.broadcast_shapes(np.shape(pointers), np.shape(mask))
        active = np.broadcast_to(pointers, shape)[np.broadcast_to(mask, shape)].astype(np.int64)
        if not active.size:
            return active
        span = np.searchsorted(self.starts, active, side="right") - 1
        inside = (span >= 0) & (active + size <= self.ends[np.maximum(span, 0)])
        if not inside.all():
            raise KernelFault(f"{what}: {int((~inside).sum())} of {active.size} addresses are in no argument")
        return self.offsets[span] + (active - self.starts[span]) // self.sizes[span]

    def read(self, cells: Any, program: int) -> None:
        writer = self.writer[cells]
        if ((writer != _NOBODY) & (writer != program)).any():
            raise KernelFault("race: a program reads what another one writes")
        before = self.reader[cells]
        self.reader[cells] = np.where((before == _NOBODY) | (before == program), program, _SEVERAL)

    def write(self, cells: Any, program: int) -> None:
        if np.unique(cells).size != cells.size:
            raise KernelFault("one store writes one address twice")
        writer, reader = self.writer[cells], self.reader[cells]
        if ((writer != _NOBODY) & (writer != program)).any():
            raise KernelFault("race: two programs write one address")
        if ((reader != _NOBODY) & (reader != program)).any():
            raise KernelFault("race: a program writes what another one reads")
        self.writer[cells] = program


class _Running:
    memory: _Memory | None = None


def _program() -> int:
    x, y, z = interpreter.interpreter_builder.grid_idx
    nx, ny, _ = interpreter.interpreter_builder.grid_dim
    return 1 + x + nx * (y + ny * z)


def _size(pointers: Any) -> int:
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def _as_bool(mask: Any) -> Any:
    """A mask that is the product of a block and a scalar condition comes as integers; 3.9 refuses those."""
    if isinstance(mask, np.ndarray):  # of a descriptor
        return Handle(mask, tl.int1)
    return mask if mask.data.dtype == np.bool_ else Handle(mask.data.astype(np.bool_), tl.int1)


def _poison(element: Any, addresses: Any) -> Any:
    """NaN; of integers large ones of both signs, so that neither a sum nor a difference of two of them is small."""
    kind = interpreter._get_np_dtype(element)
    if element.is_floating():
        return np.full(np.shape(addresses), 0x7FC0 if element == tl.bfloat16 else np.nan, dtype=kind)
    if element.is_int1():
        return np.ones(np.shape(addresses), dtype=kind)
    large = np.iinfo(kind).max // 2
    odd = addresses.astype(np.int64) // np.dtype(kind).itemsize % 2 == 1
    return np.where(odd, large, -large).astype(kind)


def _install_memory() -> None:
    executor = interpreter.GridExecutor
    plain_args, plain_load, plain_store = (
        executor._init_args_hst,
        Builder.create_masked_load,
        Builder.create_masked_store,
    )

    def take_args(self: Any, args: Any, kwargs: Any) -> Any:
        result = plain_args(self, args, kwargs)
        _Running.memory = _Memory([*result[0], *result[1].values()])
        return result

    def load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **kwargs: Any) -> Any:
        mask = _as_bool(mask)
        memory = _Running.memory
        if memory is not None:
            memory.read(memory.cells(pointers.data, mask.data, _size(pointers), "load"), _program())
        element = pointers.get_element_ty()
        if other is None and not mask.data.all():
            other = Handle(_poison(element, pointers.data), element)
        return plain_load(self, pointers, mask, other, *rest, **kwargs)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **kwargs: Any) -> Any:
        mask = _as_bool(mask)
        memory = _Running.memory
        if memory is not None:
            memory.write(memory.cells(pointers.data, mask.data, _size(pointers), "store"), _program())
        return plain_store(self, pointers, value, mask, *rest, **kwargs)

    def refuse_atomic(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise KernelFault("an atomic: its order, and so its sum, is not deterministic")

    executor._init_args_hst = take_args
    Builder.create_masked_load, Builder.create_masked_store = load, store
    Builder.create_atomic_rmw = refuse_atomic


class _Installed:
    done = False


def install() -> None:
    """Patch the interpreter, once."""
    if _Installed.done:
        return
    _Installed.done = True
    _install_bf16()
    _install_index()
    _install_memory()
