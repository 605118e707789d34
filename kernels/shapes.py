"""The shapes the benchmark times, and on each the forms that are compared."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import dispatch
from kernels.attention import attention, decode_attention
from kernels.gae import gae
from kernels.linear_logprob import linear_logprob
from kernels.reward_head import ranking_loss, reward_head
from kernels.rms_norm import add_rms_norm
from kernels.rope import rope, rope_tables
from kernels.swiglu import swiglu
from kernels.value_head import value_head_loss

Run = Callable[[], object]
LIGER = "liger_kernel"  # a rival, timed where it happens to be installed; nothing needs it
Results = Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]]


@dataclass(frozen=True)
class Case:
    """One op on one shape: our form and the alternatives, and the work they all do."""

    op: str
    shape: str
    forms: Mapping[str, Run]  # "ours forward", "naive both"; without a pass in the name: there is no backward pass
    work: Mapping[str, float]  # of each pass: bytes that must move, or floating-point operations
    unit: str  # "GB/s" or "TFLOP/s"
    verify: Mapping[str, Results]  # of each form of ours: its outputs and gradients, and plain torch's in fp32
    tolerance: float = field(default=2e-2)
    backward: Mapping[str, Callable[[], Run]] = field(default_factory=dict)  # "ours backward": to a graph's own run


PASSES = ("forward", "backward", "both")


def split_form(form: str) -> tuple[str, str]:
    """'bare GEMM both' -> ('bare GEMM', 'both'); '' where there is no backward pass."""
    name, _, way = form.rpartition(" ")
    return (name, way) if way in PASSES else (form, "")


def _work(forward: float, backward: float) -> dict[str, float]:
    return {"": forward, "forward": forward, "backward": backward, "both": forward + backward}


def cases(device: torch.device) -> list[Case]:
    """Model-sized on CUDA (bf16), small on a CPU (fp32)."""
    found: list[Case] = []
    if device.type == "cuda":
        found += [_attention(device, 4, 8192, 32, 8, 128, packed=packed) for packed in (False, True)]
        found += [_decode(device, 64, 8192, 32, 8, 128)]
        found += [_norm(device, 16384, width) for width in (2048, 4096, 8192)]
        found += [_logprob(device, 8192, 151936, width) for width in (2048, 4096)]
        found += [_swiglu(device, 16384, 11008), _rope(device, 16384, 32, 128)]
        found += [_gae(device, 512, 1024), _value(device, 16384, 4096), *_reward(device, 64, 256, 4096)]
        return found
    found += [_attention(device, 4, 512, 8, 4, 64, packed=packed) for packed in (False, True)]
    found += [_decode(device, 16, 512, 8, 4, 64), _norm(device, 2048, 512), _logprob(device, 1024, 16384, 256)]
    found += [_swiglu(device, 2048, 1376), _rope(device, 2048, 8, 64), _gae(device, 64, 256)]
    return [*found, _value(device, 2048, 512), *_reward(device, 32, 64, 512)]


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _random(device: torch.device, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(*shape, dtype=dtype or _dtype(device), device=device)


def _with_gradients(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> Run:
    """Forward and backward, along fixed directions."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    directions: list[Tensor] = []

    def run() -> Sequence[Tensor]:
        outputs = [out for out in function(*leaves) if out.requires_grad]
        if not directions:
            directions.extend(torch.randn_like(out) for out in outputs)
        return torch.autograd.grad(outputs, leaves, directions)

    return run


