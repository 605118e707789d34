"""Rotary frequencies of a LLaMA, with its scalings.

Sources: Su et al. 2021 (arXiv:2104.09864); linear scaling, Chen et al. 2023 (arXiv:2306.15595); ``llama3`` scaling as
released with Llama 3.1: low frequencies divided by ``factor``, high ones kept, a linear ramp between.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_zj.config.model import ModelConfig


def rotary_frequencies(model: ModelConfig) -> Tensor:
    """[E / 2] float64: radians a position turns each pair of channels (i, i + E / 2)."""
    exponent = torch.arange(0, model.head_size, 2, dtype=torch.float64) / model.head_size
    frequencies = 1.0 / model.rope_theta**exponent
    scaling = model.rope_scaling
    if scaling is None:
        return frequencies
    scaled = frequencies / scaling.factor
    if scaling.kind == "linear":
        return scaled
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # over the original context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * frequencies + (1.0 - keep) * scaled
