"""The one map between Hugging Face's LLaMA names and megatron-core's parameters.

A canonical tensor is the whole model's, under its Hugging Face name.  A stage's parameter is made of one to three of
them: ``linear_qkv`` holds, for each key/value head, the rows of its query heads, its key and its value;
``linear_fc1`` holds a rank's gate rows, then its up rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_zj.config.model import HeadKind, ModelConfig
from megatron_zj.parallel.groups import ParallelGroups
from megatron_zj.runtime.seed import keyed_generator

if TYPE_CHECKING:
    from megatron_zj.models.llama import LlamaStage

EMBEDDING = "model.embed_tokens.weight"
SCALAR_HEADS = ("value_head.", "score_head.")  # how their tensors' names begin
# Parameter of a layer -> canonical names below model.layers.N.  With Transformer Engine a norm lives in the linear
# that follows it.
_LAYER_PARTS: dict[str, tuple[str, ...]] = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.weight": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}


@dataclass(frozen=True)
class CanonicalTensor:
    """A tensor of the whole model."""

    name: str
    shape: tuple[int, ...]  # with the padded vocabulary's rows
    tp_dim: int | None  # the dim that tensor parallelism cuts; None: every rank has it whole


def canonical_tensors(model: ModelConfig, head: HeadKind) -> list[CanonicalTensor]:
    """All tensors of a model, in a fixed order."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    queries, keys = model.num_attention_heads * model.head_size, model.kv_heads * model.head_size
    found = [CanonicalTensor(EMBEDDING, (model.padded_vocab_size, hidden), 0)]
    for layer in range(model.num_layers):
        for name, shape, tp_dim in (
            ("input_layernorm.weight", (hidden,), None),
            ("self_attn.q_proj.weight", (queries, hidden), 0),
            ("self_attn.k_proj.weight", (keys, hidden), 0),
            ("self_attn.v_proj.weight", (keys, hidden), 0),
            ("self_attn.o_proj.weight", (hidden, queries), 1),
            ("post_attention_layernorm.weight", (hidden,), None),
            ("mlp.gate_proj.weight", (ffn, hidden), 0),
            ("mlp.up_proj.weight", (ffn, hidden), 0),
            ("mlp.down_proj.weight", (hidden, ffn), 1),
        ):
            found.append(CanonicalTensor(f"model.layers.{layer}.{name}", shape, tp_dim))
    found.append(CanonicalTensor("model.norm.weight", (hidden,), None))
    if head == "lm" and not model.tie_embeddings:
        found.append(CanonicalTensor("lm_head.weight", (model.padded_vocab_size, hidden), 0))
    if head != "lm":
        found.append(CanonicalTensor(f"{head}_head.weight", (1, hidden), None))
    if head == "score":
        found.append(CanonicalTensor("score_head.bias", (1,), None))
    return found


