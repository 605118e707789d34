"""Planted bugs.  Each is one edit of a kernel or of the function around it; its op's proofs must notice every one."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from triton.runtime.errors import InterpreterError

from tests.kernels.catalogue import CATALOGUE


@dataclass(frozen=True)
class Bug:
    """Replace the first ``old`` in a function of a Triton module by ``new``."""

    op: str  # an op (its module ``triton``), or op/module
    kernel: str  # the kernel it is counted for
    function: str  # where the text is: the kernel or what it calls
    name: str
    old: str
    new: str
    cases: str = ""  # proofs to run: those whose name matches this pattern; "": all


def _bugs(op: str, kernel: str, cases: str, *edits: tuple[str, str, str] | tuple[str, str, str, str]) -> list[Bug]:
    """Edits are (name, old, new) of the kernel itself or (name, old, new, function)."""
    return [Bug(op, kernel, edit[3] if len(edit) == 4 else kernel, *edit[:3], cases) for edit in edits]


_NO_DECODE = r"^(?!decode|dense|specialized)"

BUGS: list[Bug] = [
    *_bugs(
        "attention", "attention_forward", _NO_DECODE,
        ("no scale", "full, high, position, num_k, scale * LOG2E", "full, high, position, num_k, LOG2E"),
        ("a causal mask one key late", "key <= position", "key <= position + 1", "_visible"),
        ("a causal mask one key early", "key <= position", "key < position", "_visible"),
        ("every head reads key head 0", "(head // GROUP) * stride_kh", "0 * stride_kh"),
        ("heads map to groups by remainder", "(head // GROUP) * stride_vh", "(head % (HEADS // GROUP)) * stride_vh"),
        ("sum not rescaled", "total = total * rescale", "total = total", "_forward_keys"),
        ("output not rescaled", "acc = acc * rescale[:, None]", "acc = acc", "_forward_keys"),
        ("key tail not masked", "seen = key < num_k", "seen = key >= 0", "_visible"),
        ("full blocks one too many", "first + 1, num_k", "first + BN, num_k", "_key_range"),
        ("last key dropped", "last + 1)", "last)", "_key_range"),
        ("lse in base 2", "tl.math.log2(total)) * LN2", "tl.math.log2(total))"),
        ("lse without its maximum", "highest + tl.math.log2(total)", "tl.math.log2(total)"),
        ("accumulator in bf16", "acc = acc * rescale[:, None]",
         "acc = (acc * rescale[:, None]).to(tl.bfloat16).to(tl.float32)", "_forward_keys"),
        ("sum in bf16", "total = total * rescale + tl.sum(weight, 1)",
         "total = (total * rescale + tl.sum(weight, 1)).to(tl.bfloat16).to(tl.float32)", "_forward_keys"),
        ("weights in fp8 precision", "weight.to(v.dtype)", "(weight * 8.0).to(tl.int32).to(v.dtype) * 0.125",
         "_forward_keys"),
        ("window one key wide of it", "key > position - WINDOW", "key >= position - WINDOW", "_visible"),
        ("window starts late", "first - WINDOW + 1, 0) // BN * BN",
         "first - WINDOW + 1 + BN, 0) // BN * BN", "_key_range"),
        ("top-left alignment", "q_start, k_start, num_k - num_q, num_q", "q_start, k_start, 0, num_q"),
        ("keys of the neighbouring sequence", "k_start = tl.load(ends_k_ptr + sequence)", "k_start = q_start"),
        ("wrong sequence boundary", "(tl.cumsum(tiles, 0) <= tile)", "(tl.cumsum(tiles, 0) < tile)", "_find_tile"),
        ("query tail stored", "_inside(row, num_q,", "_inside(row, num_q + 1,"),
        ("blind queries divide by 0", "tl.where(total > 0.0, total, 1.0)", "total"),
        ("maximum not subtracted", "score - origin[:, None]", "score", "_forward_keys"),
        ("values by the keys' stride", "k_base, v_base, stride_kt, stride_vt, low, full",
         "k_base, v_base, stride_kt, stride_kt, low, full"),
    ),
    *_bugs(
        "attention/dense", "attention_forward_dense", "^dense",
        ("no scale", "full, high, position, num_k, scale * LOG2E", "full, high, position, num_k, LOG2E"),
        ("causal mask one key late", "key[None, :] <= position", "key[None, :] <= 1 + position", "_masked"),
        ("sum not rescaled", "total * rescale", "total", "_weights"),
        ("output not rescaled", "acc = acc * rescale[:, None]", "acc = acc", "_dense_keys"),
        ("key tail not masked", "seen = key[None, :] < num_k", "seen = key[None, :] >= 0", "_masked"),
        ("heads map to groups by remainder", "batch, head // GROUP, full", "batch, head % (HEADS // GROUP), full"),
        ("lse in base 2", "tl.math.log2(total)) * LN2", "tl.math.log2(total))"),
        ("top-left alignment", "position = row + (num_k - num_q)", "position = row"),
        ("full blocks one too many", "tile * BM + 1 + num_k", "tile * BM + BN + num_k"),
        ("batch of the first row", "batch.to(tl.int64) * num_q", "batch.to(tl.int64)"),
        ("accumulator in bf16", "acc = acc * rescale[:, None]",
         "acc = (acc * rescale[:, None]).to(tl.bfloat16).to(tl.float32)", "_dense_keys"),
    ),
    *_bugs(
        "attention/dense", "attention_forward_specialized", "^specialized",
        ("no scale", "(scale * LOG2E)", "LOG2E"),
        ("causal mask one key late", "key[None, :] <= position", "key[None, :] <= 1 + position", "_masked"),
        ("key tail not masked", "seen = key[None, :] < num_k", "seen = key[None, :] >= 0", "_masked"),
        ("sum not rescaled", "total * rescale", "total", "_weights"),
        ("output not rescaled", "acc = acc * rescale[:, None]", "acc = acc"),
        ("heads map to groups by remainder", "start, (head // GROUP) * D", "start, (head % (HEADS // GROUP)) * D"),
        ("keys of the first row", "batch * num_k + start", "start"),
        ("last keys dropped", "tile * BM + BM + num_k - num_q", "tile * BM + num_k - num_q"),
        ("top-left alignment", "position = row + (num_k - num_q)", "position = row"),
        ("lse in base 2", "tl.math.log2(total)) * LN2", "tl.math.log2(total))"),
        ("query tail stored", "mask=row[:, None] < num_q", "mask=row[:, None] <= num_q"),
        ("row stride ignored", "[stride_q, 1]", "[HEADS * D, 1]"),
        ("accumulator in bf16", "acc = acc * rescale[:, None]",
         "acc = (acc * rescale[:, None]).to(tl.bfloat16).to(tl.float32)"),
    ),
    *_bugs(
        "attention", "attention_dkdv", r"ragged|gqa|parallel|window|fewer|blind|scale|head 80|large|differ",
        ("dK without the scale", "(dk * scale)", "dk"),
        ("probabilities without the scale", "* (scale * LOG2E)", "* LOG2E", "_backward_queries"),
        ("delta forgotten", "dweight - delta[None, :]", "dweight", "_backward_queries"),
        ("first query block skipped", "low = low // BM * BM", "low = (low + BM) // BM * BM", "_query_range"),
        ("mask off by one", "full = tl.minimum(tl.maximum(key_high - shift, 0), num_q)",
         "full = tl.minimum(tl.maximum(key_high - BM - shift, 0), num_q)", "_query_range"),
        ("one head of the group only", "tl.range(0, GROUP)", "tl.range(0, 1)"),
        ("wrong head of the group", "head = kv_head * GROUP + member", "head = kv_head + member * (HEADS // GROUP)"),
        ("lse in base 2 taken for base e", "(lse * LOG2E)", "lse", "_backward_queries"),
        ("dV with unrounded garbage rows", "mask=row < num_q, other=0.0)", "mask=row < num_q)", "_backward_queries"),
        ("dK from dO", "dscore.to(q.dtype), q,", "dscore.to(q.dtype), dout,", "_backward_queries"),
        ("accumulator in bf16", "dv = tl.dot(weight.to(dout.dtype), dout, dv, input_precision=PRECISION)",
         "dv = tl.dot(weight.to(dout.dtype), dout, dv, input_precision=PRECISION).to(tl.bfloat16).to(tl.float32)",
         "_backward_queries"),
        ("key tail stored", "_inside(key, num_k,", "_inside(key, num_k + 1,"),
        ("window ends early", "beyond = key_high + WINDOW", "beyond = key_high + WINDOW - BM", "_query_range"),
        ("slots counted past the bound", "slot < bound_a", "slot <= bound_a + 40", "_count_before"),
        ("values by the keys' stride", "token[:, None] * stride_vt", "token[:, None] * stride_kt"),
        ("queries of the neighbouring sequence", "q_start = tl.load(ends_q_ptr + sequence)", "q_start = 0"),
        ("wrong sequence boundary", "(tl.cumsum(tiles, 0) <= tile)", "(tl.cumsum(tiles, 0) < tile)", "_find_tile"),
    ),
    *_bugs(
        "attention", "attention_dq", r"ragged|gqa|parallel|window|fewer|blind|scale|head 80|large|differ",
        ("dQ without the scale", "(dq * scale)", "dq"),
        ("probabilities without the scale", "* (scale * LOG2E)", "* LOG2E", "_backward_keys"),
        ("delta forgotten", " - delta[:, None])", ")", "_backward_keys"),
        ("mask forgotten", "if MASKED:", "if MASKED and WINDOW > 0:", "_backward_keys"),
        ("wrong key head", "(head // GROUP) * stride_kh", "(head % (HEADS // GROUP)) * stride_kh"),
        ("wrong value head", "(head // GROUP) * stride_vh", "0 * stride_vh"),
        ("lse in base e", "other=0.0) * LOG2E", "other=0.0)"),
        ("last block skipped", "full, high, position", "full, high - BN, position"),
        ("dQ from values", "tl.dot(dscore.to(k.dtype), k,", "tl.dot(dscore.to(k.dtype), v,", "_backward_keys"),
        ("values by the keys' stride", "stride_kt, stride_vt, low, full", "stride_kt, stride_kt, low, full"),
        ("causal mask one key late", "key <= position", "key <= position + 1", "_visible"),
        ("query tail stored", "_inside(row, num_q,", "_inside(row, num_q + 1,"),
        ("keys of the neighbouring sequence", "k_start = tl.load(ends_k_ptr + sequence)", "k_start = q_start"),
        ("wrong sequence boundary", "(tl.cumsum(tiles, 0) <= tile)", "(tl.cumsum(tiles, 0) < tile)", "_find_tile"),
        ("accumulator in bf16", "dq = tl.dot(dscore.to(k.dtype), k, dq, input_precision=PRECISION)",
         "dq = tl.dot(dscore.to(k.dtype), k, dq, input_precision=PRECISION).to(tl.bfloat16).to(tl.float32)",
         "_backward_keys"),
    ),
    *_bugs(
        "attention", "attention_delta", r"ragged|gqa|head 80",
        ("sum of the output", "tl.sum(out * dout", "tl.sum(out * out"),
        ("row and head swapped", "(row % HEADS) * num_tokens + row // HEADS", "row"),
        ("heads not separated", "(row % HEADS) * num_tokens", "0 * num_tokens"),
        ("tail not masked", "mask=row < num_rows)", "mask=row < num_rows + 1)"),
        ("head size padding read", "_inside(row, num_rows, dim, D, BD)", "_inside(row, num_rows, dim, D, D)"),
        ("in bf16", "delta = tl.sum(out * dout, 1)", "delta = tl.sum(out * dout, 1).to(tl.bfloat16).to(tl.float32)"),
        ("half of it", "tl.sum(out * dout, 1)", "tl.sum(out * dout, 1) * 0.5"),
        ("absolute values", "tl.sum(out * dout", "tl.sum(tl.abs(out * dout)"),
    ),
    *_bugs(
        "attention", "decode_split", "^decode",
        ("no scale", "num_k, scale * LOG2E", "num_k, LOG2E"),
        ("newest key not seen", "split * CHUNK + CHUNK, num_k)", "split * CHUNK + CHUNK, num_k - 1)"),
        ("wrong head of the group", "head = kv_head * GROUP + member", "head = kv_head + member * KV_HEADS"),
        ("chunk read twice", "low = split * CHUNK\n", "low = 0\n"),
        ("length ignored", "num_k = tl.minimum(tl.load(length_ptr + row), capacity).to(tl.int32)",
         "num_k = capacity"),
        ("window forgotten", "tl.maximum(low, (num_k - WINDOW) // BN * BN)", "tl.maximum(low, num_k - WINDOW + BN)"),
        ("part not normalised", "acc / tl.where(total > 0.0, total, 1.0)[:, None]", "acc"),
        ("weight of a part in base e", "highest + tl.math.log2(total)", "(highest + tl.math.log2(total)) * LN2"),
        ("padding heads stored", "mask=member < GROUP)", "mask=member >= 0)"),
        ("values of another head", "kv_head * stride_vh", "0 * stride_vh"),
        ("values by the keys' stride", "stride_ks, stride_vs, low", "stride_ks, stride_ks, low"),
        ("causal mask one key early", "seen = key < num_k", "seen = key < num_k - 1", "_visible"),
        ("sum not rescaled", "total = total * rescale", "total = total", "_forward_keys"),
        ("output not rescaled", "acc = acc * rescale[:, None]", "acc = acc", "_forward_keys"),
        ("accumulator in bf16", "acc = acc * rescale[:, None]",
         "acc = (acc * rescale[:, None]).to(tl.bfloat16).to(tl.float32)", "_forward_keys"),
    ),
    *_bugs(
        "attention", "decode_combine", "^decode",
        ("parts averaged", "part * weight[:, None]", "part"),
        ("first part only", "mask=split < num_splits, other=-float(\"inf\")", "mask=split < 1, other=-float(\"inf\")"),
        ("sum not divided", "/ tl.where(total > 0.0, total, 1.0)", ""),
        ("empty rows divide by 0", "tl.where(total > 0.0, total, 1.0)", "total"),
        ("maximum ignored for empty rows", "tl.where(highest == -float(\"inf\"), 0.0, highest)", "highest"),
        ("base e", "tl.math.exp2", "tl.math.exp"),
        ("missing parts weigh 1", "other=-float(\"inf\"))", "other=0.0)"),
        ("head size padding stored", "mask=dim < D)", "mask=dim < BD)"),
        ("sum in bf16", "part * weight[:, None]", "(part * weight[:, None]).to(tl.bfloat16).to(tl.float32)"),
        ("rows overlap", "(row * num_splits + split[:, None]) * D", "(row + split[:, None]) * D"),
    ),
    *_bugs(
        "rms_norm", "rms_norm_forward", "",
        ("eps forgotten", "/ width + eps", "/ width"),
        ("mean over the block", "/ width + eps", "/ BLOCK + eps"),
        ("mean subtracted is not RMS", "tl.sum(x * x, 1)", "tl.sum(tl.abs(x), 1)"),
        ("weight forgotten", "* weight[None, :]", ""),
        ("residual not added", "x += tl.load(residual_ptr", "x -= tl.load(residual_ptr"),
        ("sum not stored", "rounded = x.to(sum_ptr", "rounded = (x * 0.5).to(sum_ptr"),
        ("row stride ignored", "row[:, None] * stride_x", "row[:, None] * width"),
        ("tail not masked", "(row[:, None] < num_rows) & (col[None, :] < width)", "(row[:, None] < num_rows)"),
        ("rstd squared", "tl.math.rsqrt(", "1.0 / ("),
        ("square in bf16", "tl.sum(x * x, 1)", "tl.sum((x * x).to(tl.bfloat16).to(tl.float32), 1)"),
        ("one row too many", "row[:, None] < num_rows", "row[:, None] <= num_rows"),
        ("residual's stride ignored", "row[:, None] * stride_r", "row[:, None] * width"),
    ),
    *_bugs(
        "rms_norm", "rms_norm_backward", "primes|residual|many|strided",
        ("projection forgotten", "(slope - normed * mean[:, None])", "slope"),
        ("mean over the block", "tl.sum(slope * normed, 1) / width", "tl.sum(slope * normed, 1) / BLOCK"),
        ("weight left out of the slope", "slope = dy * weight[None, :]", "slope = dy"),
        ("dW without the norm", "tl.sum(dy * normed, 0)", "tl.sum(dy * x, 0)"),
        ("gradient of the sum dropped", "dx += tl.load(dsum_ptr", "dx += 0.0 * tl.load(dsum_ptr"),
        ("row stride ignored", "row[:, None] * stride_x", "row[:, None] * width"),
        ("last rows skipped", "tl.minimum(first + rows_each, num_rows)", "tl.minimum(first + rows_each, num_rows - 1)"),
        ("partials overwritten", "dweight += tl.sum", "dweight = tl.sum"),
        ("dW in bf16", "dweight += tl.sum(dy * normed, 0)",
         "dweight = (dweight + tl.sum(dy * normed, 0)).to(tl.bfloat16).to(tl.float32)"),
        ("partials of one program", "program.to(tl.int64) * width + col", "col"),
    ),
    *_bugs(
        "swiglu", "swiglu_forward", "",
        ("silu of up", "gate * tl.sigmoid(gate)", "gate * tl.sigmoid(up)"),
        ("no sigmoid", "gate * tl.sigmoid(gate) * up", "gate * up"),
        ("halves swapped", "gate * tl.sigmoid(gate) * up", "up * tl.sigmoid(up) * gate"),
        ("stride ignored", "row * stride_x + col", "row * (2 * width) + col"),
        ("second half one early", "+ width + col", "+ width - 1 + col"),
        ("tail not masked", "inside = col < width", "inside = col < width + 1"),
        ("gelu-like", "tl.sigmoid(gate)", "tl.sigmoid(1.702 * gate)"),
        ("computed in bf16", "y = gate * tl.sigmoid(gate) * up",
         "y = (gate * tl.sigmoid(gate)).to(tl.bfloat16).to(tl.float32) * up"),
    ),
    *_bugs(
        "swiglu", "swiglu_backward", "",
        ("derivative without its second term", "(1.0 + gate * (1.0 - sigmoid))", "1.0"),
        ("sign of the second term", "(1.0 + gate * (1.0 - sigmoid))", "(1.0 - gate * (1.0 - sigmoid))"),
        ("dgate without up", "dgate = dy * up * sigmoid", "dgate = dy * sigmoid"),
        ("dup without gate", "dup = dy * gate * sigmoid", "dup = dy * sigmoid"),
        ("halves of the gradient swapped", "row * (2 * width) + col, dgate", "row * (2 * width) + col, dup"),
        ("stride ignored", "row * stride_x + col", "row * (2 * width) + col"),
        ("tail not masked", "inside = col < width", "inside = col < width + 1"),
        ("dup in bf16", "dup = dy * gate * sigmoid", "dup = (dy * gate).to(tl.bfloat16).to(tl.float32) * sigmoid"),
    ),
    *_bugs(
        "rope", "rope_rotate", "",
        ("turned the other way", "* sign", "* -sign"),
        ("never turned back", "* sign", "* 1.0"),
        ("interleaved pairs", "head[:, None] * stride_xh + col[None, :]",
         "head[:, None] * stride_xh + 2 * col[None, :]"),
        ("position of the row", "position = tl.load(position_ptr + token, mask=here, other=0).to(tl.int64)",
         "position = token"),
        ("one position late", "position[:, None] * HALF", "(position[:, None] + 1) * HALF"),
        ("second half lost its sine", "second * cos + first * sin", "second * cos"),
        ("cosine of both", "first * cos - second * sin", "first * cos - second * cos"),
        ("heads and tokens swapped", "token = row // HEADS", "token = row % HEADS"),
        ("head stride ignored", "head[:, None] * stride_xh", "head[:, None] * (2 * HALF)"),
        ("padding of the half stored", "(col[None, :] < HALF)", "(col[None, :] < BLOCK)"),
    ),
    *_bugs(
        "linear_logprob", "logprob_forward", "",
        ("temperature forgotten", "acc * inverse_temperature", "acc"),
        ("temperature multiplied twice", "acc * inverse_temperature",
         "acc * inverse_temperature * inverse_temperature"),
        ("sum not rescaled", "total = total * rescale", "total = total"),
        ("padding rows counted", "real = vocab[None, :] < last", "real = vocab[None, :] < last + 1"),
        ("tail of the vocabulary as logit 0", "tl.where(real, acc * inverse_temperature, -float(\"inf\"))",
         "acc * inverse_temperature"),
        ("target one row late", "target[:, None])", "target[:, None] + 1)"),
        ("shard start ignored", "other=0) - vocab_start", "other=0)"),
        ("moment not moved with the maximum", "(moment - rise * total)", "moment"),
        ("moment not rescaled", "* rescale + gained", "+ gained"),
        ("entropy with the wrong sign", "tl.log(total) - moment / total", "tl.log(total) + moment / total"),
        ("moment not divided", "moment / total", "moment"),
        ("maximum of the last block", "highest = higher\n    place", "highest = tl.max(logit, 1)\n    place"),
        ("only the last block's sum", "tl.store(total_ptr + place, total, ",
         "tl.store(total_ptr + place, tl.sum(share, 1), "),
        ("last block of the width dropped", "tl.range(0, width, BD)", "tl.range(0, width - BD + 1, BD)", "_logits"),
        ("accumulator in bf16", "acc = tl.dot(hidden, weight.to(hidden.dtype), acc, input_precision=PRECISION)",
         "acc = tl.dot(hidden, weight.to(hidden.dtype), acc, input_precision=PRECISION).to(tl.bfloat16).to(tl.float32)",
         "_logits"),
        ("width tail not masked", "(dim[None, :] < left)", "(dim[None, :] >= 0)", "_logits"),
        ("weight's stride ignored", "stride_h, stride_w, BT", "stride_h, width, BT"),
    ),
    *_bugs(
        "linear_logprob", "logprob_dlogits", "odd|temperature|masked|shard|no entropy",
        ("target's gradient dropped", "dlogit += tl.where", "dlogit += 0.0 * tl.where"),
        ("target one row late", "vocab[None, :] == target[:, None]", "vocab[None, :] == target[:, None] + 1"),
        ("temperature forgotten in the logit", "logit = acc * inverse_temperature", "logit = acc"),
        ("temperature forgotten in the gradient", "dlogit *= inverse_temperature", "dlogit *= 1.0"),
        ("entropy's sign", "slope - dspread[:, None]", "slope + dspread[:, None]"),
        ("entropy without H", "(logit - lse[:, None] + spread[:, None])", "(logit - lse[:, None])"),
        ("shard start ignored", "other=0) - vocab_start", "other=0)"),
        ("padding rows stored", "(column[None, :] < stride_d)", "(column[None, :] < stride_d + 1)"),
        ("mask ignored", "tl.where(kept[:, None], dlogit, 0.0)", "dlogit"),
        ("probabilities not normalised", "tl.exp(logit - lse[:, None])", "tl.exp(logit)"),
        ("row stride of the buffer", "token.to(tl.int64)[:, None] * stride_d", "token.to(tl.int64)[:, None] * width"),
        ("every chunk is the first", "vocab = first_row + column", "vocab = column"),
        ("weight's stride ignored", "stride_h, stride_w, BT", "stride_h, width, BT"),
        ("accumulator in bf16", "acc = tl.dot(hidden, weight.to(hidden.dtype), acc, input_precision=PRECISION)",
         "acc = tl.dot(hidden, weight.to(hidden.dtype), acc, input_precision=PRECISION).to(tl.bfloat16).to(tl.float32)",
         "_logits"),
    ),
    *_bugs(
        "reward_head", "reward_head_forward", "norm|bias",
        ("first token instead of last", "last = tl.load(last_ptr + row).to(tl.int64)",
         "last = tl.load(last_ptr + row).to(tl.int64) * 0"),
        ("bias forgotten", "score += tl.load(bias_ptr)", "score += 0.0 * tl.load(bias_ptr)"),
        ("norm weight forgotten", "weight *= tl.load(norm_ptr", "weight += 0.0 * tl.load(norm_ptr"),
        ("norm forgotten", "score *= rstd", "score *= 1.0"),
        ("eps forgotten", "/ width + eps", "/ width"),
        ("absent rows keep the bias", "tl.where(here, score, 0.0)", "score"),
        ("tail not masked", "inside = col < width", "inside = col < width + 1"),
        ("only the last block", "dot += x * weight", "dot = x * weight"),
        ("mean over the block", "tl.sum(square, 0) / width", "tl.sum(square, 0) / BLOCK"),
        ("stride ignored", "last * stride_h", "last * width"),
        ("sum in bf16", "dot += x * weight", "dot = (dot + x * weight).to(tl.bfloat16).to(tl.float32)"),
    ),
    *_bugs(
        "reward_head", "reward_head_backward", "norm|bias",
        ("projection forgotten", "(norm * weight - normed * mean)", "(norm * weight)"),
        ("bias left in the mean", "(tl.load(score_ptr + row) - bias) / width", "tl.load(score_ptr + row) / width"),
        ("dW without the norm weight", "dweight += dscore * normed * norm", "dweight += dscore * normed"),
        ("dnorm without the weight", "dnorm += dscore * normed * weight", "dnorm += dscore * normed"),
        ("absent rows count", "tl.where(here, tl.load(dscore_ptr + row).to(tl.float32), 0.0)",
         "tl.load(dscore_ptr + row).to(tl.float32)"),
        ("gradient at the wrong token", "dhidden_ptr + last * width", "dhidden_ptr + (last + 1) * width"),
        ("rstd forgotten", "dx = dscore * rstd * ", "dx = dscore * "),
        ("bias gradient of the last row", "dbias += dscore", "dbias = dscore"),
        ("dW of the last row", "dweight += dscore * normed * norm", "dweight = dscore * normed * norm"),
        ("stride ignored", "last * stride_h", "last * width"),
        ("tail not masked", "inside = col < width", "inside = col < width + 1"),
        ("dW in bf16", "dweight += dscore * normed * norm",
         "dweight = (dweight + dscore * normed * norm).to(tl.bfloat16).to(tl.float32)"),
    ),
    *_bugs(
        "reward_head", "ranking_forward", "groups|margin|summed|list",
        ("ties count", "rank_i[:, None] < rank_j[None, :]", "rank_i[:, None] <= rank_j[None, :]"),
        ("groups mixed", "same = (group_i[:, None] == group_j[None, :])",
         "same = (group_i[:, None] == group_i[:, None])"),
        ("best and worst swapped", "gap = score_i[:, None] - score_j[None, :]",
         "gap = score_j[None, :] - score_i[:, None]"),
        ("margin's sign", "_softplus(asked - gap)", "_softplus(-asked - gap)"),
        ("margin of one step for all", "(rank_j[None, :] - rank_i[:, None]).to(tl.float32)",
         "(rank_j[None, :] > rank_i[:, None]).to(tl.float32)"),
        ("divided by the row's pairs", "tl.maximum(of_group, 1)", "tl.maximum(pairs, 1)"),
        ("centering without the square", "centering * mean * mean", "centering * mean"),
        ("centering not shared", "mean * mean / members", "mean * mean"),
        ("softplus of large numbers", "tl.maximum(x, 0.0)", "0.0", "_softplus"),
        ("softplus of small numbers", "tl.maximum(x, 0.0) + log1p", "tl.maximum(x, 0.0) + tl.log(above)", "_softplus"),
        ("loss in bf16", "loss = loss * share", "loss = (loss * share).to(tl.bfloat16).to(tl.float32)"),
        ("correct counts ties in score", "(gap > 0.0)", "(gap > -100.0)"),
        ("rows of the tail counted", "& inside[:, None] & there[None, :]", "& inside[:, None]"),
    ),
    *_bugs(
        "reward_head", "ranking_backward", "groups|margin|summed|list",
        ("only the better row learns", "tl.where(worse, rises, 0.0)", "0.0 * tl.where(worse, rises, 0.0)"),
        ("only the worse row learns", "tl.where(better, falls, 0.0)", "0.0 * tl.where(better, falls, 0.0)"),
        ("sign", "tl.where(worse, rises, 0.0) - tl.where(better, falls, 0.0)",
         "tl.where(better, falls, 0.0) - tl.where(worse, rises, 0.0)"),
        ("own gradient for the pair of another", "* dloss_j[None, :]\n", "* dloss_i[:, None]\n"),
        ("margin forgotten", "tl.sigmoid(asked - gap)", "tl.sigmoid(-gap)"),
        ("pairs not averaged", ", 1) * share", ", 1)"),
        ("centering dropped", ", 1) * pull", ", 1) * 0.0"),
        ("centering's gradient of one row", "tl.where(same, dloss_j[None, :], 0.0), 1) * pull",
         "tl.where(same, dloss_i[:, None], 0.0), 1) * pull"),
        ("ties pull", "rank_i[:, None] > rank_j[None, :]", "rank_i[:, None] >= rank_j[None, :]"),
        ("tail stored", "dscore_ptr + i, dscore, mask=inside", "dscore_ptr + i, dscore, mask=i >= 0"),
        ("gradient in bf16", "dscore += tl.sum(tl.where(same",
         "dscore = dscore.to(tl.bfloat16).to(tl.float32) + tl.sum(tl.where(same"),
    ),
    *_bugs(
        "value_head", "value_head_forward", "",
        ("bias forgotten", "value += tl.load(bias_ptr)", "value += 0.0 * tl.load(bias_ptr)"),
        ("only the last block", "total += hidden", "total = hidden"),
        ("stride ignored", "token[:, None] * stride_h", "token[:, None] * width"),
        ("tail not masked", "inside = here[:, None] & (col[None, :] < width)",
         "inside = here[:, None] & (col[None, :] >= 0)"),
        ("clip around the return", "old - clip), old + clip", "target - clip), target + clip"),
        ("smaller of the two losses", "tl.maximum(loss, other)", "tl.minimum(loss, other)"),
        ("clip on one side", "tl.maximum(value, old - clip)", "value"),
        ("mask ignored in the loss", "loss = tl.where(kept, loss, 0.0)", "loss = loss"),
        ("not halved", "0.5 * loss", "loss"),
        ("clipped reported for masked tokens", "clipped = clipped & kept", "clipped = clipped"),
        ("sum in bf16", "value = tl.sum(total, 1)", "value = tl.sum(total.to(tl.bfloat16).to(tl.float32), 1)"),
    ),
    *_bugs(
        "value_head", "value_head_backward", "",
        ("clipped tokens learn", "tl.where(clipped, 0.0, dvalue * error)", "dvalue * error"),
        ("masked tokens learn", "!= 0, dvalue, 0.0)", "!= 2, dvalue, 0.0)"),
        ("error forgotten", "dvalue * error", "dvalue"),
        ("sign of the error", "dvalue * error", "-dvalue * error"),
        ("dW of the last tokens", "dweight += tl.sum", "dweight = tl.sum"),
        ("bias gradient of the last tokens", "dbias += dvalue", "dbias = dvalue"),
        ("parts overwrite one another", "part.to(tl.int64) * width + col", "col"),
        ("last token skipped", "tl.minimum(first + tokens_each, num_tokens)",
         "tl.minimum(first + tokens_each, num_tokens - 1)"),
        ("stride ignored", "token[:, None] * stride_h", "token[:, None] * width"),
        ("weight forgotten", "dvalue[:, None] * weight[None, :]", "dvalue[:, None] + 0.0 * weight[None, :]"),
        ("tail not masked", "inside = here[:, None] & (col[None, :] < width)",
         "inside = here[:, None] & (col[None, :] >= 0)"),
        ("dW in bf16", "dweight += tl.sum(hidden.to(tl.float32) * dvalue[:, None], 0)",
         "dweight = (dweight + tl.sum(hidden.to(tl.float32) * dvalue[:, None], 0)).to(tl.bfloat16).to(tl.float32)"),
    ),
    *_bugs(
        "gae", "gae_scan", "",
        ("gamma forgotten", "gamma * after", "after"),
        ("lambda forgotten", "(gamma * lam)", "gamma"),
        ("value not subtracted", "+ gamma * after - value", "+ gamma * after"),
        ("carry dropped between blocks", "scale * carry + shift", "shift"),
        ("carry of the wrong end", "tl.arange(0, BLOCK) == 0", "tl.arange(0, BLOCK) == BLOCK - 1"),
        ("neighbour row's value after the end", "mask=t + 1 < length", "mask=t < length"),
        ("bootstrap ignored", "tl.where(t + 1 == length, last_value, after)", "after"),
        ("scanned forwards", "reverse=True", "reverse=False"),
        ("returns without the value", "advantage + value", "advantage"),
        ("blocks in order of time", "(num_blocks - 1 - block) * BLOCK", "block * BLOCK"),
        ("composition reversed", "scale_b * shift_a + shift_b", "scale_a * shift_b + shift_a", "_then"),
        ("tail not masked", "inside = t < length", "inside = t < length + 1"),
        ("carry in bf16", "scale * carry + shift", "scale * carry.to(tl.bfloat16).to(tl.float32) + shift"),
    ),
    # What the function around a kernel does for it: strides, bounds of the grid, sums of partials.
    *_bugs(
        "attention", "attention_forward", "layouts|twenty|unknown|whole|precise",
        ("keys taken as strided as they come", "_unit(q), _unit(k), _unit(v)", "_unit(q), k, _unit(v)", "forward"),
        ("values taken as strided as they come", "_unit(q), _unit(k), _unit(v)", "_unit(q), _unit(k), v", "forward"),
        ("slots not contiguous", "slots.contiguous()", "slots", "forward"),
        ("sixteen sequences at most", "max(16, triton.next_power_of_2(cu_q.shape[0] - 1))", "16", "_meta"),
        ("grid without a tile a sequence", "triton.cdiv(total, block) + num_sequences", "triton.cdiv(total, block)",
         "_num_tiles"),
        ("idle programs go on", "    if sequence >= num_sequences:\n        return\n", ""),
        ("ends of no sequence read", "mask=known, other=0)\n    tiles", "mask=known)\n    tiles", "_find_tile"),
        ("scores in bf16", "input_precision=PRECISION) * scale",
         "input_precision=PRECISION).to(tl.bfloat16).to(tl.float32) * scale", "_forward_keys"),
        ("padding of the head size read", "v = tl.load(v_place, mask=dim[None, :] < D, other=0.0)",
         "v = tl.load(v_place)", "_forward_keys"),
    ),
    *_bugs(
        "attention", "attention_dkdv", "layouts|many slots|unknown|fewer",
        ("keys and values taken as strided as they come", "_unit(q), _unit(k), _unit(v)", "_unit(q), k, v", "backward"),
        ("mask off by one query", "key_high - shift, 0)", "key_high - shift - 1, 0)", "_query_range"),
        ("slots of the first chunk counted", "tl.range(0, num_q, CHUNK)",
         "tl.range(0, tl.minimum(num_q, CHUNK), CHUNK)", "_count_before"),
        ("idle programs go on", "    if sequence >= num_sequences:\n        return\n", ""),
    ),
    *_bugs(
        "attention", "attention_dq", "unknown",
        ("idle programs go on", "    if sequence >= num_sequences:\n        return\n", ""),
    ),
    *_bugs(
        "attention", "decode_split", "^decode",
        ("queries taken as strided as they come", "_unit(q), _unit(k_cache)", "q, _unit(k_cache)", "decode"),
        ("lengths not contiguous", "lengths.contiguous()", "lengths", "decode"),
        ("sixteen heads of the group at most", "MEMBERS=max(16, triton.next_power_of_2(heads // kv_heads))",
         "MEMBERS=16", "decode"),
        ("next row's cache read", "tl.minimum(tl.load(length_ptr + row), capacity)", "tl.load(length_ptr + row)"),
    ),
    *_bugs(
        "attention", "decode_combine", "^decode",
        ("four splits at most", "triton.next_power_of_2(splits)", "min(4, triton.next_power_of_2(splits))", "decode"),
    ),
    *_bugs(
        "attention/dense", "attention_forward_dense", "^dense",
        ("any alignment taken", "aligned and sized", "sized", "_takes"),
    ),
    *_bugs(
        "attention/dense", "attention_forward_specialized", "^specialized|tail",
        ("heads apart taken", "known and together and whole", "known and whole", "form_of"),
        ("a tail in the next row taken", "known and together and whole", "known and together", "form_of"),
    ),
    *_bugs(
        "rms_norm", "rms_norm_forward", "layouts",
        ("x taken as strided as it comes", "flat if flat.stride(1) == 1 else flat.contiguous()", "flat", "rows_of"),
        ("weight not contiguous", "flat, other, weight.contiguous()", "flat, other, weight", "forward"),
    ),
    *_bugs(
        "rms_norm", "rms_norm_backward", "layouts|difference",
        ("dy not contiguous", "dy = dy.contiguous()", "dy = dy", "backward"),
        ("dsum not contiguous", "dsum.contiguous()", "dsum", "backward"),
        ("weight not contiguous", "flat, weight.contiguous()", "flat, weight", "backward"),
        ("partials summed in bf16", "partial.sum(0).to(weight.dtype)", "partial.to(weight.dtype).sum(0)", "backward"),
        ("normalised input in bf16", "normed = x * rstd[:, None]",
         "normed = (x * rstd[:, None]).to(tl.bfloat16).to(tl.float32)"),
    ),
    *_bugs(
        "swiglu", "swiglu_forward", "layouts",
        ("x taken as strided as it comes", "flat if flat.stride(1) == 1 else flat.contiguous()", "flat", "_rows"),
    ),
    *_bugs(
        "swiglu", "swiglu_backward", "layouts|large",
        ("dy not contiguous", "dy.contiguous()", "dy", "backward"),
        ("sigmoid of large numbers", "tl.sigmoid(gate)", "tl.exp(gate) / (1.0 + tl.exp(gate))"),
    ),
    *_bugs(
        "rope", "rope_rotate", "layouts|head 64",
        ("x taken as strided as it comes", "x_THD if x_THD.stride(2) == 1 else x_THD.contiguous()", "x_THD",
         "rotate_into"),
        ("cosines not contiguous", "cos_PF.contiguous()", "cos_PF", "rotate_into"),
        ("positions not contiguous", "positions_T.contiguous()", "positions_T", "rotate_into"),
        ("positions of one byte", "other=0).to(tl.int64)", "other=0).to(tl.int8).to(tl.int64)"),
    ),
    *_bugs(
        "linear_logprob", "logprob_forward", "layouts",
        ("hidden and weight taken as strided as they come", "x if x.stride(1) == 1 else x.contiguous()", "x", "_rows"),
        ("targets not contiguous", "targets.contiguous()", "targets", "forward"),
    ),
    *_bugs(
        "linear_logprob", "logprob_dlogits", "layouts|chunks|large",
        ("targets not contiguous", "targets.contiguous()", "targets", "backward"),
        ("mask not contiguous", "mask.contiguous()", "mask", "backward"),
        ("gradient of hidden in bf16 between chunks", "dhidden = torch.zeros((num_tokens, width), dtype=torch.float32",
         "dhidden = torch.zeros((num_tokens, width), dtype=hidden.dtype", "backward"),
        ("gradient of hidden of the last chunk", "dhidden += torch.mm", "dhidden = torch.mm", "backward"),
        ("probabilities capped", "tl.exp(logit - lse[:, None])", "tl.exp(tl.minimum(logit - lse[:, None], -0.5))"),
    ),
    *_bugs(
        "reward_head", "reward_head_forward", "layouts,|many rows",
        ("hidden taken as strided as it comes", "hidden if hidden.stride(1) == 1 else hidden.contiguous()", "hidden",
         "_rows"),
        ("weight not contiguous", "weight.contiguous()", "weight", "forward"),
        ("last tokens not contiguous", "last.contiguous()", "last", "forward"),
        ("last token of one byte", "tl.load(last_ptr + row).to(tl.int64)",
         "tl.load(last_ptr + row).to(tl.int8).to(tl.int64)"),
    ),
    *_bugs(
        "reward_head", "reward_head_backward", "layouts,",
        ("dscores not contiguous", "dscores.contiguous()", "dscores", "backward"),
    ),
    *_bugs(
        "reward_head", "ranking_forward", "groups",
        ("groups and ranks not contiguous", "groups.contiguous(), ranks.contiguous()", "groups, ranks", "ranking"),
        ("groups of 32 bits", "group_i = tl.load(group_ptr + i, mask=inside, other=0)",
         "group_i = tl.load(group_ptr + i, mask=inside, other=0).to(tl.int32)"),
    ),
    *_bugs(
        "reward_head", "ranking_backward", "groups",
        ("dloss not contiguous", "dloss.contiguous()", "dloss", "ranking_gradient"),
    ),
    *_bugs(
        "value_head", "value_head_forward", "layouts",
        ("hidden taken as strided as it comes", "hidden if hidden.stride(1) == 1 else hidden.contiguous()", "hidden",
         "_rows"),
        ("old values not contiguous", "old.contiguous()", "old", "forward"),
        ("mask not contiguous", "mask.contiguous()", "mask", "forward"),
    ),
    *_bugs(
        "value_head", "value_head_backward", "layouts|difference",
        ("returns not contiguous", "returns.contiguous()", "returns", "backward"),
        ("error in bf16", "dvalue * error", "dvalue * error.to(tl.bfloat16).to(tl.float32)"),
        ("dW summed in bf16", "dweight.sum(0).to(weight.dtype)", "dweight.to(weight.dtype).sum(0)", "backward"),
    ),
    *_bugs(
        "gae", "gae_scan", "layouts",
        ("rewards not contiguous", "rewards_T.contiguous()", "rewards_T", "forward"),
        ("bootstrap not contiguous", "bootstrap_R.contiguous()", "bootstrap_R", "forward"),
        ("ends not contiguous", ").contiguous(),\n        values_T if", "),\n        values_T if", "forward"),
    ),
]  # fmt: skip


@contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """The op runs a copy of its Triton module with the bug in it."""
    op, _, name = bug.op.partition("/")
    module = f"kernels.{op}.{name or 'triton'}"
    importlib.import_module(f"kernels.{op}.triton")  # who imports the mutant first would keep it
    healthy = importlib.import_module(module)
    source = Path(str(healthy.__file__)).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        path = Path(folder) / "triton.py"
        path.write_text(edited(source, bug), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(module, path)
        assert spec is not None
        assert spec.loader is not None
        mutant = importlib.util.module_from_spec(spec)
        users = [
            (user, attribute)
            for key, user in sys.modules.items()
            if key.startswith("kernels.")
            for attribute, value in list(vars(user).items())
            if value is healthy
        ]
        try:
            sys.modules[module] = mutant
            spec.loader.exec_module(mutant)
            for user, attribute in users:
                setattr(user, attribute, mutant)
            yield
        finally:
            sys.modules[module] = healthy
            for user, attribute in users:
                setattr(user, attribute, healthy)


def edited(source: str, bug: Bug) -> str:
    """The source with the bug in it; an error where the text is not in the function."""
    start = source.index(f"\ndef {bug.function}(")
    following = re.search(r"\n(?:@triton\.jit|def )", source[start + 1 :])
    end = start + 1 + following.start() if following else len(source)
    body = source[start:end]
    if bug.old not in body:
        raise LookupError(f"{bug.op}/{bug.function}: {bug.old!r} is no longer there; update the bug {bug.name!r}")
    return source[:start] + body.replace(bug.old, bug.new, 1) + source[end:]


def killer(bug: Bug) -> str | None:
    """The case that notices the bug, with what it said; None where none does."""
    with planted(bug):
        for case, proof in CATALOGUE[bug.op.partition("/")[0]].items():
            if not re.search(bug.cases, case):
                continue
            try:
                proof()
            except AssertionError as error:
                return f"{case}: {error}"
            except InterpreterError as error:
                if "KernelFault" not in str(error):
                    raise
                return f"{case}: {error}"
    return None
