"""What each Triton kernel is held to.  A proof runs the public op with Triton forced and raises AssertionError.

The rule (FlashAttention's): the kernel's error against fp64 is at most twice that of plain torch in the same dtype;
in fp32 the relative L2 error is at most 1e-6.  The same proofs run in the interpreter, on a GPU, and against planted
bugs (mutations.py).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from unittest.mock import patch

import torch
from torch import Tensor

from kernels import arguments, dispatch
from kernels.attention import attention, decode_attention
from kernels.gae import gae
from kernels.linear_logprob import linear_logprob, linear_logprob_partials
from kernels.reward_head import ranking_loss, reward_head
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope, rope_tables
from kernels.swiglu import swiglu
from kernels.value_head import value_head, value_head_loss
from tests.kernels.cases import ends, naive_attention, normal, relative_error

DEVICE = torch.device("cpu" if dispatch.interpreting() or not torch.cuda.is_available() else "cuda")
DTYPES = (torch.float32, torch.bfloat16)
FLOOR = {torch.float32: 3e-7, torch.bfloat16: 2e-3, torch.float16: 3e-4}  # half a rounding: torch may be exact by luck

Proof = Callable[[], None]


def judge(found: Tensor, same_dtype: Tensor, truth: Tensor, dtype: torch.dtype, what: str, scale: float) -> None:
    """The rule of the module's docstring; infinities must be at the same places.

    ``scale``: the norm to compare with where the truth is exactly 0.
    """
    found, same_dtype, truth = found.detach().cpu(), same_dtype.detach().cpu(), truth.detach().cpu()
    assert found.shape == truth.shape, f"{what}: shape {found.shape}, not {truth.shape}"
    infinite = torch.isinf(truth)
    assert torch.equal(torch.isinf(found), infinite), f"{what}: infinities elsewhere"
    found, same_dtype, truth = (x.double().masked_fill(infinite, 0.0) for x in (found, same_dtype, truth))
    assert not torch.isnan(found).any(), f"{what}: NaN"
    if truth.norm() < 1e-9 * scale:
        error, torch_error = (x.norm().item() / scale for x in (found, same_dtype))
    else:
        error, torch_error = relative_error(found, truth), relative_error(same_dtype, truth)
    doubled = 2 * torch_error
    allowed = doubled + FLOOR[dtype] if dtype == torch.float32 else max(doubled, FLOOR[dtype])
    assert error <= allowed, f"{what}: error {error:.2e}, torch {torch_error:.2e}"
    if dtype == torch.float32:
        assert error <= 1e-6, f"{what}: error {error:.2e} in fp32"


Function = Callable[..., Sequence[Tensor]]


def compare(op: Function, plain: Function, inputs: Sequence[Tensor], dtype: torch.dtype, grads: int = -1) -> None:
    """Outputs and gradients of ``op`` (Triton) against ``plain`` in this dtype and in fp64.

    ``inputs`` are fp64; the first ``grads`` of them (-1: all) are differentiated, along fixed random directions.
    """
    grads = len(inputs) if grads < 0 else grads

    def run(function: Function, kind: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        # Every run starts from the rounded numbers: the error is the operation's, not the input's.
        given = [x.to(dtype).to(kind).to(device) for x in inputs]
        leaves = [x.requires_grad_() for x in given[:grads]]
        outputs = list(function(*leaves, *given[grads:]))
        smooth = [out for out in outputs if out.requires_grad]
        if not leaves or not smooth:
            return outputs, []
        directions = [normal(*out.shape, seed=90 + i).to(dtype).to(out) for i, out in enumerate(smooth)]
        return outputs, list(torch.autograd.grad(smooth, leaves, directions))

    with dispatch.use("triton"):
        found = run(op, dtype, DEVICE)
    same = run(plain, dtype, torch.device("cpu"))
    truth = run(plain, torch.float64, torch.device("cpu"))
    for what, have, torch_has, true in zip(("output", "gradient"), found, same, truth, strict=True):
        scale = max([x.double().nan_to_num(posinf=0.0, neginf=0.0).norm().item() for x in true], default=0.0)
        for index, triple in enumerate(zip(have, torch_has, true, strict=True)):
            judge(*triple, dtype, f"{what} {index}", max(scale, 1e-30))


def prove_layouts(op: Function, *inputs: Tensor) -> None:
    """Memory layout changes no bit: strided inputs of every kind, and gradients that arrive strided or expanded."""
    leaves = [x.to(DEVICE).float().requires_grad_() if x.is_floating_point() else x.to(DEVICE) for x in inputs]
    wanted = [x for x in leaves if x.requires_grad]

    def run(given: Sequence[Tensor], lay: Callable[[Tensor], Tensor]) -> list[Tensor]:
        outputs = list(op(*given))
        smooth = [x for x in outputs if x.requires_grad]
        directions = [lay(normal(*x.shape, seed=90 + i).to(x)) for i, x in enumerate(smooth)]
        grads = torch.autograd.grad(smooth, wanted, directions, allow_unused=True) if smooth else ()
        return [*outputs, *(x for x in grads if x is not None)]

    with dispatch.use("triton"):
        dense, spaced = run(leaves, torch.Tensor.contiguous), run([_spaced(x) for x in leaves], _spaced)
        repeated = run(leaves, lambda x: x[:1].expand(x.shape).contiguous())
        expanded = run(leaves, lambda x: x[:1].expand(x.shape))
    for what, expected, found in (("strided", dense, spaced), ("expanded", repeated, expanded)):
        for index, (one, other) in enumerate(zip(expected, found, strict=True)):
            assert torch.equal(one, other), f"{what}: number {index} of outputs and gradients differs"


def _spaced(x: Tensor) -> Tensor:
    """The same numbers with a last stride of 2, and between them what nobody may read."""
    between = torch.full_like(x, torch.nan) if x.is_floating_point() else ~x
    return torch.stack((x, between), -1)[..., 0]


def prove_small_difference(op: Function, plain: Function, rows: int, width: int) -> None:
    """A weight gradient that is what remains of large partial sums: lost where those are rounded to bf16.

    ``op`` and ``plain`` take hidden states [2 rows, width] and a weight [width]; each row has one that is almost it.
    """
    hidden = normal(rows, width)
    near = hidden + normal(rows, width, seed=1, scale=0.02)

    def apart(function: Function) -> Function:
        def difference(x: Tensor, weight: Tensor) -> Sequence[Tensor]:
            (y,) = function(x, weight)
            return [y[:rows] - y[rows:]]

        return difference

    inputs = (torch.cat((hidden, near)), normal(width, seed=2))
    compare(apart(op), apart(plain), inputs, torch.bfloat16)


# --- attention ------------------------------------------------------------------------------------------------------


def prove_attention(
    lengths: Sequence[int],
    dtype: torch.dtype,
    *,
    heads: int = 2,
    kv_heads: int = 1,
    dim: int = 64,
    causal: bool = True,
    window: int | None = None,
    lengths_k: Sequence[int] | None = None,
    scale: float | None = None,
    size: float = 1.0,
    shards: int = 0,
    slots_at_once: int = 256,
    wide: bool = False,
    ends_known: bool = True,
) -> None:
    """Forward, lse and three gradients; ``shards``: context-parallel pieces, of which the first and last are here.

    ``slots_at_once``: of which the dK/dV kernel counts so many in a step.  ``wide``: with the offsets of tensors of
    more than 2^31 numbers.  ``ends_known``: to the host; while a graph is captured they are not, and programs idle.
    """
    cu_k = ends(list(lengths_k or lengths))
    cu_q, slots = ends(list(lengths)), None
    if shards:
        pieces = [
            torch.arange(a, b).view(shards, -1) for a, b in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True)
        ]
        slots = torch.cat([piece for blocks in pieces for piece in (blocks[0], blocks[-1])])
        cu_q = cu_q * 2 // shards
    q = normal(int(cu_q[-1]), heads, dim, scale=size)
    k, v = normal(int(cu_k[-1]), kv_heads, dim, seed=1), normal(int(cu_k[-1]), kv_heads, dim, seed=2)

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        device = None if slots is None else slots.to(DEVICE)
        return attention(
            q, k, v, cu_q.to(DEVICE), cu_k.to(DEVICE), causal=causal, window=window, softmax_scale=scale, q_slots=device
        )

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        out, lse = naive_attention(q, k, v, cu_q, cu_k, causal=causal, window=window, scale=scale, q_slots=slots)
        return out, lse.detach()

    form = dispatch.triton_form("attention")
    with (
        patch.object(form, "WIDE_FROM", 0 if wide else form.WIDE_FROM),
        patch.object(form, "SLOT_CHUNK", slots_at_once),
        nullcontext() if ends_known else unread(),
    ):
        compare(kernel, plain, (q, k, v), dtype)


def unread() -> AbstractContextManager[object]:
    """The host reads no device tensor inside, as in the capture of a graph."""
    return patch.object(arguments, "_readable", lambda tensor: False)


def prove_attention_strides(dtype: torch.dtype, *, apart: bool = False) -> None:
    """q, k and v as slices of one fused projection; ``apart``: as a model has them after the rotary embedding.

    Then k is a tensor of its own and v a slice: their strides differ.  q's last stride is not 1, and cu_seqlens is a
    column of a table.
    """
    cu, inputs = ends((33, 20)), (normal(53, 4, 64), normal(53, 1, 64, seed=1))

    def split(x: Tensor, *own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not own:
            return x[:, :2], x[:, 2:3], x[:, 3:]
        return x[:, :2].transpose(1, 2).contiguous().transpose(1, 2), own[0], x[:, 3:]

    def kernel(*given: Tensor) -> Sequence[Tensor]:
        column = torch.stack((cu, cu), 1).to(DEVICE)[:, 0] if apart else cu.to(DEVICE)
        return attention(*split(*given), column)[:1]

    def plain(*given: Tensor) -> Sequence[Tensor]:
        return naive_attention(*split(*given), cu, cu, causal=True)[:1]

    compare(kernel, plain, inputs if apart else inputs[:1], dtype)


def prove_dense(
    form: dispatch.DenseForm, rows: int, num_q: int, num_k: int, dtype: torch.dtype, *, causal: bool = True,
    dim: int = 64, fused: bool = False, gap: int = 0, falls_back: bool = False,
) -> None:  # fmt: skip
    """A form for dense batches; ``fused``: q, k and v are slices of one tensor; ``falls_back``: to the portable one.

    ``gap``: unused channels between two heads.
    """
    cu_q, cu_k = ends([num_q] * rows), ends([num_k] * rows)
    launched: list[str] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        if fused:
            joined = torch.cat((q, k, v), 1)
            q, k, v = joined[:, : q.shape[1]], joined[:, q.shape[1] : -v.shape[1]], joined[:, -v.shape[1] :]
        if gap:
            q, k, v = (torch.nn.functional.pad(x, (0, gap))[..., :dim] for x in (q, k, v))
        with dispatch.use_dense(form), dispatch.record_launches() as launches:
            found = attention(q, k, v, cu_q.to(DEVICE), cu_k.to(DEVICE), causal=causal, cu_seqlens_q_list=cu_q.tolist(),
                              cu_seqlens_k_list=cu_k.tolist())  # fmt: skip
            launched.extend(launches)
        return found

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        out, lse = naive_attention(q, k, v, cu_q, cu_k, causal=causal)
        return out, lse.detach()

    inputs = (normal(rows * num_q, 4, dim), normal(rows * num_k, 2, dim, seed=1), normal(rows * num_k, 2, dim, seed=2))
    compare(kernel, plain, inputs, dtype)
    major = 9 if DEVICE.type == "cpu" else torch.cuda.get_device_capability()[0]
    specializes = importlib.import_module("kernels.attention.dense").SPECIALIZES
    known = importlib.import_module("triton").__version__.startswith(specializes)
    takes = not falls_back and (major >= 9 if form == "tma" else major == 9 and known)
    kernel_of = {"tma": "attention_forward_dense", "specialized": "attention_forward_specialized"}
    assert launched == [kernel_of[form] if takes else "attention_forward"]


def prove_decode(
    lengths: Sequence[int], dtype: torch.dtype, *, heads: int = 4, kv_heads: int = 2, dim: int = 64,
    window: int | None = None, apart: bool = False, capacity: int = 70,
) -> None:  # fmt: skip
    """Rows of several lengths, one of them empty, against naive attention of each row.

    ``apart``: the values' cache is a slice, so its strides are not the keys'.  A length above ``capacity``, which only
    an unread tensor can hold, means the whole cache and nothing of the next row's.
    """
    rows = len(lengths)
    inputs = (
        normal(rows, heads, dim),
        normal(rows, capacity, kv_heads, dim, seed=1),
        normal(rows, capacity, kv_heads, dim, seed=2),
    )

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        if apart:
            v = torch.nn.functional.pad(v, (0, 0, 1, 1, 3, 2))[:, 3:-2, 1:-1]
        with unread() if max(lengths) > capacity else nullcontext():
            return [decode_attention(q, k, v, torch.tensor(lengths, device=DEVICE), window=window)]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        outputs = []
        for row, length in enumerate(min(length, capacity) for length in lengths):
            cu = (ends((1,)), ends((length,)))
            keys, values = k[row, :length], v[row, :length]
            outputs.append(naive_attention(q[row : row + 1], keys, values, *cu, causal=True, window=window)[0])
        return [torch.cat(outputs)]

    compare(kernel, plain, inputs, dtype, grads=0)


def prove_precise_attention_sum() -> None:
    """Many equal scores: a sum or product kept in bf16 stops growing, one in fp32 does not."""
    length = 300
    q, k = torch.zeros(length, 1, 64, dtype=torch.float64), torch.zeros(length, 1, 64, dtype=torch.float64)
    v = normal(length, 1, 64, scale=0.01) + 1.0
    compare(
        lambda q, k, v: attention(q, k, v, ends((length,)).to(DEVICE), causal=False),
        lambda q, k, v: naive_attention(q, k, v, ends((length,)), ends((length,)), causal=False),
        (q, k, v),
        torch.bfloat16,
        grads=0,
    )


def prove_precise_scores() -> None:
    """Scores up to about 50: rounded to bf16 before the softmax they would move a weight by a tenth."""
    cu = ends((37,))

    def plain(*given: Tensor) -> Sequence[Tensor]:
        wide = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in given)
        return [naive_attention(*wide, cu, cu, causal=True)[0].to(given[0].dtype)]

    inputs = (normal(37, 1, 64, scale=16.0), normal(37, 1, 64, seed=1), normal(37, 1, 64, seed=2))
    compare(lambda *given: attention(*given, cu.to(DEVICE))[:1], plain, inputs, torch.bfloat16, grads=0)


# --- rows -----------------------------------------------------------------------------------------------------------


def naive_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula; fp32 inside, as the fused torch op."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)).to(x.dtype)


def prove_norm(rows: int, width: int, dtype: torch.dtype, *, strided: bool = False, size: float = 1.0) -> None:
    """rms_norm, forward and both gradients."""
    x, weight = normal(rows, 2 * width if strided else width, scale=size), normal(width, seed=1)

    def cut(x: Tensor) -> Tensor:
        return x[:, width:] if strided else x

    compare(lambda x, w: [rms_norm(cut(x), w, 1e-3)], lambda x, w: [naive_norm(cut(x), w, 1e-3)], (x, weight), dtype)


def prove_add_norm(rows: int, width: int, dtype: torch.dtype, *, strided: bool = False) -> None:
    """add_rms_norm: both outputs, all three gradients; ``strided``: the residual is a slice."""

    def plain(x: Tensor, residual: Tensor, weight: Tensor) -> Sequence[Tensor]:
        return naive_norm(x + residual, weight, 1e-5), x + residual

    def kernel(x: Tensor, residual: Tensor, weight: Tensor) -> Sequence[Tensor]:
        if strided:
            residual = torch.nn.functional.pad(residual, (7, 3))[:, 7:-3]
        return add_rms_norm(x, residual, weight, 1e-5)

    inputs = (normal(rows, width), normal(rows, width, seed=1), normal(width, seed=2))
    compare(kernel, plain, inputs, dtype)


def prove_swiglu(rows: int, width: int, dtype: torch.dtype, *, strided: bool = False, size: float = 1.0) -> None:
    """swiglu, forward and backward."""

    def plain(x: Tensor) -> Sequence[Tensor]:
        gate, up = x[:, : 2 * width].chunk(2, -1)
        return [gate * torch.sigmoid(gate) * up]

    wide = normal(rows, 2 * width + (6 if strided else 0), scale=size)
    compare(lambda x: [swiglu(x[:, : 2 * width])], plain, (wide,), dtype)


def prove_rope(tokens: int, heads: int, dim: int, dtype: torch.dtype, *, strided: bool = False) -> None:
    """rope, forward and backward, at packed positions, and in place."""
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    cos, sin = rope_tables(frequencies, 300)
    positions = (torch.arange(tokens) * 41) % 300
    x = normal(tokens, heads, 2 * dim if strided else dim)

    def cut(x: Tensor) -> Tensor:
        return x[:, :, dim:] if strided else x

    def plain(x: Tensor) -> Sequence[Tensor]:
        first, second = cut(x).chunk(2, -1)
        c, s = (table.to(torch.promote_types(x.dtype, torch.float32))[positions][:, None] for table in (cos, sin))
        return [torch.cat((first * c - second * s, second * c + first * s), -1).to(x.dtype)]

    def kernel(x: Tensor) -> Sequence[Tensor]:
        return [rope(cut(x), cos.to(DEVICE), sin.to(DEVICE), positions.to(DEVICE))]

    compare(kernel, plain, (x,), dtype)
    given = cut(x.to(dtype).to(DEVICE))
    with dispatch.use("triton"), torch.no_grad():
        expected = rope(given, cos.to(DEVICE), sin.to(DEVICE), positions.to(DEVICE))
        rope(given, cos.to(DEVICE), sin.to(DEVICE), positions.to(DEVICE), in_place=True)
    assert torch.equal(given, expected), "in place differs"


# --- heads ----------------------------------------------------------------------------------------------------------


def prove_logprob(
    tokens: int, vocab: int, width: int, dtype: torch.dtype, *, temperature: float = 1.0, valid: int | None = None,
    masked: str = "none", size: float = 1.0, entropy: bool = True, strided: bool = False, programs: int = 1056,
    chunk: int = 8192, whole: bool = False,
) -> None:  # fmt: skip
    """Log-probability, entropy and the gradients of both for hidden and weight; and their bounds.

    ``programs``: how many the forward pass aims at; few, and each walks over several blocks of the vocabulary.
    ``chunk``: rows of the vocabulary whose gradients exist at a time.  ``strided``: hidden and weight are slices.
    ``whole``: all numbers are whole, so the logits are exact and the error is the softmax's own; the forward pass only
    (a gradient carries the rounding of lse: 4e-6 of it at 100, in any form that keeps lse in fp32).
    """
    rows = vocab if valid is None else valid
    targets = torch.arange(tokens) * 13 % rows
    mask = {"none": None, "some": torch.arange(tokens) % 3 != 1, "all": torch.zeros(tokens, dtype=torch.bool)}[masked]
    hidden = normal(tokens, width * (2 if strided else 1), scale=size / math.sqrt(width))
    weight = normal(vocab, width + (5 if strided else 0), seed=1)
    if whole:
        hidden, weight = hidden.round(), weight.round()
    form = dispatch.triton_form("linear_logprob")

    def kernel(hidden: Tensor, weight: Tensor) -> Sequence[Tensor]:
        device_mask = None if mask is None else mask.to(DEVICE)
        weight = weight[:, :width]
        with patch.object(form, "PROGRAMS", programs):
            found = linear_logprob(
                hidden[:, :width], weight, targets.to(DEVICE), temperature=temperature, valid_rows=valid,
                mask_T=device_mask, entropy=entropy,
            )  # fmt: skip
        logprob, spread = (x.detach() for x in found)
        assert (logprob <= 0).all(), "a log-probability above 0"
        assert (spread >= 0).all(), "a negative entropy"
        assert (spread <= math.log(rows) * (1 + 1e-6)).all(), "an entropy above log V"
        return found if entropy else found[:1]

    def plain(hidden: Tensor, weight: Tensor) -> Sequence[Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logits = (hidden[:, :width] @ weight[:rows, :width].t()).to(wide) / temperature
        table = torch.log_softmax(logits, -1)
        found = [table.gather(1, targets[:, None]).squeeze(1), -(table.exp() * table).sum(-1)]
        if mask is not None:
            found = [torch.where(mask, x, 0.0) for x in found]
        return found if entropy else found[:1]

    with patch.object(form, "CHUNK_ROWS", chunk):  # the backward pass reads it, after kernel() has returned
        compare(kernel, plain, (hidden, weight), dtype, grads=0 if whole else -1)


def prove_logprob_shard(dtype: torch.dtype) -> None:
    """A shard in the middle of the vocabulary: all three partials and their gradients."""
    start, rows, tokens = 40, 50, 9
    targets = torch.tensor([0, 39, 40, 41, 89, 90, 64, 77, 88])

    def kernel(hidden: Tensor, weight: Tensor) -> Sequence[Tensor]:
        return linear_logprob_partials(hidden, weight, targets.to(DEVICE), vocab_start=start, temperature=1.5)

    def plain(hidden: Tensor, weight: Tensor) -> Sequence[Tensor]:
        logits = (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32)) / 1.5
        here = (targets >= start) & (targets < start + rows)
        picked = logits.gather(1, (targets - start).clamp(0, rows - 1)[:, None]).squeeze(1)
        table = logits.log_softmax(-1)
        return logits.logsumexp(-1), torch.where(here, picked, 0.0), -(table.exp() * table).sum(-1)

    compare(kernel, plain, (normal(tokens, 48, scale=0.15), normal(rows, 48, seed=1)), dtype)


def prove_reward(
    rows: int, width: int, dtype: torch.dtype, *, norm: bool = True, bias: bool = True, strided: bool = False
) -> None:
    """Scores and all their gradients; one row is on another rank; ``strided``: the hidden states are a slice."""
    tokens = 3 * rows + 2
    last = torch.tensor([-1 if row == 1 else 3 * row + row % 2 for row in range(rows)])
    inputs = [normal(tokens, width + (9 if strided else 0)), normal(width, seed=1)]
    inputs += [normal(1, seed=2)] if bias else []
    inputs += [normal(width, seed=3)] if norm else []

    def split(rest: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        return rest[0] if bias else None, rest[-1] if norm else None

    def kernel(hidden: Tensor, weight: Tensor, *rest: Tensor) -> Sequence[Tensor]:
        shift, scale = split(rest)
        return [reward_head(hidden[:, :width], last.to(DEVICE), weight, shift, norm_weight_D=scale, eps=1e-3)]

    def plain(hidden: Tensor, weight: Tensor, *rest: Tensor) -> Sequence[Tensor]:
        shift, scale = split(rest)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        picked = hidden[last.clamp(min=0), :width].to(wide)
        if scale is not None:
            picked = naive_norm(picked, scale.to(wide), 1e-3)
        found = picked @ weight.to(wide)
        if shift is not None:
            found = found + shift.to(wide)
        return [torch.where(last >= 0, found, 0.0)]

    compare(kernel, plain, inputs, dtype)


def prove_ranking(
    sizes: Sequence[int], dtype: torch.dtype, *, margin: float, centering: float, mean: bool, apart: float = 0.0
) -> None:
    """Loss, counts and gradient over ragged groups with ties, whose rows are not neighbours.

    ``apart``: how much better each rank scores than the next, so that all losses are small.
    """
    groups = torch.cat([torch.full((size,), index << 33) for index, size in enumerate(sizes)])
    ranks = torch.cat([torch.arange(size) * 2 // 3 for size in sizes])
    order = torch.randperm(groups.shape[0], generator=torch.Generator().manual_seed(5))
    groups, ranks = groups[order], ranks[order]

    def kernel(scores: Tensor) -> Sequence[Tensor]:
        return ranking_loss(
            scores, groups.to(DEVICE), ranks.to(DEVICE), margin=margin, centering=centering, mean_of_pairs=mean
        )

    def plain(scores: Tensor) -> Sequence[Tensor]:
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        loss, pairs, correct = [], [], []
        for i in range(len(groups)):
            mates = [j for j in range(len(groups)) if groups[j] == groups[i]]
            worse = [j for j in mates if ranks[j] > ranks[i]]
            total = sum(1 for a in mates for b in mates if ranks[a] < ranks[b])
            terms = [
                torch.nn.functional.softplus(margin * (ranks[j] - ranks[i]).to(wide.dtype) - wide[i] + wide[j])
                for j in worse
            ]
            own = torch.stack(terms).sum() / (max(total, 1) if mean else 1) if terms else wide[i] * 0.0
            loss.append(own + centering * wide[mates].mean().square() / len(mates))
            pairs.append(len(worse))
            correct.append(sum(1 for j in worse if scores[i] > scores[j]))
        return torch.stack(loss), torch.tensor(pairs), torch.tensor(correct)

    scores = normal(groups.shape[0], scale=0.1 if apart else 2.0) - apart * ranks
    compare(kernel, plain, (scores,), dtype)


def naive_values(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden @ weight, in fp32 at least."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.to(wide) @ weight.to(wide)


def prove_value(tokens: int, width: int, dtype: torch.dtype, *, bias: bool = True, strided: bool = False) -> None:
    """The value head alone."""
    inputs = [normal(tokens, width * (2 if strided else 1)), normal(width, seed=1)] + (
        [normal(1, seed=2)] if bias else []
    )

    def plain(hidden: Tensor, weight: Tensor, *rest: Tensor) -> Sequence[Tensor]:
        found = naive_values(hidden[:, :width], weight)
        return [found + rest[0].to(found.dtype) if rest else found]

    compare(lambda h, w, *rest: [value_head(h[:, :width], w, *rest)], plain, inputs, dtype)


def prove_value_loss(tokens: int, width: int, dtype: torch.dtype, *, clip: float | None, masked: bool) -> None:
    """The value head fused with its loss."""
    mask = torch.arange(tokens) % 4 != 1 if masked else None
    hidden = normal(tokens, width, scale=1 / math.sqrt(width))
    weight, bias = normal(width, seed=1), normal(1, seed=2)
    old = hidden.to(dtype).double() @ weight.to(dtype).double() + bias.to(dtype).double()
    old = old + normal(tokens, seed=3, scale=0.5)
    inputs = (hidden, weight, bias, old, normal(tokens, seed=4))

    def kernel(h: Tensor, w: Tensor, b: Tensor, old: Tensor, returns: Tensor) -> Sequence[Tensor]:
        given = None if mask is None else mask.to(DEVICE)
        return value_head_loss(h, w, b, old, returns, clip=clip, mask_T=given)

    def plain(h: Tensor, w: Tensor, b: Tensor, old: Tensor, returns: Tensor) -> Sequence[Tensor]:
        wide = torch.promote_types(h.dtype, torch.float32)
        h, w, b, old, returns = (x.to(wide) for x in (h, w, b, old, returns))
        values = h @ w + b
        loss, clipped = (values - returns) ** 2, torch.zeros(tokens, dtype=torch.bool)
        if clip is not None:
            other = (torch.minimum(torch.maximum(values, old - clip), old + clip) - returns) ** 2
            clipped, loss = other > loss, torch.maximum(loss, other)
        if mask is not None:
            clipped, loss = clipped & mask, torch.where(mask, loss, 0.0)
        return values.detach(), 0.5 * loss, clipped

    compare(kernel, plain, inputs, dtype, grads=3)


def prove_gae(lengths: Sequence[int], dtype: torch.dtype, *, bootstrap: bool, gamma: float, lam: float) -> None:
    """Advantages and returns against the recursion."""
    cu = ends(list(lengths))
    total = int(cu[-1])
    inputs = [normal(total), normal(total, seed=1)] + ([normal(len(lengths), seed=2)] if bootstrap else [])

    def kernel(rewards: Tensor, values: Tensor, *rest: Tensor) -> Sequence[Tensor]:
        return gae(rewards, values, cu.to(DEVICE), gamma=gamma, lam=lam, bootstrap_R=rest[0] if rest else None)

    def plain(rewards: Tensor, values: Tensor, *rest: Tensor) -> Sequence[Tensor]:
        wide = torch.promote_types(rewards.dtype, torch.float32)
        rewards, values = rewards.to(wide), values.to(wide)
        advantages = torch.zeros(total, dtype=wide)
        for row in range(len(lengths)):
            carried = torch.zeros((), dtype=wide)
            after = rest[0][row].to(wide) if rest else carried
            for t in reversed(range(int(cu[row]), int(cu[row + 1]))):
                carried = rewards[t] + gamma * after - values[t] + gamma * lam * carried
                after = values[t]
                advantages[t] = carried
        return advantages, advantages + values

    compare(kernel, plain, inputs, dtype, grads=0)
