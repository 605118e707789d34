"""A LLaMA in plain torch, independent of the framework: what every layout is compared with.

One process, one sequence at a time, no packing, no cache, no fused operator: attention is a masked softmax, RMSNorm,
SwiGLU and the rotary embedding are their formulas.  It runs in fp32 or, as the truth, in fp64.  Its state dict has
Hugging Face's LLaMA names (plus ``value_head.weight``, ``score_head.{weight, bias}``).

Sources: Touvron et al. 2023 (arXiv:2302.13971); Su et al. 2021 (RoPE, arXiv:2104.09864); Ainslie et al. 2023 (GQA,
arXiv:2305.13245); Chen et al. 2023 (linear scaling, arXiv:2306.15595); Llama 3 frequency scaling as in
``transformers``' ``rope_type: llama3``.

Legend: T tokens, D hidden size, F SwiGLU width, H heads, G key/value heads, E head size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from megatron_zj.config.model import HeadKind, ModelConfig


def rope_frequencies(model: ModelConfig) -> Tensor:
    """[E / 2] float64: radians a position turns each pair of channels."""
    exponents = [2 * index / model.head_size for index in range(model.head_size // 2)]
    frequencies = [model.rope_theta**-exponent for exponent in exponents]
    scaling = model.rope_scaling
    if scaling is None:
        return torch.tensor(frequencies, dtype=torch.float64)
    if scaling.kind == "linear":
        return torch.tensor([frequency / scaling.factor for frequency in frequencies], dtype=torch.float64)
    scaled = []
    longest = scaling.original_max_position_embeddings / scaling.low_freq_factor
    shortest = scaling.original_max_position_embeddings / scaling.high_freq_factor
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        if wavelength > longest:
            scaled.append(frequency / scaling.factor)
        elif wavelength < shortest:
            scaled.append(frequency)
        else:
            turns = scaling.original_max_position_embeddings / wavelength
            smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
            scaled.append((1 - smooth) * frequency / scaling.factor + smooth * frequency)
    return torch.tensor(scaled, dtype=torch.float64)


class Norm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return x_TD / torch.sqrt((x_TD * x_TD).mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    """Causal self-attention over one sequence."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.groups, self.size = model.num_attention_heads, model.kv_heads, model.head_size
        self.frequencies = rope_frequencies(model)

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False, dtype=dtype)

        self.q_proj = linear(model.hidden_size, self.heads * self.size)
        self.k_proj = linear(model.hidden_size, self.groups * self.size)
        self.v_proj = linear(model.hidden_size, self.groups * self.size)
        self.o_proj = linear(self.heads * self.size, model.hidden_size)

    def _rotate(self, x_THE: Tensor) -> Tensor:
        positions = torch.arange(x_THE.shape[0], dtype=torch.float64)
        angles = positions[:, None] * self.frequencies[None]
        cos, sin = angles.cos().to(x_THE.dtype)[:, None], angles.sin().to(x_THE.dtype)[:, None]
        first, second = x_THE[..., : self.size // 2], x_THE[..., self.size // 2 :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def forward(self, x_TD: Tensor) -> Tensor:
        length = x_TD.shape[0]
        q_THE = self._rotate(self.q_proj(x_TD).view(length, self.heads, self.size))
        k_TGE = self._rotate(self.k_proj(x_TD).view(length, self.groups, self.size))
        v_TGE = self.v_proj(x_TD).view(length, self.groups, self.size)
        share = self.heads // self.groups  # query heads g * share ... (g + 1) * share - 1 read key/value head g
        k_THE, v_THE = k_TGE.repeat_interleave(share, dim=1), v_TGE.repeat_interleave(share, dim=1)
        scores_HTT = torch.einsum("the,she->hts", q_THE, k_THE) / math.sqrt(self.size)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights_HTT = torch.softmax(scores_HTT.masked_fill(future, float("-inf")), dim=-1)
        return self.o_proj(torch.einsum("hts,she->the", weights_HTT, v_THE).reshape(length, -1))


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(model.hidden_size, model.ffn_hidden_size, bias=False, dtype=dtype)
        self.up_proj = nn.Linear(model.hidden_size, model.ffn_hidden_size, bias=False, dtype=dtype)
        self.down_proj = nn.Linear(model.ffn_hidden_size, model.hidden_size, bias=False, dtype=dtype)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_TF = self.gate_proj(x_TD)
        return self.down_proj(gate_TF * torch.sigmoid(gate_TF) * self.up_proj(x_TD))


class Layer(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_layernorm = Norm(model.hidden_size, model.norm_eps, dtype)
        self.self_attn = Attention(model, dtype)
        self.post_attention_layernorm = Norm(model.hidden_size, model.norm_eps, dtype)
        self.mlp = Mlp(model, dtype)

    def forward(self, x_TD: Tensor) -> Tensor:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD))
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


