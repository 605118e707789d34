"""Every kernel with the arguments of a real model: what is compiled offline, hashed, tuned and timed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import configs
from kernels.attention import dense
from kernels.attention import triton as attention
from kernels.gae import triton as gae
from kernels.linear_logprob import triton as logprob
from kernels.offline import pointer
from kernels.reward_head import triton as reward
from kernels.rms_norm import triton as norm
from kernels.rope import triton as rope
from kernels.swiglu import triton as swiglu
from kernels.value_head import triton as value

BF16, FP32, INT32, INT64, INT8 = torch.bfloat16, torch.float32, torch.int32, torch.int64, torch.int8

MMA = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "MFMA"}  # each architecture's newest


@dataclass(frozen=True)
class Entry:
    """One kernel with one set of arguments; its blocks come from the table of the architecture."""

    op: str
    kernel: Any  # the jit function
    name: str  # of the kernel in the tables
    key: str  # of the blocks in the kernel's table
    args: tuple[Any, ...]
    meta: Mapping[str, Any]
    dots: bool = False  # tensor cores are promised: the architecture's own kind
    warp_dots: bool = False  # but of a warp, not a warp group: too few rows, or registers, for sm_90's and sm_100's
    aligned: bool = True  # every global load of a tile is promised 128 bits wide, and none 16
    scalars: int = 0  # 16-bit loads of one number, such as a bias, which ``aligned`` does not mean
    tma: bool = False  # bulk tensor copies are promised
    variant: str = ""  # what it is besides the usual: the same blocks, other compile-time choices
    specialized: bool = False  # warps with registers of their own are promised, and no spill under any Triton
    only: tuple[str, ...] = field(default=("sm_80", "sm_90", "sm_100", "gfx942"))  # where it is used

    @property
    def label(self) -> str:
        """A name for tables of results."""
        inside = ", ".join(filter(None, (self.key, self.variant)))
        return f"{self.name}[{inside}]" if inside else self.name

    def promised_mma(self, arch: str) -> str | None:
        """The kind of tensor-core instruction this kernel must have there; None: none is promised."""
        if not self.dots:
            return None
        return "HMMA" if self.warp_dots and arch.startswith("sm_") else MMA[arch]

    def launch_meta(self, arch: str, table: Mapping[str, int] | None = None) -> dict[str, Any]:
        """The keyword arguments of a launch on this architecture, or with these blocks instead of the table's."""
        return {**self.meta, **(table or configs.lookup(arch, self.name, self.key))}


def _floats(dtype: torch.dtype, count: int) -> list[Any]:
    return [pointer(dtype) for _ in range(count)]


def _attention(dim: int, dtype: torch.dtype = BF16) -> Iterator[Entry]:
    heads, kv_heads, tokens = 32, 8, 65536
    key = f"{dim}/fp32" if dtype == FP32 else str(dim)
    meta = {
        "HEADS": heads, "GROUP": heads // kv_heads, "D": dim, "BD": attention.block_dim(dim), "CAUSAL": True,
        "WINDOW": 0, "HAS_SLOTS": False, "SEQUENCES": 64, "WIDE": False,
        "PRECISION": "ieee" if dtype == FP32 else "tf32",
    }  # fmt: skip
    strides = (heads * dim, dim, kv_heads * dim, dim, kv_heads * dim, dim)
    ends = [pointer(INT32) for _ in range(3)]
    tail = (*ends, *strides, 50, tokens, 0.088)
    tensors = _floats(dtype, 4)
    exact = dim & (dim - 1) == 0 and dtype == BF16
    yield Entry(
        "attention", attention.attention_forward, "attention_forward", key, (*tensors, pointer(FP32), *tail), meta,
        dots=dtype != FP32, aligned=exact,
    )  # fmt: skip
    back = (*tensors, *_floats(FP32, 2))
    yield Entry(
        "attention", attention.attention_dkdv, "attention_dkdv", key, (*back, *_floats(dtype, 2), *tail),
        {**meta, "CHUNK": attention.SLOT_CHUNK}, dots=dtype != FP32, aligned=exact,
        warp_dots=dim > 128,  # the sums of blocks for a warp group spill there (125 instructions at the least)
    )  # fmt: skip
    yield Entry(
        "attention", attention.attention_dq, "attention_dq", key, (*back, pointer(dtype), *tail), meta,
        dots=dtype != FP32, aligned=exact,
    )  # fmt: skip
    decode = {
        "KV_HEADS": kv_heads, "GROUP": 4, "MEMBERS": 16, "D": dim, "BD": meta["BD"], "WINDOW": 0,
        "WIDE": False, "PRECISION": meta["PRECISION"],
    }  # fmt: skip
    cache = (4096 * kv_heads * dim, kv_heads * dim, dim)
    yield Entry(
        "attention", attention.decode_split, "decode_split", key,
        (*_floats(dtype, 3), pointer(INT64), *_floats(FP32, 2), heads * dim, dim, *cache, *cache, 8, 4096, 0.088),
        decode, dots=dtype != FP32, warp_dots=True, aligned=exact,
    )  # fmt: skip


