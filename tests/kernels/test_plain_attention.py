"""The torch form of attention on a device without torch's fused CPU attention, run here on the CPU in its place."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from kernels.attention import attention, plain, reference
from tests.kernels.cases import ends, naive_attention, normal


@pytest.fixture(autouse=True)
def _plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_fused_forward", plain.forward)
    monkeypatch.setattr(reference, "_fused_backward", plain.backward)
    monkeypatch.setattr(plain, "ROWS", 3)
    monkeypatch.setattr(reference, "MASK_ROWS", 4)


@pytest.mark.parametrize(
    ("lengths", "lengths_k", "causal", "window"),
    [
        ((7, 0, 1, 7, 4), (7, 0, 1, 7, 4), True, None),
        ((5, 8), (5, 8), False, None),
        ((2, 6), (9, 4), True, None),
        ((9, 3), (9, 3), True, 4),
    ],
    ids=["causal", "full", "other lengths", "window"],
)
def test_equals_one_big_mask_with_its_gradients(
    lengths: tuple[int, ...], lengths_k: tuple[int, ...], causal: bool, window: int | None
) -> None:
    cu_q, cu_k = ends(lengths), ends(lengths_k)
    inputs = tuple(
        normal(int(cu[-1]), heads, 4, seed=seed).requires_grad_()
        for seed, (cu, heads) in enumerate(((cu_q, 4), (cu_k, 2), (cu_k, 2)))
    )
    out, lse = attention(*inputs, cu_q, cu_k, causal=causal, window=window)  # type: ignore[misc]
    want, want_lse = naive_attention(*inputs, cu_q, cu_k, causal=causal, window=window)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)
    assert gradcheck(lambda *args: attention(*args, cu_q, cu_k, causal=causal, window=window)[0], inputs)


def test_context_parallel_slots_see_what_the_whole_sequence_sees() -> None:
    q, k, v = normal(12, 2, 4), normal(12, 1, 4, seed=1), normal(12, 1, 4, seed=2)
    slots = torch.tensor([0, 1, 2, 9, 10, 11])
    part, _ = attention(q[slots], k, v, ends((6,)), ends((12,)), q_slots=slots)
    torch.testing.assert_close(part, naive_attention(q, k, v, ends((12,)), ends((12,)), causal=True)[0][slots])


def test_bf16_is_kept_and_computed_in_fp32() -> None:
    q, k, v = (normal(20, heads, 16, dtype=torch.bfloat16, seed=heads) for heads in (4, 2, 2))
    out, lse = attention(q, k, v, ends((13, 7)))
    want, want_lse = naive_attention(q.double(), k.double(), v.double(), ends((13, 7)), ends((13, 7)), causal=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.double(), want, rtol=8e-3, atol=8e-3)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-6)
