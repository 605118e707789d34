"""Decoding on the training weights: prefill, then one token a row a step, with a KV cache of our own.

megatron-core's inference context has one offset for the whole batch; here every row is at its own, so that a finished
row can be replaced at once.  The weights are the training parameters themselves (no copy), read by megatron-core's
layout: fused qkv by key/value group, fused gate and up.  Keys are cached rotated.

T: tokens of a step; B: active rows; H, K: this rank's query and key/value heads; N: head size; S: cache length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import dispatch
from kernels.attention import attention, decode_attention
from kernels.rms_norm import rms_norm
from kernels.rope import rope_tables, split_rope
from kernels.swiglu import swiglu
from megatron_zj.engine.decode_graphs import Graph, StepGraphs, graphs_of, why_eager
from megatron_zj.engine.engine import Engine
from megatron_zj.models.rotary import rotary_frequencies
from megatron_zj.models.transformer_config import kernel_backend

_WIDE_ROWS = 4096  # of the output matrix, cast to fp32 at once


@dataclass(frozen=True)
class _Layer:
    """One layer's weights on this tensor-parallel rank, and its place in the cache."""

    norm_D: Tensor
    qkv: Tensor
    out: Tensor
    mlp_norm_D: Tensor
    gate_up: Tensor
    down: Tensor
    index: int


