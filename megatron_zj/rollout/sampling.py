"""Drawing the next token: pure functions of logits and of noise that belongs to the sample.

B: rows.  V: vocabulary.  A row's noise is keyed by (seed, step, sample id), so a sample does not depend on the rank,
the layout or the other rows of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_zj.config.sampling import SamplingConfig
from megatron_zj.runtime.seed import keyed_generator


def sample_noise(seed: int, step: int, sample_id: int, max_new_tokens: int) -> Tensor:
    """[max_new_tokens] float64 in [0, 1): one number a token of this sample."""
    generator = keyed_generator(seed, "sample", step, sample_id)
    return torch.rand(max_new_tokens, dtype=torch.float64, generator=generator)


def draw(logits_BV: Tensor, noise_B: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Next tokens [B] int64 and their log-probabilities [B] float32.

    ``logits``: already restricted to what may follow (-inf elsewhere).  Temperature 0 takes the largest logit.  The
    log-probability is that of the whole distribution at the sampling temperature (1 when greedy), without top-k and
    top-p: it is what training computes.  Inverse of the cumulative distribution in float64, in vocabulary order.
    """
    logits_BV = logits_BV.float()
    if config.temperature == 0:
        tokens_B = logits_BV.argmax(-1)
        return tokens_B, _logprobs(logits_BV, tokens_B)
    logits_BV = logits_BV / config.temperature
    kept_BV = keep_top_p(keep_top_k(logits_BV, config.top_k), config.top_p)
    cumulative_BV = torch.softmax(kept_BV.double(), -1).cumsum(-1)
    # the last sum may fall short of 1 by rounding: scale the noise instead of trusting it
    target_B = noise_B.to(cumulative_BV.device) * cumulative_BV[:, -1]
    tokens_B = torch.searchsorted(cumulative_BV, target_B[:, None], right=True)[:, 0]
    tokens_B = tokens_B.clamp(max=logits_BV.shape[-1] - 1)
    return tokens_B, _logprobs(logits_BV, tokens_B)


def keep_top_k(logits_BV: Tensor, top_k: int) -> Tensor:
    """All but the ``top_k`` largest logits of each row become -inf; ties with the k-th stay; 0: off."""
    if top_k == 0 or top_k >= logits_BV.shape[-1]:
        return logits_BV
    smallest_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < smallest_B1, float("-inf"))


def keep_top_p(logits_BV: Tensor, top_p: float) -> Tensor:
    """Keep the fewest most likely tokens whose probabilities reach ``top_p`` (Holtzman et al. 2020); 1: off."""
    if top_p >= 1.0:
        return logits_BV
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    probs_BV = torch.softmax(sorted_BV.double(), -1)
    before_BV = probs_BV.cumsum(-1) - probs_BV  # mass of everything more likely
    dropped_BV = torch.zeros_like(before_BV, dtype=torch.bool).scatter(-1, order_BV, before_BV >= top_p)
    return logits_BV.masked_fill(dropped_BV, float("-inf"))


def penalize_repetition(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of tokens seen before by ``penalty`` (Keskar et al. 2019)."""
    penalized_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, penalized_BV, logits_BV)


def _logprobs(logits_BV: Tensor, tokens_B: Tensor) -> Tensor:
    chosen_B = logits_BV.gather(-1, tokens_B[:, None])[:, 0]
    return chosen_B - logits_BV.logsumexp(-1)
