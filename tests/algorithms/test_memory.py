"""Scoring and learning never hold many [tokens, vocabulary] logits: no operation makes a tensor of that size."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.linear_logprob.reference import CHUNK_LOGITS, KEPT_LOGITS
from megatron_zj.algorithms.objectives import PolicyObjective
from megatron_zj.config.optim import EngineConfig
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.engine.build import build_engine
from megatron_zj.parallel.grid import RankGrid
from megatron_zj.parallel.groups import create_groups
from tests.algorithms.layouts import LAYOUTS, Layout
from tests.algorithms.plain_optimizer import OPTIM
from tests.algorithms.ppo_world import MODEL
from tests.helpers.ranks import run_ranks

WIDE = dataclasses.replace(MODEL, vocab_size=32000, hidden_size=16, ffn_hidden_size=16, num_layers=2)
ROWS, LENGTH = 32, 40
TOKENS = ROWS * LENGTH


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that an operation gives back, backward ones included."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return found


def _largest(layout: Layout) -> tuple[int, int, int]:
    """While scoring, while learning with an entropy bonus, and without one, in one micro-batch."""
    engine_config = EngineConfig(micro_batch_tokens=TOKENS)
    grid = RankGrid.from_config(layout.parallel, 0, layout.world)
    groups = create_groups({"all": grid}, {"all": layout.parallel}, 60)["all"]
    assert groups is not None
    engine = build_engine(WIDE, "lm", groups, engine_config, OPTIM, 4, torch.device("cpu"), 1)
    tokens = Rows.of([(torch.arange(LENGTH) * (row + 3)) % WIDE.vocab_size for row in range(ROWS)], torch.int64)
    ones = tokens.replace(torch.ones(TOKENS))
    fields = {
        "old_logprobs": ones,
        "advantages": ones,
        "loss_weight": ones,
        "loss_count": tokens.replace(ones.values.long()),
    }
    batch = Batch(tokens, fields)
    with Largest() as scoring:
        engine.infer(("logprobs",), batch)
    with Largest() as learning:
        engine.update(PolicyObjective(1.0, 0.2, entropy_coef=0.01), batch)
    with Largest() as without:
        engine.update(PolicyObjective(1.0, 0.2), batch)
    return scoring.numbers, learning.numbers, without.numbers


@pytest.mark.parametrize("layout", ["one rank", "tp2 sp"])
def test_no_tensor_is_as_large_as_the_logits(layout: str) -> None:
    logits = (TOKENS - ROWS) * WIDE.vocab_size // LAYOUTS[layout].parallel.tp
    assert logits > KEPT_LOGITS  # a rank's own: too many to be kept for the backward pass, in whole or in part
    for largest in run_ranks(LAYOUTS[layout].world, _largest, LAYOUTS[layout]):
        assert max(largest) <= CHUNK_LOGITS
