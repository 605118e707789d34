"""Generation equals an uncached, unbatched reference token for token, in every layout."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_zj.config.algorithm import SamplingConfig
from megatron_zj.config.model import ModelConfig
from megatron_zj.config.optim import EngineConfig
from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.engine.build import build_engine
from megatron_zj.models.canonical import read_stage
from megatron_zj.roles.exchange import Exchange
from megatron_zj.roles.placement import ALL, build_placements
from megatron_zj.roles.role import Role
from megatron_zj.roles.world import World, WorldBatch, gather_in_order
from megatron_zj.rollout.generate import Rollout
from megatron_zj.rollout.sampling import draw, sample_noise
from tests.helpers.ranks import run_ranks
from tests.helpers.reference_llama import ReferenceLlama

MODEL = ModelConfig(
    vocab_size=90,
    hidden_size=48,
    ffn_hidden_size=64,
    num_layers=4,
    num_attention_heads=4,
    num_query_groups=2,
    max_position_embeddings=64,
    init_std=0.15,  # large enough that the next token is not nearly uniform
    vocab_multiple=16,
)
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [30, 31], [60, 61, 62, 63, 64]]
STOP, SEED = 3, 11
SAMPLED = SamplingConfig(max_new_tokens=14, temperature=0.8, top_p=0.9, top_k=40, max_batch_rows=3)
GREEDY = SamplingConfig(max_new_tokens=10, temperature=0.0, min_new_tokens=4, max_batch_rows=2)
PENALISED = SamplingConfig(max_new_tokens=8, temperature=1.0, repetition_penalty=1.5)

Answer = tuple[list[int], list[float], int]


def _role(model: ModelConfig, parallel: ParallelConfig) -> Role:
    placement = build_placements(parallel, {}, {ALL}, World.current().size, 60)[ALL]
    assert placement.groups is not None
    device = torch.device("cpu")
    engine = build_engine(model, "lm", placement.groups, EngineConfig(), None, 1, device, SEED)
    return Role("actor", placement, engine, Exchange())


def _generate(model: ModelConfig, parallel: ParallelConfig, configs: list[SamplingConfig]) -> list[list[Answer]]:
    role, world = _role(model, parallel), World.current()
    ids = list(range(len(PROMPTS)))[world.rank :: world.size]  # not in rank order
    local = Batch(Rows.of([PROMPTS[i] for i in ids], torch.int64), {}, {"sample_id": torch.tensor(ids)})
    answers = []
    for config in configs:
        rollout = Rollout(config, frozenset({STOP}), SEED)
        samples = role.generate(rollout.at_step(2), WorldBatch.gather(local)).local
        starts = samples.per_row["prompt_length"].tolist()
        mine = []
        for at, row in enumerate(samples.tokens.split()):
            mask = samples.per_token["response_mask"].split()[at]
            assert mask.tolist() == [0] * starts[at] + [1] * (len(row) - starts[at])
            assert row[: starts[at]].tolist() == PROMPTS[ids[at]]
            logprobs = samples.per_token["sampling_logprobs"].split()[at][starts[at] :].tolist()
            truncated = int(samples.per_row["truncated"][at])
            mine.append((int(samples.per_row["sample_id"][at]), row[starts[at] :].tolist(), logprobs, truncated))
        answers.append([tuple(entry[1:]) for entry in sorted(gather_in_order(mine))])
    return answers


def _weights(model: ModelConfig) -> dict[str, torch.Tensor]:
    engine = _role(model, ParallelConfig()).engine
    assert engine is not None
    return {name: value.detach().clone() for name, value in read_stage(engine.chunks, engine.groups).items()}


def _reference(llama: ReferenceLlama, config: SamplingConfig) -> list[Answer]:
    answers = []
    for sample_id, prompt in enumerate(PROMPTS):
        noise = sample_noise(SEED, 2, sample_id, config.max_new_tokens)
        tokens, found, logprobs = list(prompt), [], []
        while len(found) < config.max_new_tokens and (not found or found[-1] != STOP):
            logits = llama.logits(torch.tensor(tokens))[-1:, : MODEL.vocab_size].float()
            if config.repetition_penalty != 1.0:
                seen = torch.zeros_like(logits, dtype=torch.bool)
                seen[0, tokens] = True
                scaled = torch.where(logits > 0, logits / config.repetition_penalty, logits * config.repetition_penalty)
                logits = torch.where(seen, scaled, logits)
            if len(found) < config.min_new_tokens:
                logits[0, STOP] = float("-inf")
            token, logprob = draw(logits, noise[len(found) : len(found) + 1], config)
            found.append(int(token))
            tokens.append(int(token))
            logprobs.append(float(logprob))
        answers.append((found, logprobs, int(found[-1] != STOP)))
    return answers


def _check(found: list[Answer], expected: list[Answer]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert mine[0] == theirs[0]
        assert mine[1] == pytest.approx(theirs[1], abs=2e-5)
        assert mine[2] == theirs[2]


LAYOUTS = {
    "one rank": (1, ParallelConfig()),
    "tp2 sp": (2, ParallelConfig(tp=2, sequence_parallel=True)),
    "pp2": (2, ParallelConfig(pp=2)),
    "dp2": (2, ParallelConfig()),
    "tp2 pp2 vpp2": (4, ParallelConfig(tp=2, pp=2, vpp=2)),
    "cp2 dp2": (4, ParallelConfig(cp=2)),
}


@pytest.fixture(scope="module")
def expected() -> list[list[Answer]]:
    weights = run_ranks(1, _weights, MODEL)[0]
    llama = ReferenceLlama(MODEL, "lm", state=weights, dtype=torch.float32)
    with torch.no_grad():
        answers = [_reference(llama, config) for config in (SAMPLED, GREEDY, PENALISED)]
    ends = [answer[2] for some in answers for answer in some]
    assert 0 < sum(ends) < len(ends)  # the test has both truncated and stopped answers
    return answers


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_equal_the_uncached_reference(layout: str, expected: list[list[Answer]]) -> None:
    world, parallel = LAYOUTS[layout]
    for answers in run_ranks(world, _generate, MODEL, parallel, [SAMPLED, GREEDY, PENALISED]):
        for found, wanted in zip(answers, expected, strict=True):
            _check(found, wanted)


def test_tied_embeddings_decode_with_the_embedding() -> None:
    model = dataclasses.replace(MODEL, tie_embeddings=True)
    weights = run_ranks(1, _weights, model)[0]
    with torch.no_grad():
        wanted = _reference(ReferenceLlama(model, "lm", state=weights, dtype=torch.float32), SAMPLED)
    for world, parallel in ((1, ParallelConfig()), (2, ParallelConfig(pp=2))):
        _check(run_ranks(world, _generate, model, parallel, [SAMPLED])[0][0], wanted)


def _too_long() -> str:
    model = dataclasses.replace(MODEL, max_position_embeddings=8)
    try:
        _generate(model, ParallelConfig(), [SAMPLED])
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_prompt_without_room_is_refused_by_number() -> None:
    assert "prompt 2 has 11 tokens, the model has 8 positions" in run_ranks(1, _too_long)[0]