def _backward(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> Callable[[], Run]:
    """Builds the graph; what it gives back runs the backward pass alone, any number of times."""

    def build() -> Run:
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = [out for out in function(*leaves) if out.requires_grad]
        directions = [torch.randn_like(out) for out in outputs]
        return lambda: torch.autograd.grad(outputs, leaves, directions, retain_graph=True)

    return build


def _case(
    op: str,
    shape: str,
    named: Mapping[str, Callable[..., Sequence[Tensor]]],
    inputs: Sequence[Tensor],
    work: Mapping[str, float],
    unit: str,
    verify: Mapping[str, Results],
) -> Case:
    """Every form in every pass."""
    forms: dict[str, Run] = {}
    for name, function in named.items():
        forms[f"{name} forward"] = lambda function=function: function(*inputs)  # type: ignore[misc]
        forms[f"{name} both"] = _with_gradients(function, inputs)
    backward = {f"{name} backward": _backward(function, inputs) for name, function in named.items()}
    return Case(op, shape, forms, work, unit, verify, backward=backward)


def _beside(
    ours: Callable[..., Sequence[Tensor]], plain: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]
) -> Results:
    """Outputs, then the gradients of all inputs, of both; plain torch gets the same numbers in fp32."""

    def verify() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        found: list[list[Tensor]] = []
        directions: list[Tensor] = []
        for function, dtype in ((ours, None), (plain, torch.float32)):
            leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
            outputs = list(function(*leaves))
            directions = directions or [torch.randn_like(out) for out in outputs]
            along = [way.to(out.dtype) for way, out in zip(directions, outputs, strict=True)]
            found.append([x.detach() for x in outputs] + list(torch.autograd.grad(outputs, leaves, along)))
        return found[0], found[1]

    return verify


def _alternatives(
    device: torch.device, ours: Callable[..., Sequence[Tensor]], plain: Callable[..., Sequence[Tensor]]
) -> dict[str, Callable[..., Sequence[Tensor]]]:
    named = {"ours": ours, "naive": plain}
    if device.type == "cuda":
        named["compiled"] = torch.compile(plain)
    return named


def _liger(module: str, name: str, device: torch.device) -> Any:
    """A class of Liger's on CUDA, where it is installed and has it; else None."""
    try:
        return getattr(importlib.import_module(f"{LIGER}.{module}"), name) if device.type == "cuda" else None
    except (ImportError, AttributeError):
        return None


def _varlen() -> Callable[..., Tensor] | None:
    """torch's own attention over packed sequences, where this torch has it; else None."""
    try:
        return getattr(importlib.import_module("torch.nn.attention.varlen"), "varlen_attn")  # noqa: B009
    except (ImportError, AttributeError):
        return None


def _naive_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """One mask over the whole pack: what packing costs without a kernel for it."""
    total, group = q.shape[0], q.shape[1] // k.shape[1]
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)
    hidden = (row[:, None] != row[None, :]) | torch.ones(total, total, device=q.device).triu(1).bool()
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * q.shape[2] ** -0.5
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1, dtype=torch.float32).to(q.dtype)
    return [torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, 1))]


