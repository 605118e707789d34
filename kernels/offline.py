"""Compile a kernel for a GPU that is not here, and read what came out: registers, spills, memory, instructions.

A stand-in driver answers what Triton asks before a launch, so arguments are specialised exactly as at run time
(divisible by 16, equal to 1).  Never in a process with TRITON_INTERPRET=1; set TRITON_DISABLE_LINE_INFO=1 for a
cubin that does not depend on where the source lies.
"""

from __future__ import annotations

import collections
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor

SHARED_PER_BLOCK = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}  # bytes, opt-in
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_OPCODE = re.compile(r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)", re.M)


class _StandIn:
    """The part of a Triton driver that compilation asks."""

    def __init__(self, arch: str, index: int) -> None:
        self.target, self.index = TARGETS[arch], index

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.index  # kernels are cached by device: one number a target

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_capability(self, *args: Any) -> tuple[int, int]:
        arch = self.target.arch
        return divmod(arch, 10) if isinstance(arch, int) else (9, 4)

    def get_device_interface(self) -> Any:
        return torch

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


_DRIVERS = {arch: _StandIn(arch, index) for index, arch in enumerate(TARGETS)}


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes of a multiprocessor, and the instructions that decide its speed."""

    registers: int  # a thread
    spills: int  # local loads and stores, instructions
    shared: int  # bytes a block
    threads: int  # a block
    mma: Mapping[str, int]  # tensor-core instructions by kind: HMMA, HGMMA, UTCMMA, MFMA
    loads: Mapping[str, int]  # global loads by width in bits; "U16" is one number at a time
    tma: int  # bulk tensor loads and stores
    setmaxnreg: int  # > 0: warps are specialised
    code: str  # sha256 of the binary, 16 hex digits

    def row(self) -> dict[str, Any]:
        """The numbers that are committed and compared (the code's hash is not: it has its own check)."""
        return {
            "registers": self.registers, "spills": self.spills, "shared": self.shared, "threads": self.threads,
            "mma": dict(self.mma), "loads": dict(self.loads), "tma": self.tma, "setmaxnreg": self.setmaxnreg,
        }  # fmt: skip


def pointer(dtype: torch.dtype) -> MockTensor:
    """An aligned pointer argument."""
    return MockTensor(dtype)


def compile_for(arch: str, kernel: Any, args: Sequence[Any], meta: Mapping[str, Any]) -> Resources:
    """Compile as a launch with these arguments would.  Raises what Triton raises."""
    driver.set_active(_DRIVERS[arch])
    compiled = kernel.warmup(*args, grid=(1, 1, 1), **meta)
    return _amd(compiled) if arch.startswith("gfx") else _nvidia(compiled)


def _tool(name: str, binary: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(_TOOLS / name), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _width(opcode: str) -> str:
    found = re.search(r"\.(128|64|U16|S16|U8|S8)\b", opcode)
    return found.group(1) if found else "32"


def _nvidia(compiled: Any) -> Resources:
    cubin = compiled.asm["cubin"]
    usage = _tool("cuobjdump", cubin, "--dump-resource-usage")
    opcodes = collections.Counter(_OPCODE.findall(_tool("nvdisasm", cubin, "-c")))
    loads: collections.Counter[str] = collections.Counter()
    mma: collections.Counter[str] = collections.Counter()
    for opcode, count in opcodes.items():
        if opcode.startswith(("LDG.", "LDGSTS")):
            loads[_width(opcode)] += count
        kind = re.match(r"(HGMMA|HMMA|QGMMA|UTC\w*MMA)", opcode)
        if kind:
            mma[kind.group(1)] += count
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", compiled.asm["ptx"])
    registers = re.search(r"\bREG:(\d+)", usage)
    return Resources(
        registers=int(registers.group(1)) if registers else 0,
        spills=_count(opcodes, "STL", "LDL"),
        shared=compiled.metadata.shared,
        threads=int(threads.group(1)) if threads else compiled.metadata.num_warps * 32,
        mma=dict(mma),
        loads=dict(sorted(loads.items())),
        tma=_count(opcodes, "UTMALDG", "UTMASTG"),
        setmaxnreg=_count(opcodes, "USETMAXREG"),
        code=hashlib.sha256(cubin).hexdigest()[:16],
    )


def _count(opcodes: Mapping[str, int], *prefixes: str) -> int:
    return sum(count for opcode, count in opcodes.items() if opcode.split(".")[0] in prefixes)


def _amd(compiled: Any) -> Resources:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found.group(1)) if found else 0

    return Resources(
        registers=number("vgpr_count"),
        spills=number("vgpr_spill_count"),
        shared=compiled.metadata.shared,
        threads=compiled.metadata.num_warps * 64,
        mma={"MFMA": len(re.findall(r"v_mfma", text))} if "v_mfma" in text else {},
        loads={"128": len(re.findall(r"(?:global|buffer)_load_dwordx4", text))},
        tma=0,
        setmaxnreg=0,
        code=hashlib.sha256(compiled.asm["hsaco"]).hexdigest()[:16],
    )
