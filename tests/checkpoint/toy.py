"""A model of a few sharded tensors that checkpoints like an engine: layers over pp, columns over tp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_zj.checkpoint.manifest import ManifestInfo
from megatron_zj.checkpoint.save import Checkpointer
from megatron_zj.config.checkpoint import CheckpointConfig
from megatron_zj.config.model import HeadKind, ModelConfig
from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.data.tokenizer import Tokenizer
from megatron_zj.data.vocabulary import train_sentencepiece
from megatron_zj.parallel.grid import RankGrid
from megatron_zj.parallel.groups import ParallelGroups, create_groups

from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor  # isort: skip  after the CPU port

LAYERS, WIDTH = 4, 8
MODEL = ModelConfig(num_layers=LAYERS, hidden_size=WIDTH, num_attention_heads=2, vocab_size=64)


def whole(seed: int, shape: Sequence[int]) -> torch.Tensor:
    """The whole tensor of a seed, whatever the layout."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


class Toy:
    """``layers.weight`` [LAYERS, WIDTH, WIDTH], ``output_layer.weight`` [64, WIDTH], and a moment of each."""

    def __init__(self, groups: ParallelGroups, seed: int, head: HeadKind = "lm", trainable: bool = True) -> None:
        self.groups, self.model, self.head, self.trainable = groups, MODEL, head, trainable
        per_stage = LAYERS // groups.pp_size
        self.layers = range(groups.pp_rank * per_stage, (groups.pp_rank + 1) * per_stage)
        self.common: dict[str, Any] = {"step": seed, "betas": (0.9, 0.95), "lr": 1e-3}
        self.tensors: dict[str, torch.Tensor] = {}
        rows = WIDTH // groups.tp_size
        cut = slice(groups.tp_rank * rows, (groups.tp_rank + 1) * rows)
        for prefix, offset in (("", 0), ("optimizer.state.exp_avg.", 500)):
            for layer in self.layers:
                self.tensors[f"{prefix}{layer}"] = whole(seed + offset + layer, (WIDTH, WIDTH))[cut].clone()
            if groups.is_last_stage:
                shape = (64, WIDTH) if head == "lm" else (1, WIDTH)
                self.tensors[f"{prefix}head"] = whole(seed + offset + 100, shape)

    def advance(self) -> None:
        """An update that keeps layouts equal."""
        for name, tensor in self.tensors.items():
            tensor.mul_(0.5).add_(float(len(name)))
        self.common["step"] += 1

    def sharded_state(self, *, optimizer: bool, loading: bool) -> dict[str, Any]:
        state: dict[str, Any] = {"model": self._sharded("")}
        if optimizer:
            state["optimizer"] = self._sharded("optimizer.state.exp_avg.")
            state["common"] = dict(self.common)
            if self.groups.tp_rank == 0 and self.groups.pp_rank == 0:
                state["rng"] = ShardedObject("rng", torch.arange(3), (1,), (0,), replica_id=self.groups.dp_rank)
        return state

    def _sharded(self, prefix: str) -> dict[str, ShardedTensor]:
        groups, entries = self.groups, {}
        for layer in self.layers:
            entries[f"layer{layer}"] = ShardedTensor.from_rank_offsets(
                f"{prefix}layers.weight",
                self.tensors[f"{prefix}{layer}"],
                (0, layer, LAYERS),
                (1, groups.tp_rank, groups.tp_size),
                replica_id=groups.dp_rank,
                prepend_axis_num=1,
            )
        if groups.is_last_stage:
            key = "output_layer.weight" if self.head == "lm" else f"{self.head}_head.weight"
            entries["head"] = ShardedTensor.from_rank_offsets(
                prefix + key, self.tensors[f"{prefix}head"], replica_id=(groups.tp_rank, groups.dp_rank)
            )
        return entries

    def load_sharded_state(self, state: dict[str, Any]) -> None:
        for prefix, entry in (("", "model"), ("optimizer.state.exp_avg.", "optimizer")):
            for name, value in state.get(entry, {}).items():
                self.tensors[f"{prefix}{name.removeprefix('layer')}"].copy_(value)
        self.common = state.get("common", self.common)


def groups_of(
    layouts: Mapping[str, ParallelConfig], ranges: Mapping[str, tuple[int, int]] | None = None
) -> dict[str, ParallelGroups | None]:
    """Groups by placement; a range is (first rank, ranks), by default the whole world."""
    grids = {
        name: RankGrid.from_config(layout, *(ranges or {}).get(name, (0, dist.get_world_size())))
        for name, layout in layouts.items()
    }
    return create_groups(grids, layouts, timeout_seconds=60)


def toy(layout: ParallelConfig, seed: int, **options: Any) -> Toy:
    """A toy on the whole world."""
    groups = groups_of({"all": layout})["all"]
    assert groups is not None
    return Toy(groups, seed, **options)


def checkpointer(root: Path, tokenizer: Tokenizer | None = None, **options: Any) -> Checkpointer:
    """A checkpointer, by default without a tokenizer."""
    return Checkpointer(root, CheckpointConfig(**options), ManifestInfo({"run": {"seed": 1}}, tokenizer))


def tokenizer() -> Tokenizer:
    """A small one."""
    return train_sentencepiece([f"头痛 {number} 天，发热 {number * 7} 小时。" for number in range(60)], 284)


def equal(first: Toy, second: Toy) -> bool:
    """Bit equality of all that a rank holds."""
    return first.tensors.keys() == second.tensors.keys() and all(
        torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors
    )