def _rows() -> Iterator[Entry]:
    # At small widths a thread holds one number of the weight: a 16-bit load, and nothing to gain from a wider one.
    for width, dtype in itertools.product(configs.WIDTHS, (BF16, FP32)):
        key = norm.table_key(width, dtype)
        yield Entry(
            "rms_norm", norm.rms_norm_forward, "rms_norm_forward", key,
            (*_floats(dtype, 5), pointer(FP32), width, width, 65536, width, 1e-5),
            {"BLOCK": width, "HAS_RESIDUAL": True}, aligned=width > 64,
        )  # fmt: skip
        yield Entry(
            "rms_norm", norm.rms_norm_backward, "rms_norm_backward", key,
            (*_floats(dtype, 4), pointer(FP32), pointer(dtype), pointer(FP32), width, 65536, width, 256),
            {"BLOCK": width, "HAS_DSUM": True}, aligned=width > 64,
        )  # fmt: skip
    yield Entry("swiglu", swiglu.swiglu_forward, "swiglu_forward", "", (*_floats(BF16, 2), 22016, 11008), {})
    yield Entry("swiglu", swiglu.swiglu_backward, "swiglu_backward", "", (*_floats(BF16, 3), 22016, 11008), {})
    yield Entry(
        "rope", rope.rope_rotate, "rope_rotate", "",
        (pointer(BF16), *_floats(FP32, 2), pointer(INT64), pointer(BF16), 4096, 128, 4096, 128, 65536, 1.0),
        {"HEADS": 32, "HALF": 64, "BLOCK": 64},
    )  # fmt: skip


def _heads() -> Iterator[Entry]:
    yield Entry(
        "gae", gae.gae_scan, "gae_scan", "", (*_floats(FP32, 2), pointer(INT32), *_floats(FP32, 3), 1.0, 0.95),
        {"HAS_BOOTSTRAP": False}, aligned=False,
    )  # fmt: skip
    yield Entry(
        "value_head", value.value_head_forward, "value_head_forward", "",
        (*_floats(BF16, 3), *_floats(FP32, 2), pointer(INT8), *_floats(FP32, 2), pointer(INT8), 4096, 8192, 4096, 0.2),
        {"HAS_BIAS": False, "HAS_LOSS": True, "HAS_CLIP": True, "HAS_MASK": True},
    )  # fmt: skip
    yield Entry(
        "value_head", value.value_head_backward, "value_head_backward", "",
        (pointer(FP32), *_floats(BF16, 2), *_floats(FP32, 2), *[pointer(INT8)] * 2, pointer(BF16), *_floats(FP32, 2),
         4096, 8192, 4096, 128),
        {"HAS_LOSS": True, "HAS_MASK": True},
    )  # fmt: skip
    yield Entry(
        "reward_head", reward.reward_head_forward, "reward_head_forward", "",
        (pointer(BF16), pointer(INT64), *_floats(BF16, 3), *_floats(FP32, 2), 4096, 4096, 1e-5),
        {"HAS_BIAS": True, "HAS_NORM": True}, scalars=1,
    )  # fmt: skip
    yield Entry(
        "reward_head", reward.reward_head_backward, "reward_head_backward", "",
        (pointer(FP32), pointer(BF16), pointer(INT64), *_floats(BF16, 3), *_floats(FP32, 2), pointer(BF16),
         *_floats(FP32, 3), 4096, 16, 4096),
        {"HAS_BIAS": True, "HAS_NORM": True}, scalars=1,
    )  # fmt: skip
    ranked = (pointer(FP32), *[pointer(INT64)] * 2)
    yield Entry(
        "reward_head", reward.ranking_forward, "ranking_forward", "",
        (*ranked, pointer(FP32), *[pointer(INT64)] * 2, *_floats(FP32, 2), 64, 0.0, 0.1), {"MEAN_OF_PAIRS": True},
        aligned=False,
    )  # fmt: skip
    yield Entry(
        "reward_head", reward.ranking_backward, "ranking_backward", "",
        (pointer(FP32), *ranked, *_floats(FP32, 3), 64, 0.0), {}, aligned=False,
    )  # fmt: skip


