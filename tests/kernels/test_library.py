"""torch.library: schemas, FakeTensor, autograd registration and torch.compile, on the CPU path."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.attention import attention, decode_attention
from kernels.gae import gae
from kernels.linear_logprob import linear_cross_entropy, linear_logprob
from kernels.reward_head import ranking_loss, reward_head
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope, rope_tables
from kernels.swiglu import swiglu
from kernels.value_head import value_head, value_head_loss
from tests.kernels.cases import ends, normal

OPS = torch.ops.zj
CU = ends((3, 4))


def _leaf(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, dtype=torch.float32, seed=seed).requires_grad_()


def _tables() -> tuple[Tensor, Tensor, Tensor]:
    cos, sin = rope_tables(10.0 ** -torch.arange(4, dtype=torch.float64), 8)
    return cos, sin, torch.tensor([0, 1, 2, 0, 1, 2, 3])


TARGETS, LAST = torch.tensor([0, 3, 2, 1, 4, 5, 6]), torch.tensor([2, -1, 6])
GROUPS, RANKS = torch.tensor([1, 1, 1, 2, 2, 2, 2]), torch.tensor([0, 1, 1, 2, 0, 1, 3])
CALLS: dict[str, tuple[object, tuple[object, ...]]] = {
    "attention": (
        OPS.attention.default,
        (
            _leaf(7, 4, 8), _leaf(7, 2, 8, seed=1), _leaf(7, 2, 8, seed=2), CU, CU, None, None, None, 0.3, True, 0,
            "torch",
        ),
    ),
    "attention, equal rows": (
        OPS.attention.default,
        (
            _leaf(6, 4, 8), _leaf(6, 2, 8, seed=1), _leaf(6, 2, 8, seed=2), ends((3, 3)), ends((3, 3)), None, None,
            None, 0.3, True, 0, "torch",
        ),
    ),
    "decode_attention": (
        OPS.decode_attention.default,
        (
            normal(2, 4, 8, dtype=torch.float32), normal(2, 5, 2, 8, dtype=torch.float32),
            normal(2, 5, 2, 8, dtype=torch.float32), torch.tensor([3, 5]), 0.3, 0, "torch",
        ),
    ),
    "rms_norm": (OPS.rms_norm.default, (_leaf(7, 8), _leaf(8, seed=1), 1e-5, "torch")),
    "add_rms_norm": (OPS.add_rms_norm.default, (_leaf(7, 8), _leaf(7, 8, seed=1), _leaf(8, seed=2), 1e-5, "torch")),
    "rope": (OPS.rope.default, (_leaf(7, 2, 8), *_tables(), 1.0, "torch")),
    "swiglu": (OPS.swiglu.default, (_leaf(7, 8), "torch")),
    "linear_logprob": (
        OPS.linear_logprob.default, (_leaf(7, 8), _leaf(9, 8, seed=1), TARGETS, None, 0, 9, 0.7, True, "torch"),
    ),
    "reward_head": (
        OPS.reward_head.default,
        (_leaf(7, 8), LAST, _leaf(8, seed=1), _leaf(1, seed=2), _leaf(8, seed=3), 1e-5, "torch"),
    ),
    "ranking": (OPS.ranking.default, (_leaf(7), GROUPS, RANKS, 0.2, 0.1, True, "torch")),
    "value_head": (
        OPS.value_head.default,
        (
            _leaf(7, 8), _leaf(8, seed=1), _leaf(1, seed=2), normal(7, dtype=torch.float32, seed=3),
            normal(7, dtype=torch.float32, seed=4), None, 0.2, "torch",
        ),
    ),
    "gae": (
        OPS.gae.default,
        (normal(7, dtype=torch.float32), normal(7, dtype=torch.float32, seed=1), CU, None, None, 0.9, 0.9, "torch"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CALLS))
def test_opcheck_accepts_schema_fake_and_autograd(name: str) -> None:
    op, args = CALLS[name]
    torch.library.opcheck(op, args)


def test_registered_ops_and_the_eager_forms_give_the_same_numbers() -> None:
    q, k, v = _leaf(7, 4, 8), _leaf(7, 2, 8, seed=1), _leaf(7, 2, 8, seed=2)
    x, y, weight, vocabulary = _leaf(7, 8), _leaf(7, 8, seed=1), _leaf(8, seed=2), _leaf(9, 8, seed=1)
    both = {
        "attention": (OPS.attention(q, k, v, CU, CU, None, None, None, 0.3, True, 0, "torch")[0],
                      attention(q, k, v, CU, softmax_scale=0.3)[0], (q, k, v)),
        "rms_norm": (OPS.rms_norm(x, weight, 1e-5, "torch")[0], rms_norm(x, weight, 1e-5), (x, weight)),
        "add_rms_norm": (sum(OPS.add_rms_norm(x, y, weight, 1e-5, "torch")[:2]),
                         sum(add_rms_norm(x, y, weight, 1e-5)), (x, y, weight)),
        "swiglu": (OPS.swiglu(x, "torch"), swiglu(x), (x,)),
        "linear_logprob": (OPS.linear_logprob(x, vocabulary, TARGETS, None, 0, 9, 0.7, True, "torch")[2],
                           linear_logprob(x, vocabulary, TARGETS, temperature=0.7)[1], (x, vocabulary)),
    }  # fmt: skip
    for registered, eager, inputs in both.values():
        torch.testing.assert_close(eager, registered, rtol=1e-6, atol=1e-6)
        slope = normal(*eager.shape, dtype=torch.float32, seed=3)
        grads = [torch.autograd.grad(way, inputs, slope) for way in (eager, registered)]
        for have, want in zip(*grads, strict=True):
            torch.testing.assert_close(have, want, rtol=1e-6, atol=1e-6)


AUTOCAST: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    "attention": lambda x, w: attention(x.view(7, 2, 4), x.view(7, 2, 4), x.view(7, 2, 4), CU)[:1],
    "attention, windowed": lambda x, w: attention(x.view(7, 2, 4), x.view(7, 2, 4), x.view(7, 2, 4), CU, window=2)[:1],
    "rms_norm": lambda x, w: (rms_norm(x, w, 1e-5),),
    "add_rms_norm": lambda x, w: add_rms_norm(x, x * 2.0, w, 1e-5),
    "rope": lambda x, w: (rope(x.view(7, 1, 8), *_tables()),),
    "swiglu": lambda x, w: (swiglu(x * w),),
    "linear_logprob": lambda x, w: linear_logprob(x, x * w, TARGETS),
    "linear_cross_entropy": lambda x, w: (linear_cross_entropy(x, x * w, TARGETS),),
    "reward_head": lambda x, w: (reward_head(x, LAST, w, norm_weight_D=w),),
    "ranking_loss": lambda x, w: (ranking_loss(x[:, 0], GROUPS, RANKS).loss,),
    "value_head": lambda x, w: (value_head(x, w),),
    "value_head_loss": lambda x, w: (value_head_loss(x, w, None, x.detach()[:, 0], x.detach()[:, 1], clip=0.2).loss,),
}


@pytest.mark.parametrize("name", sorted(AUTOCAST))
def test_an_op_inside_autocast_computes_as_outside(name: str) -> None:
    inputs = _leaf(7, 8), _leaf(8, seed=1)

    def results() -> list[Tensor]:
        outputs = AUTOCAST[name](*inputs)
        loss = _once(*(out * 0.3 for out in outputs))
        return [*outputs, *(x for x in torch.autograd.grad(loss, inputs, allow_unused=True) if x is not None)]

    want = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results()
    for have, truth in zip(found, want, strict=True):
        torch.testing.assert_close(have, truth, rtol=0, atol=0)


def test_decoding_inside_autocast_keeps_its_dtype_and_digits() -> None:
    given = _leaf(2, 4, 8), _leaf(2, 5, 2, 8), _leaf(2, 5, 2, 8), torch.tensor([3, 5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = decode_attention(*given)
    torch.testing.assert_close(found, decode_attention(*given), rtol=0, atol=0)


def _once(*outputs: Tensor) -> Tensor:
    return torch.stack([out.double().sum() for out in outputs]).sum()


@pytest.mark.parametrize(
    "call",
    [
        lambda x: _once(attention(x.view(7, 2, 4), x.view(7, 2, 4), x.view(7, 2, 4), CU)[0]),
        lambda x: _once(rms_norm(x, x.detach()[0], 1e-5)),
        lambda x: _once(*add_rms_norm(x, x, x.detach()[0], 1e-5)),
        lambda x: _once(swiglu(x)),
        lambda x: _once(linear_cross_entropy(x, x, TARGETS)),
        lambda x: _once(*linear_logprob(x, x, TARGETS)),
    ],
    ids=["attention", "rms_norm", "add_rms_norm", "swiglu", "cross entropy", "logprob"],
)
def test_a_second_derivative_is_refused_and_never_wrong(call: Callable[[Tensor], Tensor]) -> None:
    x = _leaf(7, 8)
    (slope,) = torch.autograd.grad(call(x), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(slope.square().sum() + x.sum(), x)


def _everything(x: Tensor, weight: Tensor, vocabulary: Tensor) -> tuple[Tensor, ...]:
    """A little of each public function, as a model strings them together."""
    cos, sin, positions = _tables()
    normed, total = add_rms_norm(x, x * 0.5, weight, 1e-5)
    heads = rope(normed.view(7, 1, 8), cos, sin, positions)
    out, _ = attention(heads, heads, heads, CU, cu_seqlens_q_list=[0, 3, 7])
    mixed = swiglu(torch.cat((out.view(7, 8), total), -1))
    logprob, entropy = linear_logprob(rms_norm(mixed, weight, 1e-5), vocabulary, TARGETS)
    values = value_head(mixed, weight)
    terms = value_head_loss(mixed, weight, None, values.detach(), logprob.detach(), clip=0.2)
    ranked = ranking_loss(reward_head(mixed, torch.tensor([0, 1, 2, 3, 4, 5, 6]), weight), GROUPS, RANKS)
    advantages, _ = gae(values, values, CU, gamma=0.9, lam=0.9, cu_seqlens_list=[0, 3, 7])
    decoded = decode_attention(heads.detach(), heads.detach()[:, None], heads.detach()[:, None], torch.ones(7).long())
    loss = (logprob + 0.1 * entropy + terms.loss).sum() + ranked.loss.sum()
    return loss, advantages, decoded


NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ and there is no g++")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=NEEDS_COMPILER)])
def test_compiled_without_a_graph_break_equals_eager(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A run that was killed leaves half-written libraries in the cache that all runs share, and the next one loads them.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    inputs = (_leaf(7, 8), _leaf(8, seed=1), _leaf(9, 8, seed=2))
    eager = _everything(*inputs)
    eager_grads = torch.autograd.grad(eager[0], inputs)
    torch.compiler.reset()
    compiled: Callable[..., tuple[Tensor, ...]] = torch.compile(_everything, backend=backend, fullgraph=True)
    found = compiled(*inputs)
    for have, want in zip(found, eager, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)
    for have, want in zip(torch.autograd.grad(found[0], inputs), eager_grads, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


def test_shapes_are_known_where_no_numbers_are() -> None:
    with torch._subclasses.FakeTensorMode():
        q, k = (torch.empty(7, heads, 8) for heads in (4, 2))
        out, _ = attention(q, k, k, torch.empty(3, dtype=torch.int32))
        scores = reward_head(out.flatten(1), torch.empty(3).long(), torch.empty(32))
        advantages, _ = gae(*(torch.empty(7),) * 2, torch.empty(3, dtype=torch.int32), gamma=1.0, lam=1.0)
    assert (out.shape, scores.shape, advantages.shape) == (q.shape, (3,), (7,))


def test_shapes_on_cuda_are_known_without_a_gpu() -> None:
    with torch._subclasses.FakeTensorMode():
        q, k = (torch.empty(7, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2))
        out, lse = attention(q, k, k, torch.empty(3, device="cuda", dtype=torch.int32))
        logprob, _ = linear_logprob(
            out.flatten(1), torch.empty(99, 256, device="cuda"), torch.empty(7, device="cuda").long()
        )
    assert (out.shape, out.dtype, out.device.type) == (q.shape, torch.bfloat16, "cuda")
    assert (lse.shape, logprob.shape, logprob.dtype) == ((4, 7), (7,), torch.float32)
