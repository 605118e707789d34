"""Prompts in, samples out: continuous batching over the engine's decoder."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_zj.config.sampling import SamplingConfig
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.engine.decode import Decoder
from megatron_zj.engine.engine import Engine
from megatron_zj.rollout.sampling import draw, penalize_repetition, sample_noise
from megatron_zj.rollout.scheduler import Sample, Scheduler
from megatron_zj.rollout.stop_text import Decode, StopText

logger = logging.getLogger(__name__)


class Rollout:
    """How a run draws samples; ``at_step`` gives the function that a role applies to a shard's prompts."""

    def __init__(
        self, sampling: SamplingConfig, stop_ids: frozenset[int], seed: int, decode: Decode | None = None
    ) -> None:
        """``decode``: token ids to text; stop strings need it."""
        self.sampling = sampling
        self.stop_ids = stop_ids
        self.seed = seed
        self.decode = decode

    @property
    def temperature(self) -> float:
        """Of the distribution whose log-probabilities are kept: the sampling one, 1 when greedy."""
        return self.sampling.temperature or 1.0

    def at_step(self, step: int) -> Callable[[Engine, Batch], Batch]:
        """A function of an engine and its shard's prompts; noise is keyed by ``step`` and the rows' ``sample_id``."""
        return lambda engine, prompts: generate(
            engine, prompts, self.sampling, stop_ids=self.stop_ids, seed=self.seed, step=step, decode=self.decode
        )