class Decoder:
    """Next-token logits of an engine's model.  Every method is collective over the engine's model replica.

    On CUDA, steps are padded to buckets of rows and, with ``graphs``, replayed as CUDA graphs; ``why_eager`` says why
    they are not (None: they are).  The engine's weights must stay where they are while the decoder lives.
    """

    def __init__(self, engine: Engine, *, max_rows: int, max_tokens: int, graphs: bool = True) -> None:
        self.engine, self.groups, self.model = engine, engine.groups, engine.model
        weight = next(engine.chunks[0].parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self._chunks = _read_layers(engine.chunks)
        num_layers = sum(len(layers) for layers in self._chunks)
        heads = self.model.kv_heads // self.groups.tp_size
        shape = (num_layers, max_rows, max_tokens, heads, self.model.head_size)
        self._keys = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self._values = torch.zeros_like(self._keys)
        frequencies = rotary_frequencies(self.model).to(self.device)
        self._tables = rope_tables(frequencies, max_tokens)
        self._lengths: list[int] = []  # cached tokens of each active slot
        with kernel_backend(self.model.kernels):
            self.why_eager = why_eager(self.groups, weight) if graphs else "they are switched off"
        self._padded: StepGraphs | None = None
        if self.device.type == "cuda" and self.groups.pp_size == 1:
            self.pad_steps(graphs_of(self.groups) if self.why_eager is None else None)

    def pad_steps(self, new_graph: Callable[[], Graph] | None) -> None:
        """Run steps in buckets of rows, through graphs made by ``new_graph`` (None: without)."""
        self._padded = StepGraphs(self._keys.shape[1], self.device, new_graph)

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """No gradients, the kernels that the model asks for; parameters still being gathered are waited for first."""
        self.engine.gather_weights()
        with torch.no_grad(), kernel_backend(self.model.kernels):
            yield

    def prefill(self, slots: Sequence[int], prompts: Sequence[Tensor]) -> Tensor | None:
        """Run new rows' prompts into ``slots``; logits [rows, vocabulary] on the last stage, None elsewhere.

        At most ``engine.micro_batch_tokens`` at once, and at least a row.
        """
        for slot, prompt in zip(slots, prompts, strict=True):
            self._lengths[slot:] = [len(prompt)]
        lasts: list[Tensor] = []
        first = 0
        for end in _cuts([len(prompt) for prompt in prompts], self.engine.config.micro_batch_tokens):
            ends = [0, *accumulate(len(prompt) for prompt in prompts[first:end])]
            tokens_T = torch.cat([prompt.to(self.device) for prompt in prompts[first:end]])
            hidden_TD = self._run(tokens_T, _Prefill(self, list(slots[first:end]), ends))
            if hidden_TD is not None:
                lasts.append(hidden_TD[torch.tensor(ends[1:], device=self.device) - 1])
            first = end
        return self._logits(torch.cat(lasts)) if lasts else None

    def decode(self, tokens_B: Tensor) -> Tensor | None:
        """Append one token to every active row; logits [B, vocabulary] on the last stage, None elsewhere."""
        if len(tokens_B) != len(self._lengths):
            raise ValueError(f"{len(tokens_B)} tokens for {len(self._lengths)} active rows")
        lengths, self._lengths = self._lengths, [length + 1 for length in self._lengths]
        if self._padded is not None:
            return self._padded.run(self._padded_step, tokens_B, lengths)
        longest = max(lengths) + 1
        step = _Step(self, torch.tensor(lengths, device=self.device), longest, ragged=min(lengths) + 1 < longest)
        hidden_BD = self._run(tokens_B.to(self.device), step)
        return None if hidden_BD is None else self._logits(hidden_BD)

    def move(self, source: int, target: int) -> None:
        """Slot ``source``'s row takes over slot ``target``."""
        length = self._lengths[source]
        for cache in (self._keys, self._values):
            cache[:, target, :length] = cache[:, source, :length]
        self._lengths[target] = length

    def truncate(self, num_rows: int) -> None:
        """Only the first ``num_rows`` slots stay active."""
        del self._lengths[num_rows:]

    def tell(self, drawn: tuple[Tensor, Tensor] | None, num_rows: int) -> tuple[list[int], list[float]]:
        """Tokens and log-probabilities drawn on the last stage, on every stage."""
        if self.groups.pp_size > 1:
            both = torch.zeros((2, num_rows), dtype=torch.float64, device=self.device)
            if drawn is not None:
                both = torch.stack([drawn[0].double(), drawn[1].double()])
            dist.broadcast(both, self.groups.last_stage_rank, group=self.groups.pgc.pp)
            drawn = (both[0].long(), both[1].float())
        if drawn is None:
            raise RuntimeError("nothing was drawn on the only stage")
        return drawn[0].tolist(), drawn[1].tolist()

    def _padded_step(self, tokens_B: Tensor, positions_B: Tensor) -> Tensor:
        """A step whose shapes depend on the number of rows alone: attention looks at the whole cache, by lengths."""
        hidden_BD = self._run(tokens_B, _Step(self, positions_B, self._keys.shape[2], ragged=True))
        if hidden_BD is None:
            raise RuntimeError("only a model on one stage decodes in padded steps")
        return self._logits(hidden_BD)

    def _run(self, tokens_T: Tensor, step: _Prefill | _Step) -> Tensor | None:
        """All layers of the model: this rank's chunks in turn, hidden states passed around the stages."""
        hidden_TD: Tensor | None = None
        for chunk, layers in enumerate(self._chunks):
            if chunk == 0 and self.groups.is_first_stage:
                hidden_TD = self._embed(tokens_T)
            elif self.groups.pp_size > 1:
                hidden_TD = self._receive(len(tokens_T))
            if hidden_TD is None:
                raise RuntimeError("a stage has no input")
            for layer in layers:
                hidden_TD = self._layer(hidden_TD, layer, step)
            if self.groups.pp_size > 1 and not (self.groups.is_last_stage and chunk == len(self._chunks) - 1):
                self._send(hidden_TD)
        return hidden_TD if self.groups.is_last_stage else None

    def _layer(self, hidden_TD: Tensor, layer: _Layer, step: _Prefill | _Step) -> Tensor:
        model, eps = self.model, self.model.norm_eps
        size, repeat = model.head_size, model.num_attention_heads // model.kv_heads
        qkv_TK = F.linear(rms_norm(hidden_TD, layer.norm_D, eps), layer.qkv)
        qkv_TKSN = qkv_TK.view(len(hidden_TD), -1, repeat + 2, size)
        query_THN, key_TKN, value_TKN = split_rope(qkv_TKSN, *self._tables, step.positions)
        self._keys[layer.index, step.slots, step.positions] = key_TKN
        self._values[layer.index, step.slots, step.positions] = value_TKN
        mixed_TD = step.attend(query_THN, key_TKN, value_TKN, layer.index).reshape(len(hidden_TD), -1)
        hidden_TD = hidden_TD + self._sum(F.linear(mixed_TD, layer.out))
        gate_up_TF = F.linear(rms_norm(hidden_TD, layer.mlp_norm_D, eps), layer.gate_up)
        return hidden_TD + self._sum(F.linear(swiglu(gate_up_TF), layer.down))

    def _embed(self, tokens_T: Tensor) -> Tensor:
        weight = self.engine.chunks[0].embedding.word_embeddings.weight
        if self.groups.tp_size == 1:
            return F.embedding(tokens_T, weight)
        local_T = tokens_T - self.groups.tp_rank * weight.shape[0]
        own_T = (local_T >= 0) & (local_T < weight.shape[0])
        return self._sum(F.embedding(local_T.where(own_T, 0), weight) * own_T[:, None])

    def _logits(self, hidden_BD: Tensor) -> Tensor:
        stage = self.engine.chunks[-1]
        hidden_BD = rms_norm(hidden_BD, stage.decoder.final_layernorm.weight, self.model.norm_eps)
        tied = stage.share_embeddings_and_output_weights
        weight = stage.shared_embedding_or_output_weight() if tied else stage.output_layer.weight
        logits_BV = _product(hidden_BD, weight)
        if self.groups.tp_size > 1:
            parts = [torch.empty_like(logits_BV) for _ in range(self.groups.tp_size)]
            dist.all_gather(parts, logits_BV.contiguous(), group=self.groups.pgc.tp)
            logits_BV = torch.cat(parts, -1)
        return logits_BV[:, : self.model.vocab_size]

    def _sum(self, partial: Tensor) -> Tensor:
        if self.groups.tp_size > 1:
            dist.all_reduce(partial, group=self.groups.pgc.tp)
        return partial

    def _neighbour(self, offset: int) -> int:
        ranks = dist.get_process_group_ranks(self.groups.pgc.pp)
        return ranks[(self.groups.pp_rank + offset) % len(ranks)]

    def _send(self, hidden_TD: Tensor) -> None:
        dist.send(hidden_TD.contiguous(), self._neighbour(1), group=self.groups.pgc.pp)

    def _receive(self, num_tokens: int) -> Tensor:
        hidden_TD = torch.empty((num_tokens, self.model.hidden_size), dtype=self.dtype, device=self.device)
        dist.recv(hidden_TD, self._neighbour(-1), group=self.groups.pgc.pp)
        return hidden_TD


def _product(hidden_BD: Tensor, weight_VD: Tensor) -> Tensor:
    """Logits [B, V] fp32, as ``linear_logprob`` has them in training: never rounded to the operands' type."""
    if hidden_BD.dtype == torch.float32:
        return F.linear(hidden_BD, weight_VD)
    if hidden_BD.is_cuda:
        return torch.mm(hidden_BD, weight_VD.t(), out_dtype=torch.float32)
    wide_BD = hidden_BD.float()
    return torch.cat([F.linear(wide_BD, rows.float()) for rows in torch.split(weight_VD, _WIDE_ROWS)], -1)


def _cuts(lengths: Sequence[int], budget: int) -> list[int]:
    """Where runs of rows end that have at most ``budget`` tokens each, or one row."""
    ends, tokens = [], 0
    for at, length in enumerate(lengths):
        if at and tokens + length > budget:
            ends.append(at)
            tokens = 0
        tokens += length
    return [*ends, len(lengths)]


class _Prefill:
    """A step over whole prompts, packed."""

    def __init__(self, decoder: Decoder, slots: list[int], ends: list[int]) -> None:
        sizes = [end - start for start, end in pairwise(ends)]
        device = decoder.device
        self.positions = torch.cat([torch.arange(size, device=device) for size in sizes])
        self.slots = torch.repeat_interleave(torch.tensor(slots, device=device), torch.tensor(sizes, device=device))
        self._cu_seqlens, self._ends = torch.tensor(ends, dtype=torch.int32, device=device), tuple(ends)

    def attend(self, query_THN: Tensor, key_TKN: Tensor, value_TKN: Tensor, layer: int) -> Tensor:
        """Causal attention within each prompt."""
        return attention(query_THN, key_TKN, value_TKN, self._cu_seqlens, cu_seqlens_q_list=self._ends)[0]


class _Step:
    """A step of one token a row."""

    def __init__(self, decoder: Decoder, positions_B: Tensor, longest: int, *, ragged: bool) -> None:
        """``positions``: where each row's token goes; ``longest``: no row has more tokens, this one included."""
        self.positions = positions_B
        self.slots = torch.arange(len(positions_B), device=decoder.device)
        self._keys, self._values = decoder._keys, decoder._values
        self._lengths_B, self._longest = positions_B + 1, longest
        self._in_torch = dispatch.backend_of(decoder._keys) == "torch"
        self._mask: Tensor | None = None
        if self._in_torch and ragged:  # once for all layers
            hidden_BS = torch.arange(longest, device=decoder.device) > positions_B[:, None]
            mask_BS = torch.zeros(hidden_BS.shape, dtype=decoder.dtype, device=decoder.device)
            self._mask = mask_BS.masked_fill_(hidden_BS, float("-inf"))[:, None, None]

    def attend(self, query_BHN: Tensor, key_BKN: Tensor, value_BKN: Tensor, layer: int) -> Tensor:
        """Each row's token over its own cached keys."""
        rows = len(query_BHN)
        keys = self._keys[layer, :rows, : self._longest]
        values = self._values[layer, :rows, : self._longest]
        if not self._in_torch:
            return decode_attention(query_BHN, keys, values, self._lengths_B)
        # a group of query heads stands where sdpa has queries: the cache is read once, and never repeated
        query_BKQN = query_BHN.view(rows, keys.shape[2], -1, keys.shape[3])
        return F.scaled_dot_product_attention(
            query_BKQN, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=self._mask
        ).reshape(query_BHN.shape)


def _read_layers(chunks: Sequence[nn.Module]) -> list[list[_Layer]]:
    """The weights of every chunk's layers; ``index`` counts this rank's layers."""
    read: list[list[_Layer]] = []
    index = 0
    for chunk in chunks:
        layers = []
        for layer in chunk.decoder.layers:  # type: ignore[union-attr]
            attention_block, mlp = layer.self_attention, layer.mlp
            # Transformer Engine fuses the norm into the linear layer that follows it
            norm = getattr(attention_block.linear_qkv, "layer_norm_weight", None)
            mlp_norm = getattr(mlp.linear_fc1, "layer_norm_weight", None)
            layers.append(
                _Layer(
                    layer.input_layernorm.weight if norm is None else norm,
                    attention_block.linear_qkv.weight,
                    attention_block.linear_proj.weight,
                    layer.pre_mlp_layernorm.weight if mlp_norm is None else mlp_norm,
                    mlp.linear_fc1.weight,
                    mlp.linear_fc2.weight,
                    index,
                )
            )
            index += 1
        read.append(layers)
    return read
