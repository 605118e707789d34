"""Block sizes, warps and pipeline stages: one committed table per architecture, never autotuned in a run.

``python -m kernels.bench tune`` proposes new tables.  A kernel's key is what its best blocks depend on: head size for
attention, width for row kernels, "" where nothing does.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kernels import dispatch

Config = Mapping[str, int]
Table = Mapping[str, Mapping[str, Config]]

WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def _rows(warps_per: int, most: int) -> dict[str, Config]:
    """Row kernels: enough rows a program for 1,024 elements, a warp per ``warps_per`` of them."""
    table: dict[str, Config] = {}
    for width in WIDTHS:
        rows = max(1, 1024 // width)
        table[str(width)] = {"ROWS": rows, "num_warps": min(max(rows * width // warps_per, 1), most), "num_stages": 2}
    return table


def _blocks(num_warps: int, num_stages: int, **blocks: int) -> Config:
    return {**blocks, "num_warps": num_warps, "num_stages": num_stages}


_ROW_KERNELS: Table = {
    "rms_norm_forward": _rows(512, 16),
    "rms_norm_backward": {**_rows(512, 16), "16384/fp32": _blocks(32, 2, ROWS=1)},  # 16 warps spill
    "swiglu_forward": {"": _blocks(4, 2, BLOCK=1024)},
    "swiglu_backward": {"": _blocks(4, 2, BLOCK=1024)},
    "rope_rotate": {"": _blocks(4, 2, ROWS=32)},
    "gae_scan": {"": _blocks(4, 2, BLOCK=1024)},
    "value_head_forward": {"": _blocks(4, 3, ROWS=4, BLOCK=512)},
    "value_head_backward": {"": _blocks(4, 3, ROWS=32, BLOCK=256)},
    "reward_head_forward": {"": _blocks(4, 3, BLOCK=1024)},
    "reward_head_backward": {"": _blocks(1, 2, BLOCK=256)},
    "ranking_forward": {"": _blocks(4, 2, BLOCK=32)},
    "ranking_backward": {"": _blocks(4, 2, BLOCK=32)},
    "attention_delta": {"": _blocks(4, 2, ROWS=64)},
    "decode_combine": {"": _blocks(4, 2)},
}

_TABLES: dict[str, Table] = {
    # Small blocks: the shapes of a test then cross many block edges.
    "interpreter": {
        **{
            kernel: {
                key: {
                    name: (16 if name == "BLOCK" else 2) if name.isupper() else value for name, value in config.items()
                }
                for key, config in table.items()
            }
            for kernel, table in _ROW_KERNELS.items()
        },
        "rms_norm_forward": {"": _blocks(1, 1, ROWS=2)},
        "rms_norm_backward": {"": _blocks(1, 1, ROWS=2)},
        "rope_rotate": {"": _blocks(1, 1, ROWS=8)},
        "attention_delta": {"": _blocks(1, 1, ROWS=32)},
        "attention_forward": {"": _blocks(1, 1, BM=32, BN=16)},
        "attention_dkdv": {"": _blocks(1, 1, BM=16, BN=32)},
        "attention_dq": {"": _blocks(1, 1, BM=32, BN=16)},
        "decode_split": {"": _blocks(1, 1, BN=16, CHUNK=32)},
        "attention_forward_dense": {"": _blocks(1, 1, BM=32, BN=16)},
        "attention_forward_specialized": {"": _blocks(1, 1, BM=32, BN=16)},
        "logprob_forward": {"": _blocks(1, 1, BT=16, BV=32, BD=32)},
        "logprob_dlogits": {"": _blocks(1, 1, BT=16, BV=32, BD=32)},
    },
    "sm_80": {
        **_ROW_KERNELS,
        "attention_forward": {
            "64": _blocks(8, 3, BM=128, BN=64),
            "80": _blocks(8, 2, BM=128, BN=64),
            "96": _blocks(8, 2, BM=128, BN=64),
            "128": _blocks(8, 3, BM=128, BN=64),
            "256": _blocks(8, 2, BM=64, BN=32),
            "fp32": _blocks(8, 1, BM=32, BN=32),
            "256/fp32": _blocks(8, 1, BM=16, BN=16),
        },
        "attention_dkdv": {
            "40": _blocks(8, 1, BM=32, BN=64),  # the mask of a size that is no power of two takes registers
            "64": _blocks(4, 2, BM=32, BN=64),
            "128": _blocks(8, 2, BM=32, BN=64),
            "256": _blocks(8, 1, BM=32, BN=32),
            "fp32": _blocks(8, 1, BM=16, BN=32),
            "64/fp32": _blocks(8, 1, BM=16, BN=16),
        },
        "attention_dq": {
            "64": _blocks(4, 2, BM=64, BN=32),
            "128": _blocks(8, 2, BM=64, BN=32),
            "256": _blocks(8, 1, BM=64, BN=32),
            "fp32": _blocks(8, 1, BM=16, BN=16),
        },
        "decode_split": {
            "": _blocks(4, 2, BN=64, CHUNK=512),
            "256": _blocks(4, 2, BN=32, CHUNK=512),
            "fp32": _blocks(4, 1, BN=32, CHUNK=512),
            "256/fp32": _blocks(8, 1, BN=16, CHUNK=512),
        },
        "logprob_forward": {"": _blocks(8, 3, BT=128, BV=128, BD=32), "fp32": _blocks(8, 2, BT=64, BV=64, BD=32)},
        "logprob_dlogits": {"": _blocks(8, 3, BT=128, BV=128, BD=32), "fp32": _blocks(8, 2, BT=64, BV=64, BD=32)},
    },
    "sm_90": {
        **_ROW_KERNELS,
        "attention_forward": {
            "64": _blocks(8, 3, BM=128, BN=64),
            "80": _blocks(8, 2, BM=128, BN=64),
            "96": _blocks(8, 2, BM=128, BN=64),
            "128": _blocks(8, 3, BM=128, BN=64),
            "256": _blocks(8, 2, BM=128, BN=32),
            "fp32": _blocks(8, 1, BM=32, BN=32),
            "80/fp32": _blocks(8, 1, BM=16, BN=16),
            "96/fp32": _blocks(8, 1, BM=16, BN=16),
            "256/fp32": _blocks(8, 1, BM=16, BN=16),
        },
        "attention_dkdv": {
            "64": _blocks(8, 2, BM=64, BN=128),
            "128": _blocks(8, 2, BM=32, BN=128),
            "256": _blocks(8, 1, BM=64, BN=32),
            "fp32": _blocks(8, 1, BM=16, BN=32),
            "40/fp32": _blocks(8, 1, BM=16, BN=16),  # no power of two, as for sm_80
            "80/fp32": _blocks(8, 1, BM=16, BN=16),
            "96/fp32": _blocks(8, 1, BM=16, BN=16),
        },
        "attention_dq": {
            "64": _blocks(8, 2, BM=128, BN=64),
            "128": _blocks(8, 2, BM=128, BN=64),
            "256": _blocks(8, 2, BM=128, BN=32),
            "fp32": _blocks(8, 1, BM=16, BN=16),
        },
        "decode_split": {
            "": _blocks(4, 3, BN=64, CHUNK=512),
            "256": _blocks(4, 2, BN=32, CHUNK=512),
            "fp32": _blocks(4, 1, BN=32, CHUNK=512),
            "256/fp32": _blocks(8, 1, BN=16, CHUNK=512),
        },
        "attention_forward_dense": {"64": _blocks(8, 3, BM=128, BN=64), "128": _blocks(8, 2, BM=128, BN=128)},
        "attention_forward_specialized": {"": _blocks(4, 2, BM=128, BN=128)},  # 8 warps: the compiler ignores the wish
        "logprob_forward": {"": _blocks(8, 4, BT=128, BV=128, BD=64), "fp32": _blocks(8, 2, BT=64, BV=64, BD=32)},
        "logprob_dlogits": {"": _blocks(8, 4, BT=128, BV=128, BD=64), "fp32": _blocks(8, 2, BT=64, BV=64, BD=32)},
    },
}

# A compute unit of gfx942 has 64 KiB of shared memory, and its warps are twice as wide.
_SMALLER: Table = {
    "attention_forward": {**_TABLES["sm_80"]["attention_forward"], "128": _blocks(8, 2, BM=128, BN=64)},
    "rms_norm_backward": _rows(512, 16),
}
TABLES: Mapping[str, Table] = {**_TABLES, "gfx942": {**_TABLES["sm_80"], **_SMALLER}}

# Blocks of another table until a device of the kind has been measured.
SAME_AS = {"sm_100": "sm_90"}


def architecture(device: torch.device) -> str:
    """The table for this device.

    Consumer chips (sm_86, sm_89, sm_12x) have 99 KiB of shared memory a block, which the blocks of sm_80 fit.
    Raises NotImplementedError on a device older than sm_80, or an AMD one other than gfx942.
    """
    if dispatch.interpreting():
        return "interpreter"
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        if name not in TABLES:
            raise NotImplementedError(f"the Triton kernels have blocks for gfx942, this device is {name}")
        return str(name)
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise NotImplementedError(f"the Triton kernels need sm_80 or newer, this device is sm_{major}{minor}")
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def config(kernel: str, key: str, device: torch.device) -> Config:
    """Blocks and launch options of a kernel on a device."""
    return lookup(architecture(device), kernel, key)


def lookup(arch: str, kernel: str, key: str) -> Config:
    """The blocks of ``resolve``."""
    return TABLES[SAME_AS.get(arch, arch)][kernel][resolve(arch, kernel, key)]


def resolve(arch: str, kernel: str, key: str) -> str:
    """The table's entry for ``key``: of itself, of the power of two above it (64 or more), of "", the first there is.

    A key "128/fp32" falls back to "fp32" before it falls back to "128".
    """
    table = TABLES[SAME_AS.get(arch, arch)][kernel]
    size, _, dtype = key.partition("/")
    above = str(max(1 << (int(size) - 1).bit_length(), WIDTHS[0])) if size.isdigit() else ""
    with_dtype = (key, f"{above}/{dtype}", dtype) if dtype else ()
    for name in (*with_dtype, size, above, ""):
        if name in table:
            return name
    raise KeyError(f"no blocks for {kernel} {key!r} on {arch}")
