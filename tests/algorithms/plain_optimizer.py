"""AdamW as the tests' configuration asks for it, by torch's own."""

from __future__ import annotations

import torch

from megatron_zj.config.optim import OptimConfig
from tests.helpers.reference_llama import ReferenceLlama

# With Adam's usual eps of 1e-8 an entry whose gradient is rounding alone moves by up to a whole step, of any sign.
OPTIM = OptimConfig(lr=2e-3, eps=1e-6, weight_decay=0.1, clip_grad=0.5, schedule="constant", warmup_steps=1)


def adamw(model: ReferenceLlama) -> torch.optim.AdamW:
    """The run's optimizer: no decay of vectors."""
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": OPTIM.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(OPTIM.beta1, OPTIM.beta2),
        eps=OPTIM.eps,
        foreach=False,
    )


def apply_gradients(model: ReferenceLlama, optimizer: torch.optim.AdamW, step: int) -> tuple[float, float]:
    """Gradient norm and learning rate of the step."""
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_grad))
    rate = OPTIM.lr * min(1.0, (step + 1) / OPTIM.warmup_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return norm, rate
