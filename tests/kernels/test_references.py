"""The references (the CPU path of the framework) against fp64 mathematics written in another way."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck

from kernels import dispatch
from kernels.attention import attention, decode_attention
from kernels.attention import reference as attention_reference
from kernels.gae import gae
from kernels.linear_logprob import (
    combine_partials,
    linear_cross_entropy,
    linear_logprob,
    linear_logprob_partials,
)
from kernels.linear_logprob import reference as logprob_reference
from kernels.reward_head import ranking_loss, reward_head
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope, rope_tables, split_rope
from kernels.swiglu import swiglu
from kernels.value_head import value_head, value_head_loss, value_loss
from tests.kernels.cases import ends, generator, naive_attention, normal

LENGTHS = (5, 0, 1, 7, 7, 7)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_kv", [1, 2, 4])
def test_packed_attention_equals_one_big_mask(causal: bool, num_kv: int) -> None:
    cu = ends(LENGTHS)
    total = int(cu[-1])
    q, k, v = normal(total, 4, 8), normal(total, num_kv, 8, seed=1), normal(total, num_kv, 8, seed=2)
    out, lse = attention(q, k, v, cu, causal=causal, softmax_scale=0.3)
    want, want_lse = naive_attention(q, k, v, cu, cu, causal=causal, scale=0.3)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("lengths_q", "lengths_k"), [((3, 0, 2), (7, 4, 2)), ((6, 2), (2, 5)), ((4,), (0,))])
def test_causal_attention_is_bottom_right_aligned_and_blind_queries_get_zero(
    lengths_q: tuple[int, ...], lengths_k: tuple[int, ...]
) -> None:
    cu_q, cu_k = ends(lengths_q), ends(lengths_k)
    q, k = normal(int(cu_q[-1]), 2, 8), normal(int(cu_k[-1]), 2, 8, seed=1)
    v = normal(int(cu_k[-1]), 2, 8, seed=2)
    out, lse = attention(q, k, v, cu_q, cu_k)
    want, want_lse = naive_attention(q, k, v, cu_q, cu_k, causal=True)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-13)


@pytest.mark.parametrize("window", [1, 3, 100])
def test_a_window_shows_only_the_nearest_keys(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_reference, "MASK_ROWS", 3)
    cu = ends(LENGTHS)
    q, k, v = (normal(int(cu[-1]), 2, 8, seed=seed) for seed in range(3))
    out, lse = attention(q, k, v, cu, window=window)
    want, want_lse = naive_attention(q, k, v, cu, cu, causal=True, window=window)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-13)


def test_context_parallel_halves_put_together_are_the_whole() -> None:
    cu = ends((8, 4, 12))
    q, k, v = (normal(24, 2, 8, seed=seed).requires_grad_() for seed in range(3))
    whole, _ = attention(q, k, v, cu)
    dout = normal(24, 2, 8, seed=3)
    want = torch.autograd.grad(whole, (q, k, v), dout)
    out, grads = torch.zeros_like(whole), [torch.zeros_like(x) for x in (q, k, v)]
    for rank in range(2):
        pieces = [torch.arange(a, b).view(4, -1) for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)]
        slots = torch.cat([piece for blocks in pieces for piece in (blocks[rank], blocks[3 - rank])])
        part, _ = attention(q[slots], k, v, cu // 2, cu, q_slots=slots)
        out[slots] = part.detach()
        for total, grad in zip(grads, torch.autograd.grad(part, (q, k, v), dout[slots]), strict=True):
            total += grad
    torch.testing.assert_close(out, whole.detach(), rtol=0, atol=1e-13)
    for found, truth in zip(grads, want, strict=True):
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-12)


def test_dense_attention_is_packed_attention_of_equal_rows() -> None:
    q, k, v = normal(2, 5, 4, 8), normal(2, 6, 2, 8, seed=1), normal(2, 6, 2, 8, seed=2)
    out, lse = attention(q, k, v)
    packed, packed_lse = attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), ends((5, 5)), ends((6, 6)))
    assert torch.equal(out.flatten(0, 1), packed)
    assert torch.equal(lse, packed_lse.view(4, 2, 5).transpose(0, 1))


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("lengths", [(6, 6), (6, 14)])
def test_attention_of_a_transposed_view_is_attention_of_its_copy(
    which: tuple[int, ...], lengths: tuple[int, int]
) -> None:
    total = sum(lengths)
    inputs = [normal(total, heads, 16, seed=heads).requires_grad_() for heads in (4, 2, 2)]
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) if i in which else x for i, x in enumerate(inputs)]
    assert all(views[i].stride(-1) > 1 for i in which)
    dout = normal(total, 16, 4, seed=3).transpose(1, 2)
    out, lse = attention(views[0], views[1], views[2], ends(lengths))
    grads = torch.autograd.grad(out, inputs, dout)
    cu = ends(lengths)
    want, want_lse = naive_attention(*inputs, cu, cu, causal=True)  # type: ignore[misc]
    torch.testing.assert_close(out, want, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-13)
    for have, truth in zip(grads, torch.autograd.grad(want, inputs, dout), strict=True):
        torch.testing.assert_close(have, truth, rtol=0, atol=1e-12)


def test_plain_causal_attention_builds_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    original = attention_reference._mask

    def spy(*args: object) -> torch.Tensor | None:
        mask = original(*args)  # type: ignore[arg-type]
        built.append(mask)
        return mask

    monkeypatch.setattr(attention_reference, "_mask", spy)
    cu = ends((8, 8, 8, 3))
    attention(*(normal(27, 2, 8, seed=seed) for seed in range(3)), cu)  # type: ignore[misc]
    assert built == [None, None]  # one call for the three equal rows, one for the short one


def test_queries_in_the_middle_of_their_sequence_give_the_keys_behind_them_no_gradient() -> None:
    """As on a context-parallel rank: one tile that begins where the pack does and does not reach its last keys."""
    q, k, v = (normal(16, 2, 8, seed=seed).requires_grad_() for seed in range(3))
    slots, dout = torch.arange(4, 12), normal(8, 2, 8, seed=3)
    found, _ = attention(q[4:12], k, v, ends((8,)), ends((16,)), q_slots=slots)
    whole = attention(q, k, v, ends((16,)))[0][4:12]
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-13)
    for have, truth in zip(
        torch.autograd.grad(found, (q, k, v), dout), torch.autograd.grad(whole, (q, k, v), dout), strict=True
    ):
        torch.testing.assert_close(have, truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 3])
def test_attention_gradients_are_the_derivative(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_reference, "MASK_ROWS", 4)
    cu_q, cu_k = ends((3, 4, 5)), ends((3, 6, 2))
    q, k, v = normal(12, 4, 4), normal(11, 2, 4, seed=1), normal(11, 2, 4, seed=2)
    inputs = tuple(x.requires_grad_() for x in (q, k, v))
    assert gradcheck(lambda *args: attention(*args, cu_q, cu_k, window=window)[0], inputs)


def test_decoding_a_row_is_the_last_query_of_its_causal_attention() -> None:
    lengths = (3, 7, 1)
    cache_k, cache_v = normal(3, 9, 2, 8), normal(3, 9, 2, 8, seed=1)
    q = normal(3, 4, 8, seed=2)
    for window in (None, 2):
        out = decode_attention(q, cache_k, cache_v, torch.tensor(lengths), window=window)
        for row, length in enumerate(lengths):
            keys, values = cache_k[row, :length], cache_v[row, :length]
            want, _ = naive_attention(
                q[row : row + 1], keys, values, ends((1,)), ends((length,)), causal=True, window=window
            )
            torch.testing.assert_close(out[row : row + 1], want, rtol=0, atol=1e-13)
    assert torch.equal(decode_attention(q, cache_k, cache_v, torch.tensor([0, 1, 1]))[0], torch.zeros(4, 8).double())


def test_rms_norm_is_its_formula_and_adds_the_residual_first() -> None:
    x, residual, weight = normal(3, 5, 8), normal(3, 5, 8, seed=1), normal(8, seed=2)
    total = x + residual
    want = total / (total.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    torch.testing.assert_close(rms_norm(total, weight, 1e-3), want, rtol=0, atol=1e-14)
    normed, summed = add_rms_norm(x, residual, weight, 1e-3)
    torch.testing.assert_close(normed, want, rtol=0, atol=1e-14)
    assert torch.equal(summed, total)


def test_rms_norm_gradients_are_the_derivative() -> None:
    inputs = tuple(t.requires_grad_() for t in (normal(3, 8), normal(3, 8, seed=1), normal(8, seed=2)))
    assert gradcheck(lambda x, r, w: add_rms_norm(x, r, w, 1e-5), inputs)
    assert gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (inputs[0], inputs[2]))


def test_rope_is_a_complex_rotation_and_its_gradient_turns_back() -> None:
    positions = torch.tensor([0, 1, 2, 0, 5])
    frequencies = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    cos, sin = (table.double() for table in rope_tables(frequencies, 6))
    x = normal(5, 3, 8)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(
        torch.ones(5, 1, 4).double(), positions[:, None, None] * frequencies
    )
    torch.testing.assert_close(
        rope(x, cos, sin, positions), torch.cat((turned.real, turned.imag), -1), rtol=0, atol=1e-6
    )
    assert gradcheck(lambda t: rope(t, cos, sin, positions), (x.clone().requires_grad_(),))
    expected = rope(x, cos, sin, positions)
    memory = x.data_ptr()
    assert torch.equal(rope(x, cos, sin, positions, in_place=True), expected)
    assert x.data_ptr() == memory
    assert torch.equal(x, expected)


def test_split_rope_is_rope_of_each_part_and_its_gradient_too() -> None:
    cos, sin = (table.double() for table in rope_tables(3.0 ** -torch.arange(4, dtype=torch.float64), 6))
    positions, qkv = torch.tensor([0, 1, 2, 0, 5]), normal(5, 2, 5, 8).requires_grad_()  # two groups of three queries

    def parts(fused: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query = rope(fused[:, :, :3].reshape(5, 6, 8), cos, sin, positions)
        return query, rope(fused[:, :, 3], cos, sin, positions), fused[:, :, 4]

    want, found = parts(qkv), split_rope(qkv, cos, sin, positions)
    weights = [normal(*part.shape, seed=seed) for seed, part in enumerate(want)]
    for have, expected in zip(found, want, strict=True):
        torch.testing.assert_close(have, expected, rtol=0, atol=0)
    grads = [torch.autograd.grad(outputs, qkv, weights)[0] for outputs in (found, want)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-15)


def test_swiglu_is_gate_times_sigmoid_times_up() -> None:
    x = normal(3, 2, 10).requires_grad_()
    gate, up = x[..., :5], x[..., 5:]
    torch.testing.assert_close(swiglu(x), gate / (1 + torch.exp(-gate)) * up, rtol=0, atol=1e-14)
    assert gradcheck(swiglu, (x,))


def test_logprob_and_entropy_are_those_of_log_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprob_reference, "CHUNK_LOGITS", 25)  # two tokens a chunk
    hidden, weight = normal(7, 6), normal(12, 6, seed=1)
    targets = torch.randint(0, 10, (7,), generator=generator(2))
    mask = torch.tensor([True, True, False, True, False, True, True])
    want = torch.log_softmax(hidden @ weight[:10].t() / 0.7, -1)
    logprob, entropy = linear_logprob(hidden, weight, targets, temperature=0.7, mask_T=mask, valid_rows=10)
    picked = want.gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(logprob, torch.where(mask, picked, 0.0), rtol=0, atol=1e-13)
    torch.testing.assert_close(entropy, torch.where(mask, -(want.exp() * want).sum(-1), 0.0), rtol=0, atol=1e-13)
    loss = linear_cross_entropy(hidden, weight, targets, mask_T=mask, valid_rows=10)
    cold = torch.nn.functional.cross_entropy(hidden @ weight[:10].t(), targets, reduction="none")
    torch.testing.assert_close(loss, torch.where(mask, cold, 0.0), rtol=0, atol=1e-13)


@pytest.mark.parametrize("ignored", [-100, 3])
def test_ignored_targets_have_no_loss_and_no_gradient(ignored: int) -> None:
    hidden, weight = normal(7, 6).requires_grad_(), normal(12, 6, seed=1).requires_grad_()
    targets = torch.tensor([0, ignored, 11, 3, ignored, 5, 8])
    mask = torch.tensor([True, True, True, True, True, False, True])
    counted = mask & (targets != ignored)
    loss = linear_cross_entropy(hidden, weight, targets, mask_T=mask, ignore_index=ignored)
    cold = torch.nn.functional.cross_entropy(
        hidden @ weight.t(), targets, reduction="none", ignore_index=ignored
    ).where(mask, 0.0)
    torch.testing.assert_close(loss, cold, rtol=0, atol=1e-13)
    slope = normal(7, seed=2)
    for have, want in zip(
        torch.autograd.grad(loss, (hidden, weight), slope),
        torch.autograd.grad(cold, (hidden, weight), slope),
        strict=True,
    ):
        torch.testing.assert_close(have, want, rtol=0, atol=1e-13)
    logprob, entropy = linear_logprob(hidden, weight, targets, mask_T=mask, ignore_index=ignored)
    assert (entropy > 0).tolist() == counted.tolist()
    torch.testing.assert_close(logprob, -cold, rtol=0, atol=1e-13)


def test_every_target_counts_where_none_is_to_be_ignored() -> None:
    hidden, weight, targets = normal(3, 6), normal(12, 6, seed=1), torch.tensor([0, 11, 3])
    found = linear_cross_entropy(hidden, weight, targets, ignore_index=None)
    torch.testing.assert_close(found, linear_cross_entropy(hidden, weight, targets), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"targets_T must be 0 \.\. 11, got -100"):
        linear_cross_entropy(hidden, weight, torch.tensor([0, -100, 3]), ignore_index=None)


def test_logprob_gradients_are_the_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprob_reference, "CHUNK_LOGITS", 25)
    hidden, weight = normal(7, 6).requires_grad_(), normal(12, 6, seed=1).requires_grad_()
    targets = torch.randint(0, 10, (7,), generator=generator(2))
    mask = torch.tensor([True, True, False, True, False, True, True])

    def both(h: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return linear_logprob(h, w, targets, temperature=0.7, mask_T=mask, valid_rows=10)

    assert gradcheck(both, (hidden, weight))
    assert gradcheck(lambda h, w: linear_logprob(h, w, targets, entropy=False)[0], (hidden, weight))


def test_two_all_reduces_make_the_whole_of_vocabulary_shards() -> None:
    hidden, weight = normal(5, 6), normal(16, 6, seed=1)
    hidden[1] *= 60.0  # logits whose exponentials overflow without the maximum
    targets = torch.tensor([0, 3, 4, 9, 11])
    whole = [t.clone().requires_grad_() for t in (hidden, weight)]
    want = linear_logprob(*whole, targets, valid_rows=12)  # type: ignore[misc]
    coefficients = normal(2, 5, seed=3)
    want_grads = torch.autograd.grad((torch.stack(want) * coefficients).sum(), whole)

    sharded = [t.clone().requires_grad_() for t in (hidden, weight)]
    parts = [
        linear_logprob_partials(
            sharded[0], sharded[1][row : row + 4], targets, vocab_start=row, valid_rows=max(0, min(4, 12 - row))
        )
        for row in range(0, 16, 4)  # the last shard is padding only
    ]
    highest = torch.stack([part.lse for part in parts]).amax(0).detach()

    def sums(terms: torch.Tensor) -> torch.Tensor:
        logs = [(part.lse - highest).clamp(min=-200.0) for part in parts]
        stacked = [
            torch.stack((log.exp(), log.exp() * (p.entropy - log), p.target))
            for log, p in zip(logs, parts, strict=True)
        ]
        assert any(torch.equal(terms, one) for one in stacked)
        return torch.stack(stacked).sum(0)

    for part in parts:
        found = combine_partials(part, lambda _: highest, sums)
        torch.testing.assert_close(found[0], want[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(found[1], want[1], rtol=0, atol=1e-12)
    grads = torch.autograd.grad((torch.stack(found) * coefficients).sum(), sharded)
    for have, truth in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(have, truth, rtol=1e-10, atol=1e-10)


def test_logprob_is_never_positive_and_entropy_stays_within_its_bounds() -> None:
    hidden, weight = normal(64, 16, dtype=torch.float32, scale=30.0), normal(37, 16, dtype=torch.float32, seed=1)
    targets = (hidden @ weight.t()).argmax(-1)
    logprob, entropy = linear_logprob(hidden, weight, targets)
    assert logprob.max() <= 0
    assert entropy.min() >= 0
    assert entropy.max() <= math.log(37) + 1e-6


def test_log_prob_head_never_holds_more_logits_than_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprob_reference, "CHUNK_LOGITS", 64)
    largest = 0
    original = logprob_reference._logits

    def spy(*args: object) -> torch.Tensor:
        nonlocal largest
        logits = original(*args)  # type: ignore[arg-type]
        largest = max(largest, logits.numel())
        return logits

    monkeypatch.setattr(logprob_reference, "_logits", spy)
    hidden, weight = normal(50, 4).requires_grad_(), normal(16, 4, seed=1).requires_grad_()
    logprob, _ = linear_logprob(hidden, weight, torch.zeros(50, dtype=torch.int64))
    logprob.sum().backward()
    assert largest == 64


@pytest.mark.parametrize("chunk", [37 * 12, 37 * 5])
@pytest.mark.parametrize("budget", [37 * 12, 37 * 12 - 1])
def test_log_prob_head_keeps_its_exponentials_only_within_the_budget(
    budget: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprob_reference, "CHUNK_LOGITS", chunk)
    monkeypatch.setattr(logprob_reference, "KEPT_LOGITS", budget)
    hidden, weight = normal(13, 8).requires_grad_(), normal(40, 8, seed=1).requires_grad_()
    targets, mask = torch.arange(13) * 3, torch.arange(13) != 5  # 12 tokens count, 37 rows are real
    saved: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logprob, _ = linear_logprob(hidden, weight, targets, mask_T=mask, valid_rows=37, temperature=1.3, entropy=False)
    assert (max(saved) == 37 * 12) == (budget == 37 * 12)
    logits = (hidden @ weight[:37].t() / 1.3).log_softmax(-1)
    want = logits.gather(1, targets[:, None]).squeeze(1).where(mask, 0.0)
    slope = normal(13, seed=2)
    grads = [torch.autograd.grad(values, (hidden, weight), slope, retain_graph=True) for values in (logprob, want)]
    for have, expected in zip(*grads, strict=True):
        torch.testing.assert_close(have, expected, rtol=1e-12, atol=1e-13)


def test_log_prob_head_keeps_nothing_where_no_gradient_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []
    original = logprob_reference.forward
    monkeypatch.setattr(logprob_reference, "forward", lambda *args: kept.append(args[-1]) or original(*args))
    hidden, weight = normal(5, 4), normal(16, 4, seed=1).requires_grad_()
    with torch.no_grad():
        linear_logprob(hidden, weight, torch.arange(5), entropy=False)
    linear_logprob(hidden, weight, torch.arange(5), entropy=False)
    assert kept[0] is None
    assert kept[1]


def test_reward_head_scores_the_last_tokens_and_leaves_absent_rows_at_zero() -> None:
    hidden, weight, bias = normal(6, 4), normal(1, 4, seed=1), normal(1, seed=2)
    norm, last = normal(4, seed=3), torch.tensor([2, -1, 5])
    scores = reward_head(hidden, last, weight, bias, norm_weight_D=norm, eps=1e-4)
    for row, slot in ((0, 2), (2, 5)):
        x = hidden[slot]
        want = (x / (x.square().mean() + 1e-4).sqrt() * norm * weight[0]).sum() + bias[0]
        torch.testing.assert_close(scores[row], want, rtol=0, atol=1e-14)
    assert scores[1] == 0
    inputs = tuple(t.requires_grad_() for t in (hidden, weight, bias, norm))
    assert gradcheck(lambda h, w, b, n: reward_head(h, last, w, b, norm_weight_D=n, eps=1e-4), inputs)
    assert gradcheck(lambda h, w: reward_head(h, last, w), inputs[:2])


def test_rows_that_share_a_last_token_share_its_gradient() -> None:
    hidden, weight, norm = normal(6, 4), normal(4, seed=1), normal(4, seed=3)
    last = torch.tensor([2, 5, 2, -1, 2])
    inputs = tuple(t.requires_grad_() for t in (hidden, weight, norm))
    assert gradcheck(lambda h, w, n: reward_head(h, last, w, norm_weight_D=n), inputs)


def test_ranking_loss_is_the_mean_over_pairs_of_each_group() -> None:
    scores = torch.tensor([1.0, -0.5, 0.25, 2.0, 1.0], dtype=torch.float64)
    groups, ranks = torch.tensor([7, 3, 7, 3, 7]), torch.tensor([0, 1, 1, 0, 1])  # a tie in group 7
    terms = ranking_loss(scores, groups, ranks, margin=0.5, centering=0.1)

    def soft(gap: float) -> float:
        return math.log1p(math.exp(-gap))

    seven = (soft(0.75 - 0.5) + soft(0.0 - 0.5)) / 2 + 0.1 * ((1.0 + 0.25 + 1.0) / 3) ** 2
    three = soft(2.5 - 0.5) + 0.1 * 0.75**2
    assert terms.loss.sum().item() == pytest.approx(seven + three, abs=1e-14)
    assert terms.pairs.tolist() == [2, 0, 0, 1, 0]
    assert terms.correct.tolist() == [1, 0, 0, 1, 0]
    summed = ranking_loss(scores, groups, ranks, mean_of_pairs=False)
    assert summed.loss.sum().item() == pytest.approx(soft(0.75) + soft(0.0) + soft(2.5), abs=1e-14)
    assert gradcheck(
        lambda s: ranking_loss(s, groups, ranks, margin=0.5, centering=0.1).loss, (scores.requires_grad_(),)
    )


def test_value_loss_takes_the_larger_of_plain_and_clipped() -> None:
    values = torch.tensor([1.0, 3.0, -1.0, 0.1], dtype=torch.float64, requires_grad=True)
    old, returns = torch.tensor([0.0, 0.0, 0.0, 0.0]).double(), torch.tensor([2.0, 2.0, -3.0, 1.0]).double()
    mask = torch.tensor([True, True, True, False])
    loss, clipped = value_loss(values, old, returns, clip=0.2, mask_T=mask)
    torch.testing.assert_close(loss, torch.tensor([0.5 * 1.8**2, 0.5 * 1.8**2, 0.5 * 2.8**2, 0.0]).double())
    assert clipped.tolist() == [True, True, True, False]
    near = (torch.tensor([number]) for number in (0.031472098082304, 0.10584919154644012, 0.02260744757950306))
    assert not value_loss(*near, clip=0.2)[1].any()  # within the range, though old + (v - old) is not v when rounded
    plain, none = value_loss(values, old, returns, clip=None)
    torch.testing.assert_close(plain, 0.5 * (values - returns).square())
    assert not none.any()


def test_fused_value_loss_is_head_then_loss() -> None:
    hidden, weight, bias = normal(6, 4), normal(4, seed=1), normal(1, seed=2)
    old, returns = normal(6, seed=3), normal(6, seed=4)
    terms = value_head_loss(hidden, weight, bias, old, returns, clip=0.3)
    values = value_head(hidden, weight, bias)
    torch.testing.assert_close(values, hidden @ weight + bias)
    assert torch.equal(terms.values, values)
    assert torch.equal(terms.loss, value_loss(values, old, returns, clip=0.3)[0])
    inputs = tuple(t.requires_grad_() for t in (hidden, weight, bias))
    assert gradcheck(lambda h, w, b: value_head_loss(h, w, b, old, returns, clip=0.3).loss, inputs)
    assert gradcheck(value_head, inputs)


@pytest.mark.parametrize("bootstrap", [False, True])
def test_gae_is_the_backward_recursion_of_every_row(bootstrap: bool) -> None:
    lengths = (4, 0, 1, 6)
    cu, rewards, values = ends(lengths), normal(11), normal(11, seed=1)
    after = normal(4, seed=2) if bootstrap else None
    advantages, returns = gae(rewards, values, cu, gamma=0.9, lam=0.8, bootstrap_R=after)
    for row in range(4):
        carried, value_after = 0.0, float(after[row]) if after is not None else 0.0
        for t in reversed(range(int(cu[row]), int(cu[row + 1]))):
            carried = float(rewards[t]) + 0.9 * value_after - float(values[t]) + 0.9 * 0.8 * carried
            value_after = float(values[t])
            assert advantages[t].item() == pytest.approx(carried, abs=1e-13)
    torch.testing.assert_close(returns, advantages + values)


def test_ops_run_on_ranks_without_tokens() -> None:
    empty = torch.zeros(0, 8)
    cu = torch.zeros(1, dtype=torch.int32)
    out, lse = attention(*(torch.zeros(0, 2, 8),) * 3, cu)  # type: ignore[misc]
    assert out.shape == (0, 2, 8)
    assert lse.shape == (2, 0)
    assert rms_norm(empty, torch.ones(8), 1e-6).shape == (0, 8)
    assert (
        rope(torch.zeros(0, 2, 8), torch.ones(1, 4), torch.ones(1, 4), torch.zeros(0, dtype=torch.int64)).shape[0] == 0
    )
    logprob, _ = linear_logprob(empty.requires_grad_(), torch.ones(5, 8), torch.zeros(0, dtype=torch.int64))
    logprob.sum().backward()
    assert reward_head(empty, torch.tensor([-1]), torch.ones(8)).tolist() == [0.0]
    assert gae(torch.zeros(0), torch.zeros(0), torch.zeros(2, dtype=torch.int32), gamma=1.0, lam=1.0)[0].shape == (0,)
    assert value_head(empty, torch.ones(8)).shape == (0,)
    assert ranking_loss(torch.zeros(0), *(torch.zeros(0, dtype=torch.int64),) * 2).loss.shape == (0,)


def _cache() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.zeros(2, 4, 8), torch.zeros(2, 5, 2, 8), torch.zeros(2, 5, 2, 8)


BAD_INPUT: dict[str, Any] = {
    "a last token beyond the last": lambda: reward_head(torch.zeros(4, 8), torch.tensor([1, 4]), torch.zeros(8)),
    "ends that stop short": lambda: attention(*(torch.zeros(4, 2, 8),) * 3, torch.tensor([0, 3], dtype=torch.int32)),
    "heads that do not divide": lambda: attention(
        torch.zeros(4, 3, 8), torch.zeros(4, 2, 8), torch.zeros(4, 2, 8), ends((4,))
    ),
    "two dtypes": lambda: attention(
        torch.zeros(4, 2, 8), torch.zeros(4, 2, 8).half(), torch.zeros(4, 2, 8), ends((4,))
    ),
    "slots out of order": lambda: attention(
        *(torch.zeros(4, 2, 8),) * 3, ends((4,)), q_slots=torch.tensor([0, 2, 1, 3])
    ),
    "slots beyond the keys": lambda: attention(
        *(torch.zeros(4, 2, 8),) * 3, ends((4,)), q_slots=torch.tensor([0, 1, 2, 9])
    ),
    "half a window": lambda: attention(*(torch.zeros(4, 2, 8),) * 3, ends((4,)), window=2.5),
    "a window of none": lambda: decode_attention(*_cache(), torch.tensor([1, 2]), window=0),
    "a row longer than its cache": lambda: decode_attention(*_cache(), torch.tensor([6, 2])),
    "a head size of 0": lambda: attention(*(torch.zeros(4, 2, 0),) * 3, ends((4,))),
    "a number for ends": lambda: attention(*(torch.zeros(4, 2, 8),) * 3, torch.tensor(4)),
    "a list of ends": lambda: attention(*(torch.zeros(4, 2, 8),) * 3, [0, 4]),
    "no queries": lambda: attention(None, *(torch.zeros(4, 2, 8),) * 2, ends((4,))),
    "a list for a weight": lambda: value_head(torch.zeros(4, 2), [1.0, 2.0]),
    "no weight": lambda: reward_head(torch.zeros(4, 8), torch.tensor([1]), None),
    "a list for a mask": lambda: linear_logprob(
        torch.zeros(2, 8), torch.zeros(5, 8), torch.tensor([0, 1]), mask_T=[True, False]
    ),
    "a list of lists to gate": lambda: swiglu([[1.0, 2.0]]),
    "a position beyond the tables": lambda: rope(
        torch.zeros(4, 2, 8), *(torch.ones(4, 4),) * 2, torch.tensor([0, 1, 2, 4])
    ),
    "a position before the tables": lambda: split_rope(
        torch.zeros(4, 1, 3, 8), *(torch.ones(4, 4),) * 2, torch.tensor([0, -1, 2, 3])
    ),
    "in-place over shared memory": lambda: rope(
        torch.zeros(4, 1, 8).expand(4, 2, 8), *(torch.ones(4, 4),) * 2, torch.arange(4), in_place=True
    ),
    "a target beyond the vocabulary": lambda: linear_cross_entropy(
        torch.zeros(2, 8), torch.zeros(5, 8), torch.tensor([0, 5])
    ),
    "a target of padding": lambda: linear_logprob(
        torch.zeros(2, 8), torch.zeros(5, 8), torch.tensor([0, 4]), valid_rows=4
    ),
    "no vocabulary": lambda: linear_logprob(torch.zeros(2, 8), torch.zeros(0, 8), torch.tensor([0, 0])),
    "a vocabulary of padding": lambda: linear_cross_entropy(
        torch.zeros(2, 8), torch.zeros(5, 8), torch.tensor([0, 0]), valid_rows=0
    ),
    "a negative eps": lambda: reward_head(torch.zeros(4, 8), torch.tensor([1]), torch.ones(8), eps=-1.0),
    "a window without causal": lambda: attention(*(torch.zeros(4, 2, 8),) * 3, ends((4,)), causal=False, window=2),
    "an integer matrix": lambda: rms_norm(torch.zeros(4, 8, dtype=torch.int64), torch.ones(8), 1e-6),
    "a short weight": lambda: rms_norm(torch.zeros(4, 8), torch.ones(7), 1e-6),
    "an odd width": lambda: swiglu(torch.zeros(4, 7)),
    "in-place over a leaf": lambda: rope(
        torch.zeros(4, 2, 8).requires_grad_(), torch.ones(4, 4), torch.ones(4, 4), torch.arange(4), in_place=True
    ),
    "temperature 0": lambda: linear_logprob(
        torch.zeros(4, 8), torch.zeros(5, 8), torch.zeros(4, dtype=torch.int64), temperature=0.0
    ),
    "float targets": lambda: linear_logprob(torch.zeros(4, 8), torch.zeros(5, 8), torch.zeros(4)),
    "too many valid rows": lambda: linear_logprob(
        torch.zeros(4, 8), torch.zeros(5, 8), torch.zeros(4, dtype=torch.int64), valid_rows=6
    ),
    "gamma above 1": lambda: gae(torch.zeros(4), torch.zeros(4), ends((4,)), gamma=1.1, lam=1.0),
    "a cache of another dtype": lambda: decode_attention(
        torch.zeros(2, 4, 8), torch.zeros(2, 5, 2, 8).bfloat16(), torch.zeros(2, 5, 2, 8), torch.tensor([1, 2])
    ),
    "a cache elsewhere": lambda: decode_attention(
        torch.zeros(2, 4, 8), *(torch.zeros(2, 5, 2, 8, device="meta"),) * 2, torch.tensor([1, 2])
    ),
    "keys elsewhere": lambda: attention(torch.zeros(4, 2, 8), *(torch.zeros(4, 2, 8, device="meta"),) * 2, ends((4,))),
    "a weight elsewhere": lambda: rms_norm(torch.zeros(4, 8), torch.ones(8, device="meta"), 1e-6),
    "a residual elsewhere": lambda: add_rms_norm(
        torch.zeros(4, 8), torch.zeros(4, 8, device="meta"), torch.ones(8), 1e-6
    ),
    "tables elsewhere": lambda: rope(torch.zeros(4, 2, 8), *(torch.ones(4, 4, device="meta"),) * 2, torch.arange(4)),
    "a vocabulary elsewhere": lambda: linear_logprob(
        torch.zeros(4, 8), torch.zeros(5, 8, device="meta"), torch.zeros(4, dtype=torch.int64)
    ),
    "last tokens elsewhere": lambda: reward_head(
        torch.zeros(4, 8), torch.zeros(2, dtype=torch.int64, device="meta"), torch.ones(8)
    ),
    "ranks elsewhere": lambda: ranking_loss(
        torch.zeros(2), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64, device="meta")
    ),
    "returns elsewhere": lambda: value_head_loss(
        torch.zeros(4, 8), torch.ones(8), None, torch.zeros(4), torch.zeros(4, device="meta"), clip=0.2
    ),
    "values elsewhere": lambda: gae(torch.zeros(4), torch.zeros(4, device="meta"), ends((4,)), gamma=1.0, lam=1.0),
    "integer values": lambda: value_loss(torch.zeros(4, dtype=torch.int64), torch.zeros(4), torch.zeros(4), clip=None),
    "a mask of integers": lambda: value_loss(
        torch.zeros(4), torch.zeros(4), torch.zeros(4), clip=0.2, mask_T=torch.ones(4, dtype=torch.int64)
    ),
}


@pytest.mark.parametrize("case", sorted(BAD_INPUT))
def test_bad_input_is_a_value_error_that_says_what(case: str) -> None:
    with pytest.raises(ValueError, match=r"must|differ|multiple|would"):
        BAD_INPUT[case]()


def test_forcing_triton_where_it_cannot_run_says_what_it_needs() -> None:
    if dispatch.interpreting():
        pytest.skip("the interpreter runs Triton on CPU tensors")
    with dispatch.use("triton"), pytest.raises(NotImplementedError, match="TRITON_INTERPRET"):
        attention(*(torch.zeros(4, 2, 64),) * 3, ends((4,)))  # type: ignore[misc]
