"""What goes wrong in a run ends in a message that says what to change, or in what the page on RLHF says.

Lost and hanging ranks: tests/roles/test_overlap.py.  Scores that are no numbers: test_options.py.  Another tokenizer,
and a head that nobody trained: tests/train/test_resume.py.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_zj.algorithms.rejection import BestOfAll
from megatron_zj.algorithms.shaping import ScoreError
from megatron_zj.engine.totals import NonFiniteError
from megatron_zj.roles.exchange import Pending
from megatron_zj.roles.world import World
from megatron_zj.runtime.timers import Timers
from tests.algorithms import ppo_world
from tests.algorithms.layouts import Layout
from tests.algorithms.sampling_world import BEST_OF_ALL, Dialogues
from tests.helpers.ranks import run_ranks

ONE_TOKEN = frozenset(range(ppo_world.MODEL.vocab_size))  # whatever comes first ends the answer


def _empty_answers() -> list[dict[str, float]]:
    ppo = ppo_world.build_ppo(ppo_world.PPO_CONFIG, Layout())
    ppo.rollout.stop_ids = ONE_TOKEN
    return [ppo.step() for _ in range(2)]


def test_an_empty_answer_is_its_stop_token_and_is_learned_from() -> None:
    [[first, second]] = run_ranks(1, _empty_answers)
    assert first["response_length"] == second["response_length"] == 1.0
    assert first["truncated"] == first["repetition"] == first["length_correlation"] == 0.0
    assert all(math.isfinite(value) for metrics in (first, second) for value in metrics.values())
    assert first["actor/grad_norm"] > 0


def _too_long() -> str:
    ppo = ppo_world.build_ppo(ppo_world.PPO_CONFIG, Layout())
    longest = ppo_world.MODEL.max_position_embeddings
    next_prompts = ppo.prompts.next

    def lengthened(*args: Any) -> Any:
        batch = next_prompts(*args)
        row = torch.arange(longest) % 16
        tokens = type(batch.tokens).of([row, *batch.tokens.split()[1:]], torch.int64)
        return dataclasses.replace(batch, tokens=tokens)

    ppo.prompts.next = lengthened  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="prompt 0 ") as caught:
        ppo.step()
    return str(caught.value)


def test_a_prompt_longer_than_the_context_is_named_with_what_to_change() -> None:
    [said] = run_ranks(1, _too_long)
    assert "has 48 tokens, the model has 48 positions: no room for a response" in said
    assert "lower data.max_length or raise model.max_position_embeddings" in said


def _score_breaks() -> str:
    roles = ppo_world.build_roles(["actor", "reward"], Layout(2))
    infer = roles["reward"].infer

    def broken(*args: Any) -> Any:
        scores = infer(*args).wait()
        if dist.get_rank() == 1:
            scores[0] = math.nan
        return Pending(lambda: scores)

    roles["reward"].infer = broken  # type: ignore[method-assign]
    timers = Timers(torch.device("cpu"))
    best = BestOfAll(BEST_OF_ALL, roles, Dialogues(), World.current(), ppo_world.RUN_SEED, timers)
    with pytest.raises(ScoreError) as caught:
        best.step()
    assert not best.kept
    return str(caught.value)


def test_a_dialogue_without_a_number_for_a_score_is_not_ranked() -> None:
    said = run_ranks(2, _score_breaks)
    assert said[0] == said[1]
    assert "1 of the reward model's scores are not finite" in said[0]


def _critic_breaks() -> str:
    ppo = ppo_world.build_ppo(ppo_world.PPO_CONFIG, Layout())
    engine = ppo.models.critic.engine
    assert engine is not None
    with torch.no_grad():
        engine.chunks[0].output_layer.weight[0, 0] = math.inf
    with pytest.raises(NonFiniteError) as caught:
        ppo.step()
    return str(caught.value)


def test_a_critic_that_gives_no_numbers_stops_the_run_before_a_weight_moves() -> None:
    [said] = run_ranks(1, _critic_breaks)
    assert "The weights are those before this step" in said