def fuse_qkv(query: Tensor, key: Tensor, value: Tensor, num_groups: int) -> Tensor:
    """Rows of q_proj, k_proj, v_proj -> linear_qkv.

    ``num_groups``: key/value heads that these rows hold; a tensor-parallel shard fuses like the whole.
    """
    parts = [part.reshape(num_groups, -1, *part.shape[1:]) for part in (query, key, value)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def split_qkv(fused: Tensor, num_groups: int, head_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """linear_qkv -> rows of q_proj, k_proj, v_proj; undoes ``fuse_qkv``."""
    grouped = fused.reshape(num_groups, -1, *fused.shape[1:])
    share = grouped.shape[1] - 2 * head_size
    query, key, value = torch.split(grouped, [share, head_size, head_size], dim=1)
    return query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)


def fuse_gate_up(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of gate_proj and up_proj -> linear_fc1.  A rank's shard is made of the rank's gate and up rows."""
    return torch.cat([gate, up])


def split_gate_up(fused: Tensor) -> tuple[Tensor, Tensor]:
    """linear_fc1 -> rows of gate_proj and up_proj; undoes ``fuse_gate_up``."""
    gate, up = fused.chunk(2)
    return gate, up


def shard(whole: Tensor, tp_dim: int | None, size: int, rank: int) -> Tensor:
    """This rank's part of a whole tensor: a view."""
    return whole if tp_dim is None else whole.chunk(size, dim=tp_dim)[rank]


def canonical_names(parameter: str, layer_offset: int, model: ModelConfig, head: HeadKind) -> tuple[str, ...]:
    """What a stage's parameter is made of.  ``layer_offset``: the model's index of the stage's first layer.

    Raises KeyError for a name that is no LLaMA parameter.
    """
    if parameter.startswith("decoder.layers."):
        index, name = parameter.removeprefix("decoder.layers.").split(".", 1)
        return tuple(f"model.layers.{layer_offset + int(index)}.{part}" for part in _LAYER_PARTS[name])
    head_name = (EMBEDDING if model.tie_embeddings else "lm_head.weight") if head == "lm" else f"{head}_head.weight"
    return (
        {
            "embedding.word_embeddings.weight": EMBEDDING,
            "decoder.final_layernorm.weight": "model.norm.weight",
            "output_layer.weight": head_name,
            "output_layer.bias": f"{head}_head.bias",
        }[parameter],
    )


def _parameters(chunks: Sequence[LlamaStage]) -> Iterator[tuple[tuple[str, ...], torch.nn.Parameter]]:
    for chunk in chunks:
        layers = chunk.decoder.layers
        offset = layers[0].layer_number - 1 if len(layers) else 0
        for name, parameter in chunk.named_parameters():
            yield canonical_names(name, offset, chunk.model, chunk.head), parameter


def read_stage(chunks: Sequence[LlamaStage], groups: ParallelGroups) -> dict[str, Tensor]:
    """This rank's tp shards by canonical name, of the layers it holds; detached, views where that is possible."""
    return _read(chunks, groups, lambda parameter: parameter.detach())


def read_stage_grads(chunks: Sequence[LlamaStage], groups: ParallelGroups) -> dict[str, Tensor]:
    """The gradients, alike: ``main_grad`` where megatron-core's DDP keeps one, else ``grad``, else zeros."""

    def gradient(parameter: torch.nn.Parameter) -> Tensor:
        main = getattr(parameter, "main_grad", None)
        if isinstance(main, Tensor):
            return main
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    return _read(chunks, groups, gradient)


def _read(
    chunks: Sequence[LlamaStage], groups: ParallelGroups, get: Callable[[torch.nn.Parameter], Tensor]
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for names, parameter in _parameters(chunks):
        tensor = get(parameter)
        if len(names) == 3:
            model = chunks[0].model
            parts: tuple[Tensor, ...] = split_qkv(tensor, model.kv_heads // groups.tp_size, model.head_size)
        else:
            parts = split_gate_up(tensor) if len(names) == 2 else (tensor,)
        found.update(zip(names, parts, strict=True))
    return found


@torch.no_grad()
def write_stage(chunks: Sequence[LlamaStage], groups: ParallelGroups, get: Callable[[str], Tensor]) -> None:
    """Write every parameter of this rank.  ``get`` gives WHOLE tensors by canonical name; the shard is cut here.

    Raises ValueError when ``get`` gives another shape.
    """
    tensors = {tensor.name: tensor for tensor in canonical_tensors(chunks[0].model, chunks[0].head)}

    def part(name: str) -> Tensor:
        whole, expected = get(name), tensors[name]
        if tuple(whole.shape) != expected.shape:
            raise ValueError(f"{name} has shape {tuple(whole.shape)}, the model needs {expected.shape}")
        return shard(whole, expected.tp_dim, groups.tp_size, groups.tp_rank)

    for names, parameter in _parameters(chunks):
        parts = [part(name) for name in names]
        if len(parts) == 3:
            query, key, value = parts
            fused = fuse_qkv(query, key, value, chunks[0].model.kv_heads // groups.tp_size)
        else:
            fused = fuse_gate_up(*parts) if len(parts) == 2 else parts[0]
        parameter.copy_(fused)


def initial_tensor(tensor: CanonicalTensor, model: ModelConfig, seed: int) -> Tensor:
    """The whole initial tensor, fp32: normal(init_std), norms 1, biases 0.

    Projections back into the residual stream (o_proj, down_proj) are scaled by 1 / sqrt(2 num_layers), as Megatron
    does (Shoeybi et al. 2019, arXiv:1909.08053).
    """
    if "norm" in tensor.name:
        return torch.ones(tensor.shape)
    if tensor.name.endswith(".bias"):
        return torch.zeros(tensor.shape)
    std = model.init_std
    if tensor.name.endswith(("o_proj.weight", "down_proj.weight")):
        std /= (2.0 * model.num_layers) ** 0.5
    return torch.randn(tensor.shape, generator=keyed_generator(seed, "weights", tensor.name)) * std


def init_stage(
    chunks: Sequence[LlamaStage],
    groups: ParallelGroups,
    model: ModelConfig,
    head: HeadKind,
    seed: int,
    *,
    awaits_weights: bool = False,
) -> None:
    """Initial weights, keyed by (seed, canonical name), drawn whole and then cut: the same on every layout.

    ``awaits_weights``: a checkpoint follows.  Then only a scalar head is drawn, which may be new, and the rest is NaN:
    large models start without the time and memory of a draw, and what is not loaded cannot pass for a weight.
    """
    tensors = {tensor.name: tensor for tensor in canonical_tensors(model, head)}

    def get(name: str) -> Tensor:
        if awaits_weights and not name.startswith(SCALAR_HEADS):
            return torch.full((), torch.nan).expand(tensors[name].shape)  # one number, however large the tensor
        return initial_tensor(tensors[name], model, seed)

    write_stage(chunks, groups, get)