def _attention(
    device: torch.device, rows: int, length: int, heads: int, kv_heads: int, dim: int, *, packed: bool
) -> Case:
    ragged = [length // 2, length // 8, length - length // 2 - length // 8] if packed else [length]
    lengths = ragged * rows
    ends = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    cu = torch.tensor(ends, dtype=torch.int32, device=device)
    inputs = [_random(device, rows * length, count, dim) for count in (heads, kv_heads, kv_heads)]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        return attention(q, k, v, cu, cu_seqlens_q_list=ends)[:1]

    def in_form(form: dispatch.DenseForm) -> Callable[..., Sequence[Tensor]]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
            with dispatch.use_dense(form):
                return ours(q, k, v)

        return run

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        q, k, v = (x.view(rows, length, -1, dim).transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return [out.transpose(1, 2).reshape(rows * length, heads, dim)]

    named: dict[str, Callable[..., Sequence[Tensor]]] = {"ours": ours}
    if device.type != "cuda":
        named["naive"] = lambda q, k, v: _naive_attention(q, k, v, lengths)
    elif not packed:
        named["ours tma"] = in_form("tma")
        named["ours specialized"] = in_form("specialized")
    elif (varlen := _varlen()) is not None:
        named["flash varlen"] = lambda q, k, v: [
            varlen(q, k, v, cu, cu, max(lengths), max(lengths), window_size=(-1, 0), enable_gqa=True)
        ]
    if not packed:
        named["sdpa"] = sdpa
        for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION") if device.type == "cuda" else ():
            named[f"sdpa {name.split('_')[0].lower()}"] = sdpa_kernel(getattr(SDPBackend, name))(sdpa)
    flops = sum(2 * 2 * heads * dim * size * size / 2 for size in lengths)
    size = min(length, 512)  # the naive form holds size x size scores
    few = [size // 2, size // 8, size - size // 2 - size // 8] if packed else [size]
    first = [0, *torch.tensor(few).cumsum(0).tolist()]

    def small(form: dispatch.DenseForm) -> Results:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
            with dispatch.use_dense(form):
                return attention(q, k, v, cu.new_tensor(first), cu_seqlens_q_list=first)[:1]

        return _beside(run, lambda q, k, v: _naive_attention(q, k, v, few), [x[:size] for x in inputs])

    used: dict[str, dispatch.DenseForm] = {"ours": "portable", "ours tma": "tma", "ours specialized": "specialized"}
    verify = {name: small(form) for name, form in used.items() if name in named}
    shape = f"{rows}x{length} H{heads}/{kv_heads} D{dim} {'packed' if packed else 'dense'}"
    return _case("attention", shape, named, inputs, _work(flops, 2.5 * flops), "TFLOP/s", verify)  # 2 products, then 5


def _decode(device: torch.device, rows: int, length: int, heads: int, kv_heads: int, dim: int) -> Case:
    q = _random(device, rows, heads, dim)
    cache = [_random(device, rows, length, kv_heads, dim) for _ in range(2)]
    lengths = torch.full((rows,), length, device=device)

    def naive() -> Tensor:
        keys, values = (x.repeat_interleave(heads // kv_heads, 2).transpose(1, 2) for x in cache)
        return torch.nn.functional.scaled_dot_product_attention(q[:, :, None], keys, values)[:, :, 0]

    forms: dict[str, Run] = {"ours": lambda: decode_attention(q, *cache, lengths), "naive": naive}  # type: ignore[call-arg,arg-type]
    moved = 2 * cache[0].numel() * cache[0].element_size()
    return Case(
        "decode_attention", f"{rows} rows x {length} H{heads}/{kv_heads}", forms, _work(moved, 0.0), "GB/s",
        {"ours": lambda: ([decode_attention(q, cache[0], cache[1], lengths)], [naive()])},
    )  # fmt: skip


def _norm(device: torch.device, rows: int, width: int) -> Case:
    inputs = [_random(device, rows, width), _random(device, rows, width), _random(device, width)]

    def ours(x: Tensor, residual: Tensor, weight: Tensor) -> Sequence[Tensor]:
        return add_rms_norm(x, residual, weight, 1e-5)

    def plain(x: Tensor, residual: Tensor, weight: Tensor) -> Sequence[Tensor]:
        total = x + residual
        wide = total.float()
        scale = (wide.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
        return (wide * scale).to(x.dtype) * weight, total

    named = _alternatives(device, ours, plain)
    if (liger := _liger("ops.fused_add_rms_norm", "LigerFusedAddRMSNormFunction", device)) is not None:
        named["Liger"] = lambda x, residual, weight: liger.apply(x, residual, weight, 1e-5)
    moved = 4.0 * rows * width * inputs[0].element_size()  # four tensors in each pass
    return _case(
        "rms_norm", f"{rows} x {width} + residual", named, inputs, _work(moved, moved), "GB/s",
        {"ours": _beside(ours, plain, inputs)},
    )  # fmt: skip


def _logprob(device: torch.device, tokens: int, vocab: int, width: int) -> Case:
    inputs = [_random(device, tokens, width) * width**-0.5, _random(device, vocab, width)]
    targets = torch.randint(0, vocab, (tokens,), device=device)

    def ours(hidden: Tensor, weight: Tensor) -> Sequence[Tensor]:
        return linear_logprob(hidden, weight, targets[: len(hidden)])

    def plain(hidden: Tensor, weight: Tensor) -> Sequence[Tensor]:
        table = torch.log_softmax((hidden @ weight.t()).float(), -1)
        return table.gather(1, targets[: len(hidden), None])[:, 0], -(table.exp() * table).sum(-1)

    named = _alternatives(device, ours, plain)
    named["bare GEMM"] = lambda hidden, weight: [hidden @ weight.t()]
    if (liger := _liger("transformers", "LigerFusedLinearCrossEntropyLoss", device)) is not None:
        named["Liger CE"] = lambda hidden, weight: [liger(reduction="none")(weight, hidden, targets)]
    few = _beside(
        lambda hidden, weight: linear_logprob(hidden, weight, targets[: len(hidden)]),
        plain,
        [inputs[0][:64], inputs[1]],
    )

    gemm = 2.0 * tokens * vocab * width  # of the bare product; its gradients are two more
    return _case(
        "linear_logprob", f"{tokens} x {width} x {vocab}", named, inputs, _work(gemm, 2 * gemm), "TFLOP/s",
        {"ours": few},
    )  # fmt: skip


def _swiglu(device: torch.device, rows: int, width: int) -> Case:
    inputs = [_random(device, rows, 2 * width)]

    def plain(x: Tensor) -> Sequence[Tensor]:
        gate, up = x.chunk(2, -1)
        return [gate * torch.sigmoid(gate) * up]

    def ours(x: Tensor) -> Sequence[Tensor]:
        return [swiglu(x)]

    named = _alternatives(device, ours, plain)
    if (liger := _liger("ops.swiglu", "LigerSiLUMulFunction", device)) is not None:
        named["Liger"] = lambda x: [liger.apply(*x.chunk(2, -1))]
    moved = rows * width * inputs[0].element_size()
    return _case(
        "swiglu", f"{rows} x {width}", named, inputs, _work(3 * moved, 5 * moved), "GB/s",
        {"ours": _beside(ours, plain, inputs)},
    )  # fmt: skip


def _rope(device: torch.device, tokens: int, heads: int, dim: int) -> Case:
    cos, sin = rope_tables(10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim), tokens)
    positions = torch.arange(tokens, device=device)
    inputs = [_random(device, tokens, heads, dim)]

    def plain(x: Tensor) -> Sequence[Tensor]:
        c, s = (torch.cat((table[positions], table[positions]), -1)[:, None] for table in (cos, sin))
        first, second = x.chunk(2, -1)
        return [(x * c + torch.cat((-second, first), -1) * s).to(x.dtype)]

    def ours(x: Tensor) -> Sequence[Tensor]:
        return [rope(x, cos, sin, positions)]

    named = _alternatives(device, ours, plain)
    if (liger := _liger("ops.rope", "LigerRopeFunction", device)) is not None:
        # It turns queries and keys together, in place and without positions: half of the heads are each.
        angles = [torch.cat((table, table), -1)[None].to(inputs[0].dtype) for table in (cos, sin)]
        named["Liger"] = lambda x: liger.apply(*x[None].transpose(1, 2).chunk(2, 1), *angles)
    moved = 2.0 * inputs[0].numel() * inputs[0].element_size()
    return _case(
        "rope", f"{tokens} x {heads} x {dim}", named, inputs, _work(moved, moved), "GB/s",
        {"ours": _beside(ours, plain, inputs)},
    )  # fmt: skip


def _gae(device: torch.device, rows: int, length: int) -> Case:
    rewards, values = (_random(device, rows * length, dtype=torch.float32) for _ in range(2))
    ends = list(range(0, rows * length + 1, length))
    cu = torch.tensor(ends, dtype=torch.int32, device=device)

    def naive(rewards: Tensor, values: Tensor) -> Tensor:
        found = torch.zeros_like(rewards)
        for start in range(0, len(rewards), length):
            carried, after = rewards.new_zeros(()), rewards.new_zeros(())
            for t in reversed(range(start, start + length)):
                carried = rewards[t] + 0.99 * after - values[t] + 0.99 * 0.95 * carried
                after = values[t]
                found[t] = carried
        return found

    def ours(count: int = rows) -> tuple[Tensor, Tensor]:
        given = rewards[: count * length], values[: count * length], cu[: count + 1]
        return gae(*given, gamma=0.99, lam=0.95, cu_seqlens_list=ends[: count + 1])

    def verify() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        first = (x[: 2 * length].cpu() for x in (rewards, values))
        return [ours(2)[0].cpu()], [naive(*first)]

    def in_torch() -> object:
        with dispatch.use("torch"):
            return ours()

    forms: dict[str, Run] = {"ours": ours}
    if device.type == "cuda":
        forms["torch"] = in_torch  # one step a time index over all rows; the loop over tokens would take minutes
    else:
        forms["naive"] = lambda: naive(rewards, values)
    return Case("gae", f"{rows} x {length}", forms, _work(16.0 * rows * length, 0.0), "GB/s", {"ours": verify})


def _value(device: torch.device, tokens: int, width: int) -> Case:
    inputs = [_random(device, tokens, width), _random(device, width) * width**-0.5]
    old, returns = (_random(device, tokens, dtype=torch.float32) for _ in range(2))

    def ours(hidden: Tensor, weight: Tensor) -> Sequence[Tensor]:
        return [value_head_loss(hidden, weight, None, old, returns, clip=0.2).loss]

    def plain(hidden: Tensor, weight: Tensor) -> Sequence[Tensor]:
        values = hidden.float() @ weight.float()
        near = old + (values - old).clamp(-0.2, 0.2)
        return [0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)]

    named = _alternatives(device, ours, plain)
    moved = tokens * width * inputs[0].element_size()
    return _case(
        "value_head", f"{tokens} x {width}", named, inputs, _work(moved, 2 * moved), "GB/s",
        {"ours": _beside(ours, plain, inputs)},
    )  # fmt: skip


def _reward(device: torch.device, rows: int, length: int, width: int) -> list[Case]:
    inputs = [_random(device, rows * length, width), _random(device, width), _random(device, width)]
    last = torch.arange(length - 1, rows * length, length, device=device)
    groups, ranks = torch.arange(rows, device=device) // 4, torch.arange(rows, device=device) % 4
    scores = _random(device, rows, dtype=torch.float32)

    def ours(hidden: Tensor, weight: Tensor, norm: Tensor) -> Sequence[Tensor]:
        return [reward_head(hidden, last, weight, norm_weight_D=norm)]

    def plain(hidden: Tensor, weight: Tensor, norm: Tensor) -> Sequence[Tensor]:
        wide = hidden.float()
        whole = wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.float()
        return [(whole @ weight.float())[last]]

    read = float(rows * width * inputs[0].element_size())  # the last tokens; the gradient is of all tokens
    head = _case(
        "reward_head", f"{rows} x {length} x {width}", _alternatives(device, ours, plain), inputs,
        _work(read, read + read * length), "GB/s", {"ours": _beside(ours, plain, inputs)},
    )  # fmt: skip

    def ranked(scores: Tensor) -> Sequence[Tensor]:
        return [ranking_loss(scores, groups, ranks).loss.sum()]

    def pairs(scores: Tensor) -> Sequence[Tensor]:
        gaps = scores.view(-1, 4, 1) - scores.view(-1, 1, 4)
        losses = torch.nn.functional.softplus(-gaps).triu(1)  # ranks rise within a group
        return [losses.sum((1, 2)).div(6).sum()]

    ranking = _case(
        "ranking_loss", f"{rows} rows of 4", _alternatives(device, ranked, pairs), [scores],
        _work(40.0 * rows, 28.0 * rows), "GB/s", {"ours": _beside(ranked, pairs, [scores])},
    )  # fmt: skip
    return [head, ranking]
