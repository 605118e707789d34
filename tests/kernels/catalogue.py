"""The adversarial cases: which proofs each op must pass, cheapest and most telling first."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kernels.attention import attention, decode_attention
from kernels.gae import gae
from kernels.linear_logprob import linear_logprob_partials
from kernels.reward_head import ranking_loss, reward_head
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope
from kernels.swiglu import swiglu
from kernels.value_head import value_head, value_head_loss
from tests.kernels.cases import ends, normal
from tests.kernels.proofs import (
    DEVICE,
    DTYPES,
    Proof,
    naive_norm,
    naive_values,
    prove_add_norm,
    prove_attention,
    prove_attention_strides,
    prove_decode,
    prove_dense,
    prove_gae,
    prove_layouts,
    prove_logprob,
    prove_logprob_shard,
    prove_norm,
    prove_precise_attention_sum,
    prove_precise_scores,
    prove_ranking,
    prove_reward,
    prove_rope,
    prove_small_difference,
    prove_swiglu,
    prove_value,
    prove_value_loss,
)

FP32, BF16 = DTYPES


def _attention() -> dict[str, Proof]:
    cases: dict[str, Proof] = {}
    for dtype in DTYPES:
        tag = "fp32" if dtype == FP32 else "bf16"
        cases |= {
            f"ragged {tag}": partial(prove_attention, (33, 0, 1, 46), dtype),
            f"ragged full {tag}": partial(prove_attention, (17, 0, 1, 50), dtype, causal=False),
            f"window {tag}": partial(prove_attention, (70,), dtype, window=19),
            f"context parallel {tag}": partial(prove_attention, (80, 24), dtype, shards=4),
            f"context parallel, many slots {tag}": partial(prove_attention, (160,), dtype, shards=4, slots_at_once=16),
            f"twenty sequences {tag}": partial(prove_attention, [1, 5, 3, 0] * 5, dtype, dim=16),
            f"ends unknown {tag}": partial(prove_attention, (33, 0, 1, 46), dtype, dim=16, ends_known=False),
            f"fewer queries {tag}": partial(prove_attention, (3, 20, 18), dtype, lengths_k=(40, 45, 32)),
            f"blind queries {tag}": partial(prove_attention, (40, 5, 3), dtype, lengths_k=(35, 2, 0)),
        }
    cases |= {
        "strides": partial(prove_attention_strides, FP32),
        "wide offsets, ragged": partial(prove_attention, (33, 0, 20), BF16, heads=4, kv_heads=2, wide=True),
        "strides that differ": partial(prove_attention_strides, FP32, apart=True),
        "mqa 8": partial(prove_attention, (20, 13), FP32, heads=8, kv_heads=1),
        "gqa 4 of 8": partial(prove_attention, (19,), FP32, heads=8, kv_heads=2),
        "mha": partial(prove_attention, (35,), FP32, heads=2, kv_heads=2),
        "one token": partial(prove_attention, (1,), BF16),
        "length-1 rows": partial(prove_attention, (1, 1, 1), FP32, heads=4, kv_heads=2),
        "scale": partial(prove_attention, (37,), FP32, scale=0.3),
        "large scores": partial(prove_attention, (37,), BF16, size=40.0),
        "head 8": partial(prove_attention, (35,), BF16, dim=8),
        "head 40": partial(prove_attention, (20, 15), FP32, dim=40),
        "head 40, whole blocks": partial(prove_attention, (32,), FP32, dim=40, causal=False),
        "head 80": partial(prove_attention, (35,), BF16, dim=80),
        "head 96": partial(prove_attention, (35,), FP32, dim=96),
        "head 128": partial(prove_attention, (35,), FP32, dim=128),
        "head 256": partial(prove_attention, (18,), BF16, dim=256),
        "fp16": partial(prove_attention, (35, 4), torch.float16),
        "full, other lengths": partial(prove_attention, (20, 7), FP32, lengths_k=(33, 50), causal=False),
        "window, context parallel": partial(prove_attention, (80,), FP32, shards=4, window=9),
        "window 1": partial(prove_attention, (35,), FP32, window=1),
        "long equal scores": prove_precise_attention_sum,
        "precise scores": prove_precise_scores,
        "dense bf16": partial(prove_dense, "tma", 2, 37, 37, BF16),
        "dense full fp16": partial(prove_dense, "tma", 2, 20, 45, torch.float16, causal=False),
        "dense, fewer queries": partial(prove_dense, "tma", 2, 20, 45, BF16),
        "dense, fused strides": partial(prove_dense, "tma", 1, 33, 33, BF16, fused=True, dim=128),
        "specialized bf16": partial(prove_dense, "specialized", 2, 40, 128, BF16),
        "specialized full fp16": partial(prove_dense, "specialized", 2, 21, 128, torch.float16, causal=False),
        "specialized, one odd row": partial(prove_dense, "specialized", 1, 37, 37, BF16, fused=True, dim=128),
        "specialized full, one odd row": partial(prove_dense, "specialized", 1, 37, 37, BF16, causal=False),
        "a tail in the next row": partial(prove_dense, "specialized", 2, 37, 37, BF16, falls_back=True),
        "dense, gaps of 1": partial(prove_dense, "tma", 1, 20, 20, BF16, gap=1, falls_back=True),
        "specialized, gaps of 8": partial(prove_dense, "specialized", 1, 20, 20, BF16, gap=8, falls_back=True),
        "decode fp32": partial(prove_decode, (1, 33, 70, 0, 16), FP32),
        "decode bf16": partial(prove_decode, (5, 64, 31), BF16),
        "decode window": partial(prove_decode, (1, 33, 70), FP32, window=20),
        "decode, a sliced cache": partial(prove_decode, (40, 3, 70), BF16, apart=True),
        "decode 40": partial(prove_decode, (20, 69), BF16, dim=40),
        "decode mqa 32": partial(prove_decode, (20, 69), FP32, heads=32, kv_heads=1, dim=16),
        "decode, five splits": partial(prove_decode, (140, 33, 100), FP32, heads=2, kv_heads=1, dim=16, capacity=140),
        "decode, beyond the cache": partial(prove_decode, (90, 5, 71), FP32, dim=16),
        "decode mqa 80": partial(prove_decode, (20, 69), FP32, heads=8, kv_heads=1, dim=80),
    }
    return cases


def _long() -> dict[str, dict[str, Proof]]:
    """Shapes that cross the blocks of a device, which are larger than the interpreter's."""
    return {
        "attention": {
            "long": partial(prove_attention, (700, 1, 333), BF16, heads=8, kv_heads=2, dim=128),
            "long fp32": partial(prove_attention, (300, 129), FP32, heads=4, kv_heads=2),
            "long, window": partial(prove_attention, (700,), BF16, window=200, dim=128),
            "long, context parallel": partial(prove_attention, (1024, 512), BF16, shards=4, dim=128),
            "long, head 80": partial(prove_attention, (500,), BF16, dim=80),
            "long, head 256": partial(prove_attention, (300,), BF16, dim=256),
            "decode long": partial(prove_decode, (1100, 3, 513, 512), BF16, heads=8, dim=128, capacity=1200),
        },
        "linear_logprob": {
            "long vocabulary": partial(prove_logprob, 200, 9001, 256, BF16),
            "long, few programs": partial(prove_logprob, 300, 2001, 128, FP32, programs=8),
        },
        "reward_head": {"wide": partial(prove_reward, 33, 5120, BF16)},
        "value_head": {"wide": partial(prove_value_loss, 1000, 5120, BF16, clip=0.2, masked=True)},
        "gae": {"long": partial(prove_gae, (3000, 1, 1025), FP32, bootstrap=True, gamma=0.99, lam=0.95)},
    }