@torch.no_grad()
def generate(
    engine: Engine,
    prompts: Batch,
    sampling: SamplingConfig,
    *,
    stop_ids: frozenset[int],
    seed: int,
    step: int = 0,
    decode: Decode | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Batch:
    """Extend every prompt until a stop token, a stop string or ``max_new_tokens``.

    Collective over the shard's model replica.  ``prompts``: rows with ``sample_id``.  ``decode``: token ids to text.
    Returns prompts + responses in the same order with per-token ``response_mask`` (int64 0/1, the stop token or
    string included) and ``sampling_logprobs`` (float32, 0 on the prompt), and per-row ``sample_id``,
    ``prompt_length`` and ``truncated`` (1: ended without a stop token or string).
    Raises ValueError for an empty prompt, one that leaves no room within the model's positions, or stop strings
    without ``decode``.
    """
    samples = _samples(engine, prompts, sampling, seed, step)
    if not samples:
        return _collect(prompts, [])
    _watch_text(samples, sampling, decode)
    slots = min(sampling.max_batch_rows, len(samples))
    scheduler = Scheduler(samples, slots)
    longest = max(len(s.prompt) + s.limit for s in samples)
    decoder = Decoder(engine, max_rows=slots, max_tokens=longest, graphs=sampling.cuda_graphs)
    if step == 0 and decoder.device.type == "cuda" and decoder.why_eager is not None:
        logger.info("decoding without CUDA graphs: %s", decoder.why_eager)
    seen = _Seen(slots, engine.model.vocab_size, sampling.repetition_penalty)
    with decoder.session():
        while True:
            coming = scheduler.admit()
            if coming:
                first = len(scheduler.active) - len(coming)
                logits = decoder.prefill(list(range(first, len(scheduler.active))), [s.prompt for s in coming])
                seen.admit(first, [s.prompt for s in coming])
                _draw(decoder, scheduler, logits, sampling, stop_ids, seen, first)
            elif scheduler.active:
                logits = decoder.decode(torch.tensor([s.tokens[-1] for s in scheduler.active]))
                _draw(decoder, scheduler, logits, sampling, stop_ids, seen, 0)
            else:
                break
            for source, target in scheduler.retire():
                decoder.move(source, target)
                seen.move(source, target)
            decoder.truncate(len(scheduler.active))
            if on_progress is not None:
                on_progress(len(scheduler.finished))
    return _collect(prompts, sorted(scheduler.finished, key=lambda sample: sample.row))


class _Seen:
    """Tokens each slot has had, kept only where a repetition penalty needs them."""

    def __init__(self, slots: int, vocab: int, penalty: float) -> None:
        self._penalty = penalty
        self._seen_BV = torch.zeros((slots, vocab), dtype=torch.bool) if penalty != 1.0 else None

    def admit(self, first: int, prompts: list[Tensor]) -> None:
        if self._seen_BV is not None:
            for slot, prompt in enumerate(prompts, start=first):
                self._seen_BV[slot] = False
                self._seen_BV[slot, prompt] = True

    def add(self, first: int, tokens: list[int]) -> None:
        if self._seen_BV is not None:
            self._seen_BV[torch.arange(first, first + len(tokens)), torch.tensor(tokens)] = True

    def move(self, source: int, target: int) -> None:
        if self._seen_BV is not None:
            self._seen_BV[target] = self._seen_BV[source]

    def apply(self, logits_BV: Tensor, first: int) -> Tensor:
        if self._seen_BV is None:
            return logits_BV
        seen = self._seen_BV[first : first + len(logits_BV)].to(logits_BV.device)
        return penalize_repetition(logits_BV, seen, self._penalty)


def _samples(engine: Engine, prompts: Batch, sampling: SamplingConfig, seed: int, step: int) -> list[Sample]:
    room = engine.model.max_position_embeddings
    samples = []
    for row, (prompt, sample_id) in enumerate(
        zip(prompts.tokens.split(), prompts.per_row["sample_id"].tolist(), strict=True)
    ):
        if len(prompt) == 0:
            raise ValueError(f"prompt {sample_id} is empty; a prompt needs at least one token")
        limit = min(sampling.max_new_tokens, room - len(prompt))
        if limit < 1:
            raise ValueError(
                f"prompt {sample_id} has {len(prompt)} tokens, the model has {room} positions: no room for a response; "
                "lower data.max_length or raise model.max_position_embeddings"
            )
        noise = sample_noise(seed, step, int(sample_id), sampling.max_new_tokens)
        samples.append(Sample(row, prompt, noise, limit))
    return samples


def _watch_text(samples: list[Sample], sampling: SamplingConfig, decode: Decode | None) -> None:
    if not sampling.stop_strings:
        return
    if decode is None:
        raise ValueError("stop_strings need a tokenizer: give the rollout its ``decode``")
    for sample in samples:
        sample.stop_text = StopText(sampling.stop_strings, decode, sampling.min_new_tokens)


def _draw(
    decoder: Decoder,
    scheduler: Scheduler,
    logits_BV: Tensor | None,
    sampling: SamplingConfig,
    stop_ids: frozenset[int],
    seen: _Seen,
    first: int,
) -> None:
    """Draw for slots ``first`` and up, where the logits are, and tell every stage."""
    active = scheduler.active[first:]
    drawn = None
    if logits_BV is not None:
        logits_BV = seen.apply(logits_BV, first)
        early = [at for at, sample in enumerate(active) if len(sample.tokens) < sampling.min_new_tokens]
        if early and stop_ids:
            logits_BV = logits_BV.clone()
            logits_BV[torch.tensor(early)[:, None], torch.tensor(sorted(stop_ids))] = float("-inf")
        noise = torch.stack([sample.noise[len(sample.tokens)] for sample in active])
        drawn = draw(logits_BV, noise, sampling)
    tokens, logprobs = decoder.tell(drawn, len(active))
    seen.add(first, tokens)
    for sample, token, logprob in zip(active, tokens, logprobs, strict=True):
        sample.record(token, logprob, stop_ids)


def _collect(prompts: Batch, samples: list[Sample]) -> Batch:
    tokens, mask, logprobs = [], [], []
    for sample in samples:
        response, before = torch.tensor(sample.tokens, dtype=torch.int64), len(sample.prompt)
        tokens.append(torch.cat([sample.prompt.cpu(), response]))
        mask.append(torch.cat([torch.zeros(before, dtype=torch.int64), torch.ones_like(response)]))
        logprobs.append(torch.cat([torch.zeros(before), torch.tensor(sample.logprobs, dtype=torch.float32)]))
    return Batch(
        Rows.of(tokens, torch.int64),
        {"response_mask": Rows.of(mask, torch.int64), "sampling_logprobs": Rows.of(logprobs, torch.float32)},
        {
            "sample_id": prompts.per_row["sample_id"].cpu(),
            "prompt_length": torch.tensor([len(s.prompt) for s in samples], dtype=torch.int64),
            "truncated": torch.tensor([int(not s.stopped) for s in samples], dtype=torch.int64),
        },
    )
