"""GAE in Triton: one program a row, a reverse scan of linear maps block by block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import configs
from kernels.dispatch import launch


@triton.jit
def _then(scale_a, shift_a, scale_b, shift_b):
    """x -> scale_b (scale_a x + shift_a) + shift_b as one map."""
    return scale_a * scale_b, scale_b * shift_a + shift_b


@triton.jit
def gae_scan(
    reward_ptr, value_ptr, ends_ptr, bootstrap_ptr, advantage_ptr, return_ptr, gamma, lam,
    HAS_BOOTSTRAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    start = tl.load(ends_ptr + row).to(tl.int64)
    length = tl.load(ends_ptr + row + 1).to(tl.int64) - start
    last_value = tl.load(bootstrap_ptr + row).to(tl.float32) if HAS_BOOTSTRAP else 0.0
    carry = 0.0
    num_blocks = tl.cdiv(length, BLOCK)
    for block in tl.range(0, num_blocks):
        t = (num_blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
        inside = t < length
        reward = tl.load(reward_ptr + start + t, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(value_ptr + start + t, mask=inside, other=0.0).to(tl.float32)
        after = tl.load(value_ptr + start + t + 1, mask=t + 1 < length, other=0.0).to(tl.float32)
        after = tl.where(t + 1 == length, last_value, after)
        delta = tl.where(inside, reward + gamma * after - value, 0.0)
        scale = tl.full((BLOCK,), 1.0, tl.float32) * (gamma * lam)
        scale, shift = tl.associative_scan((scale, delta), 0, _then, reverse=True)
        advantage = scale * carry + shift
        tl.store(advantage_ptr + start + t, advantage, mask=inside)
        tl.store(return_ptr + start + t, advantage + value, mask=inside)
        carry = tl.sum(tl.where(tl.arange(0, BLOCK) == 0, advantage, 0.0), 0)


def forward(
    rewards_T: Tensor, values_T: Tensor, cu_seqlens: Tensor, bootstrap_R: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, fp32."""
    if torch.float64 in (rewards_T.dtype, values_T.dtype):
        raise NotImplementedError("the Triton gae takes fp16, bf16 and fp32, not fp64")
    advantages = rewards_T.new_empty(rewards_T.shape, dtype=torch.float32)
    returns = torch.empty_like(advantages)
    config = configs.config("gae_scan", "", rewards_T.device)
    launch(
        gae_scan, (cu_seqlens.shape[0] - 1,),
        rewards_T.contiguous(), values_T.contiguous(), cu_seqlens.to(rewards_T.device, torch.int32).contiguous(),
        values_T if bootstrap_R is None else bootstrap_R.contiguous(), advantages, returns, gamma, lam,
        HAS_BOOTSTRAP=bootstrap_R is not None, **config,
    )  # fmt: skip
    return advantages, returns