def _rows(op: str) -> dict[str, Proof]:
    cases: dict[str, Proof] = {}
    for dtype in DTYPES:
        tag = "fp32" if dtype == FP32 else "bf16"
        if op == "rms_norm":
            cases |= {
                f"primes {tag}": partial(prove_norm, 7, 67, dtype),
                f"residual {tag}": partial(prove_add_norm, 5, 64, dtype),
                f"residual, width 100 {tag}": partial(prove_add_norm, 13, 100, dtype),
                f"strided {tag}": partial(prove_norm, 6, 80, dtype, strided=True),
                f"residual, strided {tag}": partial(prove_add_norm, 7, 48, dtype, strided=True),
                f"one row {tag}": partial(prove_norm, 1, 64, dtype),
                f"tiny numbers {tag}": partial(prove_norm, 3, 64, dtype, size=1e-3),
                f"width 4096 {tag}": partial(prove_norm, 3, 4096, dtype),
            }
        elif op == "swiglu":
            cases |= {
                f"primes {tag}": partial(prove_swiglu, 5, 23, dtype),
                f"strided {tag}": partial(prove_swiglu, 3, 32, dtype, strided=True),
                f"one row {tag}": partial(prove_swiglu, 1, 16, dtype),
                f"large {tag}": partial(prove_swiglu, 2, 20, dtype, size=100.0),  # exp overflows at 88.7
            }
        else:
            cases |= {
                f"head 64 {tag}": partial(prove_rope, 7, 3, 64, dtype),
                f"head 80 {tag}": partial(prove_rope, 5, 2, 80, dtype),
                f"strided {tag}": partial(prove_rope, 6, 2, 32, dtype, strided=True),
                f"one token {tag}": partial(prove_rope, 1, 1, 16, dtype),
            }
    if op == "rms_norm":
        cases["width 16384"] = partial(prove_norm, 1, 16384, BF16)
        cases["many programs"] = partial(prove_norm, 600, 16, FP32)
        cases["many programs, small difference"] = partial(
            prove_small_difference, lambda x, w: [rms_norm(x, w, 1e-3)], lambda x, w: [naive_norm(x, w, 1e-3)], 8, 64
        )
    return cases


