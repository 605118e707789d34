"""The process's memory: how much it has needed at most, and whether the C library gives back what is freed."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

import torch

_MIB = 1024.0
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # bytes; glibc takes no more


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed, blocks of 32 MiB and more excepted; whether it could be told.

    By default it hands the large tensors of every step back to the kernel and fetches them anew, each page cleared:
    some 5 % of a CPU update.  The process then stays as large as it once was.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)) and bool(mallopt(_TRIM_THRESHOLD, -1))


def peak_memory_mib(device: torch.device) -> float:
    """Peak in MiB: of the CUDA caching allocator's tensors on ``device``, or of this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MIB**2
    return _peak_resident_kib() / _MIB


def _peak_resident_kib() -> float:
    """``VmHWM`` where Linux has it: ``ru_maxrss`` starts at the size of the parent that forked this process."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return float(lines["VmHWM"].split()[0])