class Body(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(model.padded_vocab_size, model.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(Layer(model, dtype) for _ in range(model.num_layers))
        self.norm = Norm(model.hidden_size, model.norm_eps, dtype)

    def forward(self, tokens_T: Tensor) -> Tensor:
        x_TD = self.embed_tokens(tokens_T)
        for layer in self.layers:
            x_TD = layer(x_TD)
        return self.norm(x_TD)


class ReferenceLlama(nn.Module):
    """The whole model.  Weights are normal with ``init_std`` times ``spread`` (norms near 1) unless ``state`` is given.

    ``state``: Hugging Face names; embedding and lm_head may have ``vocab_size`` or ``padded_vocab_size`` rows.
    """

    def __init__(
        self,
        model: ModelConfig,
        head: HeadKind = "lm",
        *,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        spread: float = 1.0,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.head = model, head
        self.model = Body(model, dtype)
        if head == "lm" and not model.tie_embeddings:
            self.lm_head = nn.Linear(model.hidden_size, model.padded_vocab_size, bias=False, dtype=dtype)
        if head == "value":
            self.value_head = nn.Linear(model.hidden_size, 1, bias=False, dtype=dtype)
        if head == "score":
            self.score_head = nn.Linear(model.hidden_size, 1, bias=True, dtype=dtype)
        if state is None:
            self._draw(seed, spread)
        else:
            self._read(state)

    @torch.no_grad()
    def _draw(self, seed: int, spread: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in sorted(self.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            centre = 1.0 if "norm" in name else 0.0
            parameter.copy_(centre + noise * self.config.init_std * spread)

    @torch.no_grad()
    def _read(self, state: Mapping[str, Tensor]) -> None:
        expected = dict(self.named_parameters())
        if set(expected) != set(state):
            raise ValueError(f"state differs in {sorted(set(expected) ^ set(state))}")
        for name, parameter in expected.items():
            value = state[name].to(parameter.dtype)
            if value.shape != parameter.shape and value.shape[0] != self.config.vocab_size:
                raise ValueError(f"{name}: {tuple(value.shape)} given, {tuple(parameter.shape)} expected")
            parameter.zero_()
            parameter[: value.shape[0]].copy_(value)

    def hidden(self, tokens_T: Tensor) -> Tensor:
        """[T, D] after the final norm, of one sequence."""
        return self.model(tokens_T)

    def logits(self, tokens_T: Tensor) -> Tensor:
        """[T, vocab_size] of one sequence; padded rows are left out."""
        weight = self.model.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight
        return (self.hidden(tokens_T) @ weight.T)[:, : self.config.vocab_size]

    def logprobs(self, tokens_T: Tensor, temperature: float = 1.0) -> Tensor:
        """[T]: log p(token t | tokens before t) at index t; index 0 holds 0."""
        table_TV = torch.log_softmax(self.logits(tokens_T) / temperature, dim=-1)
        picked = table_TV[:-1].gather(1, tokens_T[1:, None])[:, 0]
        return torch.cat([picked.new_zeros(1), picked])

    def entropy(self, tokens_T: Tensor, temperature: float = 1.0) -> Tensor:
        """[T]: entropy (nats) of the distribution that predicts token t, at index t; index 0 holds 0."""
        table_TV = torch.log_softmax(self.logits(tokens_T) / temperature, dim=-1)[:-1]
        entropy = -(table_TV.exp() * table_TV).sum(-1)
        return torch.cat([entropy.new_zeros(1), entropy])

    def values(self, tokens_T: Tensor) -> Tensor:
        """[T]: value of the state before token t at index t; index 0 holds 0."""
        values = self.value_head(self.hidden(tokens_T))[:-1, 0]
        return torch.cat([values.new_zeros(1), values])

    def score(self, tokens_T: Tensor) -> Tensor:
        """Scalar: the reward of one sequence, read at its last token."""
        return self.score_head(self.hidden(tokens_T)[-1])[0]

    def outputs(self, rows: Sequence[Tensor], want: str, temperature: float = 1.0) -> Tensor:
        """``logprobs | entropy | values`` of all rows end to end, or ``scores`` [R]; each row by itself."""
        if want == "scores":
            return torch.stack([self.score(row) for row in rows])
        if want == "values":
            return torch.cat([self.values(row) for row in rows])
        return torch.cat([getattr(self, want)(row, temperature) for row in rows])

    def gradients(self) -> dict[str, Tensor]:
        """Gradients by Hugging Face name (zeros where there is none)."""
        return {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()
            for name, parameter in self.named_parameters()
        }