def _logprob() -> dict[str, Proof]:
    cases: dict[str, Proof] = {}
    for dtype in DTYPES:
        tag = "fp32" if dtype == FP32 else "bf16"
        cases |= {
            f"odd vocabulary {tag}": partial(prove_logprob, 19, 77, 40, dtype),
            f"temperature and padding {tag}": partial(prove_logprob, 9, 96, 32, dtype, temperature=0.6, valid=70),
            f"masked {tag}": partial(prove_logprob, 17, 50, 48, dtype, masked="some"),
            f"shard {tag}": partial(prove_logprob_shard, dtype),
            f"large logits {tag}": partial(prove_logprob, 8, 64, 32, dtype, size=5.0),
            f"no entropy {tag}": partial(prove_logprob, 18, 65, 33, dtype, entropy=False),
            f"blocks of one program {tag}": partial(prove_logprob, 19, 200, 40, dtype, programs=4),
            f"chunks of an odd vocabulary {tag}": partial(prove_logprob, 11, 77, 40, dtype, chunk=24),
        }
    return cases | {
        "many chunks": partial(prove_logprob, 5, 200, 32, BF16, chunk=4),
        "huge logits bf16": partial(prove_logprob, 8, 64, 32, BF16, size=60.0),  # up to 210: exp overflows at 88.7
        "huge whole logits fp32": partial(prove_logprob, 8, 200, 32, FP32, size=60.0, whole=True, programs=4),
        "all masked": partial(prove_logprob, 5, 40, 32, FP32, masked="all"),
        "one token, one row": partial(prove_logprob, 1, 1, 32, FP32),
        "strided odd hidden and weight": partial(prove_logprob, 5, 40, 48, FP32, strided=True),
    }


def _heads(op: str) -> dict[str, Proof]:
    cases: dict[str, Proof] = {}
    for dtype in DTYPES:
        tag = "fp32" if dtype == FP32 else "bf16"
        if op == "reward_head":
            cases |= {
                f"norm and bias {tag}": partial(prove_reward, 5, 37, dtype),
                f"no norm {tag}": partial(prove_reward, 3, 64, dtype, norm=False),
                f"no bias {tag}": partial(prove_reward, 2, 50, dtype, bias=False),
                f"strided, norm {tag}": partial(prove_reward, 4, 45, dtype, strided=True),
                f"groups far apart {tag}": partial(
                    prove_ranking, (5, 3), dtype, margin=0.0, centering=0.0, mean=True, apart=8.0
                ),
                f"ragged groups {tag}": partial(
                    prove_ranking, (5, 1, 2, 4), dtype, margin=0.0, centering=0.0, mean=True
                ),
                f"margin and centering {tag}": partial(
                    prove_ranking, (3, 4, 12), dtype, margin=0.5, centering=0.3, mean=True
                ),
                f"summed pairs {tag}": partial(prove_ranking, (2, 4), dtype, margin=0.2, centering=0.1, mean=False),
                f"a list of 19 {tag}": partial(prove_ranking, (19,), dtype, margin=0.1, centering=0.0, mean=True),
            }
        elif op == "value_head":
            cases |= {
                f"head {tag}": partial(prove_value, 7, 37, dtype),
                f"strided, no bias {tag}": partial(prove_value, 5, 32, dtype, bias=False, strided=True),
                f"clipped and masked {tag}": partial(prove_value_loss, 31, 20, dtype, clip=0.2, masked=True),
                f"unclipped {tag}": partial(prove_value_loss, 9, 33, dtype, clip=None, masked=False),
                f"clipped {tag}": partial(prove_value_loss, 12, 16, dtype, clip=0.1, masked=False),
                f"many parts {tag}": partial(prove_value, 150, 16, dtype),
            }
        else:
            cases |= {
                f"ragged {tag}": partial(prove_gae, (37, 0, 1, 16, 17), dtype, bootstrap=False, gamma=0.97, lam=0.9),
                f"bootstrap {tag}": partial(prove_gae, (5, 33, 0, 2), dtype, bootstrap=True, gamma=0.99, lam=0.95),
                f"undiscounted {tag}": partial(prove_gae, (40,), dtype, bootstrap=False, gamma=1.0, lam=1.0),
                f"lambda 0 {tag}": partial(prove_gae, (19, 3), dtype, bootstrap=True, gamma=0.9, lam=0.0),
            }
    if op == "reward_head":
        cases["many rows, norm"] = partial(prove_reward, 50, 16, FP32)
    elif op == "value_head":
        cases["many parts, small difference"] = partial(
            prove_small_difference, lambda x, w: [value_head(x, w)], lambda x, w: [naive_values(x, w)], 8, 20
        )
        cases["small difference of losses"] = partial(
            prove_small_difference, _loss_of_zero, lambda x, w: [0.5 * naive_values(x, w).square()], 8, 20
        )
    return cases


