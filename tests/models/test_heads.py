"""What the heads do between ranks, where megatron-core's own mappings go wrong without a word."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_zj.config.optim import EngineConfig
from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.models.heads import _sum_over
from megatron_zj.models.llama import build_stages
from tests.helpers.ranks import run_ranks
from tests.models.layouts import TINY, make_groups


def sum_with_a_broadcast_gradient() -> tuple[list[float], list[float], list[float]]:
    """The gradient of ``x.sum()`` is one number broadcast: it is not contiguous."""
    rank = dist.get_rank()
    values = torch.tensor([1.0, 10.0]) * (rank + 1)
    gradients = []
    for sum_gradients in (True, False):
        leaf = values.clone().requires_grad_()
        total = _sum_over(leaf, dist.group.WORLD, sum_gradients)
        (total.sum() * (rank + 1)).backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad.tolist())
    return total.tolist(), gradients[0], gradients[1]


def test_scores_are_summed_and_their_gradients_too_even_when_not_contiguous() -> None:
    # megatron-core's all-reduce works on a contiguous copy of such a gradient and then returns the original.
    results = run_ranks(2, sum_with_a_broadcast_gradient)
    assert [total for total, _, _ in results] == [[3.0, 30.0]] * 2
    assert [summed for _, summed, _ in results] == [[3.0, 3.0]] * 2
    assert [own for _, _, own in results] == [[1.0, 1.0], [2.0, 2.0]]


def tied_keys() -> dict[str, tuple[str, tuple[int, ...], bool]]:
    """Key, replica and tolerance of the vocabulary matrices in this stage's sharded state."""
    groups = make_groups(ParallelConfig(pp=2), 2)
    model = replace(TINY, tie_embeddings=True)
    (stage,) = build_stages(model, "lm", groups, EngineConfig(), "cpu", 0)
    return {
        name: (entry.key, tuple(entry.replica_id), entry.allow_shape_mismatch)
        for name, entry in stage.sharded_state_dict().items()
        if name in ("embedding.word_embeddings.weight", "output_layer.weight")
    }


def test_a_tied_embedding_is_saved_once_and_its_copy_is_a_replica() -> None:
    first, last = run_ranks(2, tied_keys)
    key = "embedding.word_embeddings.weight"
    assert first == {key: (key, (0, 0, 0), False)}
    assert last == {"output_layer.weight": (key, (1, 0, 0), False)}
