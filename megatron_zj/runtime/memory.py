"""How much memory this process has needed at most."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

_MIB = 1024.0


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