def _loss_of_zero(hidden: Tensor, weight: Tensor) -> list[Tensor]:
    zero = hidden.new_zeros(hidden.shape[0])
    return [value_head_loss(hidden, weight, None, zero, zero, clip=None).loss]


def _layouts() -> dict[str, dict[str, Proof]]:
    """Every tensor argument strided, every gradient strided or expanded."""
    hidden, weight, odd = normal(9, 37), normal(37, seed=1), torch.arange(9) % 3 == 1
    return {
        "attention": {
            "layouts": partial(
                prove_layouts, lambda q, k, v, cu_q, cu_k, slots: attention(q, k, v, cu_q, cu_k, q_slots=slots),
                normal(8, 2, 16), normal(16, 1, 16, seed=1), normal(16, 1, 16, seed=2), ends((5, 3)), ends((10, 6)),
                torch.tensor([0, 1, 2, 8, 9, 10, 14, 15]),
            ),
            "decode, layouts": partial(
                prove_layouts, lambda *given: [decode_attention(*given)], normal(2, 4, 16),
                normal(2, 40, 2, 16, seed=1), normal(2, 40, 2, 16, seed=2), torch.tensor([40, 7]),
            ),
        },
        "rms_norm": {
            "layouts": partial(prove_layouts, lambda *given: [rms_norm(*given, 1e-3)], hidden, weight),
            "residual, layouts": partial(
                prove_layouts, lambda *given: add_rms_norm(*given, 1e-3), hidden, normal(9, 37, seed=2), weight
            ),
        },
        "swiglu": {"layouts": partial(prove_layouts, lambda x: [swiglu(x)], normal(5, 46))},
        "rope": {
            "layouts": partial(
                prove_layouts, lambda *given: [rope(*given)], normal(5, 3, 16), normal(300, 8, seed=1),
                normal(300, 8, seed=2), torch.arange(5) * 60,
            ),
        },
        "linear_logprob": {
            "layouts": partial(
                prove_layouts, lambda *given: linear_logprob_partials(*given[:3], mask_T=given[3]), hidden,
                normal(33, 37, seed=1), torch.arange(9) * 4, odd,
            ),
        },
        "reward_head": {
            "layouts, norm and bias": partial(
                prove_layouts, lambda *given: [reward_head(*given[:4], norm_weight_D=given[4])], hidden,
                torch.tensor([2, -1, 8]), weight, normal(1, seed=2), normal(37, seed=3),
            ),
            "layouts of groups": partial(
                prove_layouts, lambda *given: ranking_loss(*given, centering=0.1), normal(5),
                torch.tensor([4, 4, 4, 9, 9]), torch.tensor([1, 0, 2, 0, 1]),
            ),
        },
        "value_head": {
            "layouts": partial(
                prove_layouts, lambda *given: value_head_loss(*given[:5], clip=0.2, mask_T=given[5]), hidden, weight,
                normal(1, seed=2), normal(9, seed=3), normal(9, seed=4), odd,
            ),
        },
        "gae": {
            "layouts": partial(
                prove_layouts, lambda *given: gae(*given[:3], gamma=0.9, lam=0.8, bootstrap_R=given[3]), normal(22),
                normal(22, seed=1), ends((5, 0, 17)), normal(3, seed=2),
            ),
        },
    }  # fmt: skip


CATALOGUE: dict[str, dict[str, Proof]] = {
    "attention": _attention(),
    "rms_norm": _rows("rms_norm"),
    "swiglu": _rows("swiglu"),
    "rope": _rows("rope"),
    "linear_logprob": _logprob(),
    "reward_head": _heads("reward_head"),
    "value_head": _heads("value_head"),
    "gae": _heads("gae"),
}
for _op, _cases in (*_layouts().items(), *(_long().items() if DEVICE.type == "cuda" else ())):
    CATALOGUE[_op] |= _cases
