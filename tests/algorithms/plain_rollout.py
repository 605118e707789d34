"""One sampled answer, a token at a time, without cache, batch or engine; only the drawing is the framework's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_zj.config.sampling import SamplingConfig
from megatron_zj.rollout.sampling import draw
from tests.helpers.reference_llama import ReferenceLlama


@torch.no_grad()
def answer(
    model: ReferenceLlama,
    prompt: Sequence[int],
    noise: Tensor,
    sampling: SamplingConfig,
    stop_ids: frozenset[int],
    decode: Callable[[Sequence[int]], str],
) -> tuple[list[int], list[float], bool]:
    """The drawn tokens, their log-probabilities in the model's precision, and whether they ended by themselves.

    ``decode``: one letter a token, so that a stop string ends where a token does.
    """
    drawn: list[int] = []
    logprobs: list[float] = []
    ended = False
    while len(drawn) < sampling.max_new_tokens and not ended:
        row = [*prompt, *drawn]
        logits = model.logits(torch.tensor(row))[-1:]
        for seen in set(row):  # CTRL's penalty makes a seen token less likely, whatever the sign of its logit
            penalty = sampling.repetition_penalty
            logits[0, seen] = logits[0, seen] / penalty if logits[0, seen] > 0 else logits[0, seen] * penalty
        if len(drawn) < sampling.min_new_tokens:
            logits[0, sorted(stop_ids)] = -math.inf
        token = int(draw(logits, noise[len(drawn) : len(drawn) + 1], sampling)[0])
        drawn.append(token)
        logprobs.append(float((logits[0] / sampling.temperature).log_softmax(-1)[token]))
        ended = token in stop_ids
        if sampling.stop_strings and len(drawn) >= sampling.min_new_tokens:
            ended |= decode(drawn).endswith(sampling.stop_strings)
    return drawn, logprobs, ended