def _logprob(dtype: torch.dtype) -> Iterator[Entry]:
    key = "fp32" if dtype == FP32 else ""
    meta = {"ENTROPY": True, "PRECISION": "ieee" if dtype == FP32 else "tf32"}
    yield Entry(
        "linear_logprob", logprob.logprob_forward, "logprob_forward", key,
        (*_floats(dtype, 2), pointer(INT64), *_floats(FP32, 4), 8192, 151936, 4096, 8960, 0, 4096, 4096, 1.0), meta,
        dots=dtype != FP32, aligned=dtype != FP32,
    )  # fmt: skip
    yield Entry(
        "linear_logprob", logprob.logprob_dlogits, "logprob_dlogits", key,
        (*_floats(dtype, 2), pointer(INT64), pointer(INT8), *_floats(FP32, 5), pointer(dtype), 8192, 151936, 4096, 8192,
         4096, 4096, 8192, 0, 1.0),
        {**meta, "HAS_MASK": True}, dots=dtype != FP32, aligned=dtype != FP32,
    )  # fmt: skip


def _dense(dim: int) -> Entry:
    rows, length, heads, kv_heads = 4, 4096, 32, 8
    blocks = configs.lookup("sm_90", "attention_forward_dense", str(dim))

    def describe(count: int, block: int) -> TensorDescriptor:
        strides = [length * count * dim, count * dim, dim, 1]
        return TensorDescriptor(pointer(BF16), [rows, length, count, dim], strides, [1, block, 1, dim])

    descriptors = (
        describe(heads, blocks["BM"]), describe(kv_heads, blocks["BN"]), describe(kv_heads, blocks["BN"]),
        describe(heads, blocks["BM"]),
    )  # fmt: skip
    return Entry(
        "attention", dense.attention_forward_dense, "attention_forward_dense", str(dim),
        (*descriptors, pointer(FP32), length, length, rows * length, 0.088),
        {"HEADS": heads, "GROUP": heads // kv_heads, "D": dim, "CAUSAL": True}, dots=True, aligned=False, tma=True,
        only=("sm_90", "sm_100"),
    )  # fmt: skip


def _specialized(dim: int) -> Entry:
    rows, length, heads, kv_heads = 4, 4096, 32, 8
    strides = (heads * dim, kv_heads * dim, kv_heads * dim)
    return Entry(
        "attention", dense.attention_forward_specialized, "attention_forward_specialized", str(dim),
        (*_floats(BF16, 4), pointer(FP32), *strides, length, length, rows * length, rows * length, 0.088),
        {"HEADS": heads, "GROUP": heads // kv_heads, "D": dim, "CAUSAL": True}, dots=True, aligned=False, tma=True,
        specialized=True, only=("sm_90",),
    )  # fmt: skip


def _around_attention() -> Iterator[Entry]:
    for dim in dense.HEAD_DIMS:
        yield _dense(dim)
        yield _specialized(dim)
    yield Entry(
        "attention", attention.attention_delta, "attention_delta", "",
        (*_floats(BF16, 2), pointer(FP32), 2097152, 65536), {"HEADS": 32, "D": 128, "BD": 128},
    )  # fmt: skip
    yield Entry(
        "attention", attention.decode_combine, "decode_combine", "", (*_floats(FP32, 2), pointer(BF16), 8),
        {"D": 128, "BD": 128, "SPLITS": 8}, aligned=False,
    )  # fmt: skip


def _variants() -> Iterator[Entry]:
    """What context parallelism, sliding windows and full attention compile to."""
    choices: dict[str, dict[str, Any]] = {
        "slots": {"HAS_SLOTS": True},
        "window": {"WINDOW": 4096},
        "full": {"CAUSAL": False},
        "wide": {"WIDE": True},
    }
    for entry in _attention(128):
        for variant, choice in choices.items():
            if choice.keys() <= entry.meta.keys():
                yield replace(entry, variant=variant, meta={**entry.meta, **choice})


def entries() -> list[Entry]:
    """All of them, in the order of the ops."""
    found: list[Entry] = []
    for dim in (40, 64, 80, 96, 128, 256):
        found += _attention(dim)
    for dim in (40, 64, 80, 96, 128, 256):
        found += _attention(dim, FP32)
    return [*found, *_variants(), *_around_attention(), *_rows(), *_heads(), *_logprob(BF16), *_logprob(FP32)]
