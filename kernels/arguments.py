"""Argument checks the ops share.  They read shapes, dtypes and devices; only ``host_ends`` and ``require_below`` may
wait for a device, and say when.  ``require_within`` reads numbers where that waits for nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import dispatch

# Checks are made at every call of an op: what they say is put into words only where they fail.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def require(condition: bool, message: str) -> None:
    """Raise ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def given(**tensors: Tensor | None) -> dict[str, Tensor]:
    """Those of some optional arguments that are not None."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def require_tensor(tensor: object, name: str) -> None:
    """A tensor, and not a list of numbers or None."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")


def require_float(**tensors: Tensor) -> None:
    """Each is a tensor of fp16, bf16, fp32 or fp64."""
    for name, tensor in tensors.items():
        require_tensor(tensor, name)
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} must be a float tensor, got {tensor.dtype}")


def require_integer(**tensors: Tensor) -> None:
    """Each is a tensor of int32 or int64."""
    for name, tensor in tensors.items():
        require_tensor(tensor, name)
        if tensor.dtype not in INTEGERS:
            raise ValueError(f"{name} must be int32 or int64, got {tensor.dtype}")


def require_same_device(**tensors: Tensor | None) -> None:
    """All that are not None are tensors and live on one device."""
    known = given(**tensors)
    for name, tensor in known.items():
        require_tensor(tensor, name)
    if len({tensor.device for tensor in known.values()}) > 1:
        devices = {name: tensor.device for name, tensor in known.items()}
        raise ValueError(f"tensors must share one device, got {devices}")


def require_window(window: int | None) -> None:
    """A sliding window is a number of keys, or None."""
    good = window is None or (isinstance(window, int) and not isinstance(window, bool) and window >= 1)
    require(good, f"window must be a whole number of keys, 1 or more, or None, got {window!r}")


def require_shape(tensor: Tensor, shape: Sequence[int | None], name: str) -> None:
    """A tensor of this shape; None stands for any size."""
    require_tensor(tensor, name)
    good = tensor.dim() == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not good:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(tensor.shape)}")


def host_ends(cu_seqlens: Tensor, ends: Sequence[int] | None, total: int, name: str) -> list[int] | None:
    """The sequence ends on the host: ``ends`` where given, else read from the tensor, which waits for its device.

    None where a tensor has no numbers to read: while a graph is captured or traced.  Raises ValueError where they are
    known and do not rise from 0 to ``total``.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name} must be [sequences + 1], got {list(cu_seqlens.shape)}")
    if ends is None:
        if not _readable(cu_seqlens):
            return None
        ends = cu_seqlens.tolist()
    known = list(ends)
    require(len(known) == cu_seqlens.shape[0], f"{name} has {cu_seqlens.shape[0]} ends, its host copy {len(known)}")
    rising = known[0] == 0 and all(a <= b for a, b in itertools.pairwise(known))
    if not rising or known[-1] != total:
        raise ValueError(f"{name} must rise from 0 to the {total} tokens given, got {known}")
    return known


def require_below(index: Tensor, limit: int, name: str) -> None:
    """Every number is below ``limit``; waits for the tensor's device, and checks nothing while a graph is made."""
    if index.numel() and _readable(index):
        highest = int(index.max())
        require(highest < limit, f"{name} must be below {limit}, got {highest}")


def require_within(index: Tensor, limit: int, name: str, counted: Tensor | None = None) -> None:
    """Every number (where ``counted``) is 0 .. limit - 1.

    Looks on a CPU only, outside a graph: elsewhere the caller's docstring says what wrong numbers do.
    """
    if index.device.type != "cpu" or not _readable(index):
        return
    if counted is None and index.numel():
        low, high = torch.aminmax(index)
        if int(low) >= 0 and int(high) < limit:
            return
    wrong = (index < 0) | (index >= limit)
    if counted is not None:
        wrong &= counted
    if wrong.any():
        raise ValueError(f"{name} must be 0 .. {limit - 1}, got {int(index[wrong][0])}")


def _readable(tensor: Tensor) -> bool:
    return not dispatch.traced(tensor) and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
