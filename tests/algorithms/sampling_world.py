"""GRPO and rejection sampling on the tiny world of PPO: by the framework on some layout, and in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_zj.algorithms.grpo import GRPO
from megatron_zj.algorithms.rejection import BestOfAll, BestOfN
from megatron_zj.algorithms.shaping import Shaping
from megatron_zj.config.algorithm import GRPOConfig, RejectionConfig
from megatron_zj.config.sampling import SamplingConfig
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.roles.world import World
from megatron_zj.runtime.seed import keyed_generator
from megatron_zj.runtime.timers import Timers
from tests.algorithms.layouts import Layout
from tests.algorithms.plain_optimizer import adamw
from tests.algorithms.plain_ppo import Row, collect_row, policy_loss, report, samples_of, update, weights_of
from tests.algorithms.ppo_world import (
    HEADS,
    ITERATIONS,
    MODEL,
    RUN_SEED,
    SCALE,
    History,
    Prompts,
    build_roles,
    build_rollout,
    decode,
    history_of,
    initial_weights,
    watch_samples,
    whole_weights,
)
from tests.helpers.reference_llama import ReferenceLlama

SAMPLING = SamplingConfig(max_new_tokens=9, temperature=0.9)
GRPO_CONFIGS = {
    "scaled": GRPOConfig(
        sampling=SAMPLING, prompts_per_step=2, samples_per_prompt=4, epochs=2, minibatch_size=4, kl_coef=0.1
    ),
    "unscaled, sequences, k2": GRPOConfig(
        sampling=SAMPLING,
        prompts_per_step=4,
        samples_per_prompt=2,
        epochs=1,
        minibatch_size=8,
        kl_coef=0.2,
        kl_estimator="k2",
        scale_advantages=False,
        aggregation="sequence",
        clip_high=0.28,
    ),
}
BEST_OF_N = RejectionConfig(
    sampling=SAMPLING, prompts_per_step=4, samples_per_prompt=3, epochs=2, minibatch_size=2, missing_eos_penalty=0.4
)
BEST_OF_ALL = RejectionConfig(source="filter", keep=5, minibatch_size=3, prompts_per_step=4)
# prompt, answer; 1 and 5 are the same dialogue, so their scores are equal
DIALOGUES = [
    ([7], [8, 9, 17]),
    ([10, 11], [12, 17]),
    ([13], [14, 15, 16, 17]),
    ([18, 19], [20, 21, 17]),
    ([22], [23, 17]),
    ([10, 11], [12, 17]),
    ([24, 25, 26], [27, 28, 17]),
    ([29], [30, 31, 32, 33, 17]),
]
DRAWN = [3, 5, 0, 7, 1, 2, 6, 4]  # the order in which the stream gives them
STEPS = 4


class Dialogues:
    """One row a dialogue in ``DRAWN`` order, for ever."""

    num_units = len(DIALOGUES)

    def __init__(self) -> None:
        self.position = 0

    def next(self, num_units: int, rank: int, world_size: int) -> Batch:
        drawn = torch.arange(self.position, self.position + num_units)
        self.position += num_units
        mine = torch.tensor_split(drawn, world_size)[rank].tolist()
        index = [DRAWN[draw % len(DRAWN)] for draw in mine]
        rows = [DIALOGUES[place] for place in index]
        mask = Rows.of([[0] * len(prompt) + [1] * len(answer) for prompt, answer in rows], torch.int64)
        fields = {"draw": torch.tensor(mine, dtype=torch.int64), "index": torch.tensor(index, dtype=torch.int64)}
        return Batch(Rows.of([prompt + answer for prompt, answer in rows], torch.int64), {"loss_mask": mask}, fields)

    def describe(self, draw: int) -> str:
        return f"dialogue {draw}"

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def _history(algorithm: GRPO | BestOfN | BestOfAll, steps: int) -> History:
    samples = watch_samples(algorithm.roles["actor"])
    metrics = [algorithm.step() for _ in range(steps)]
    return history_of(metrics, samples, whole_weights(algorithm.roles, ["actor"]))


def run_sampling(layout: Layout) -> dict[str, History]:
    """What each iteration measured and sampled, and last the weights, by algorithm and configuration."""
    host, world = torch.device("cpu"), World.current()
    found = {}
    for name, config in GRPO_CONFIGS.items():
        roles = build_roles(["actor", "reference", "reward"], layout)
        rollout = build_rollout(config.sampling, layout)
        shaping = Shaping(config, SCALE, decode)
        grpo = GRPO(config, roles, Prompts(), rollout, world, RUN_SEED, Timers(host), shaping)
        found[name] = _history(grpo, ITERATIONS)
    roles = build_roles(["actor", "reward"], layout)
    rollout, shaping = build_rollout(SAMPLING, layout), Shaping(BEST_OF_N, SCALE, decode)
    best = BestOfN(BEST_OF_N, roles, Prompts(), rollout, world, RUN_SEED, Timers(host), shaping)
    found["best of n"] = _history(best, ITERATIONS)
    roles = build_roles(["actor", "reward"], layout)
    filtering = BestOfAll(BEST_OF_ALL, roles, Dialogues(), world, RUN_SEED, Timers(host))
    found["best of all"] = _history(filtering, STEPS)
    return found


def learn_to_end(config: GRPOConfig, iterations: int) -> list[float]:
    """The share of answers that end by themselves, by iteration."""
    roles = build_roles(["actor", "reference", "reward"], Layout())
    rollout, shaping = build_rollout(config.sampling, Layout()), Shaping(config, SCALE, decode)
    timers = Timers(torch.device("cpu"))
    grpo = GRPO(config, roles, Prompts(), rollout, World.current(), RUN_SEED, timers, shaping)
    return [1.0 - grpo.step()["truncated"] for _ in range(iterations)]


# The same in plain torch ------------------------------------------------------------------------------------------


def plain_sampling(dtype: torch.dtype = torch.float32) -> dict[str, History]:
    found = {
        name: _plain_grpo(config, _models(dtype, "actor", "reference", "reward"))
        for name, config in GRPO_CONFIGS.items()
    }
    found["best of n"] = _plain_best_of_n(_models(dtype, "actor", "reward"))
    return found | {"best of all": _plain_best_of_all(_models(dtype, "actor", "reward"))}


def _models(dtype: torch.dtype, *names: str) -> dict[str, ReferenceLlama]:
    return {name: ReferenceLlama(MODEL, HEADS[name], state=initial_weights(name), dtype=dtype) for name in names}


def _means(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    return {f"actor/{name}": sum(one[name] for one in updates) / len(updates) for name in updates[0]}


def _orders(count: int, size: int, epochs: int, iteration: int) -> list[list[int]]:
    found = []
    for epoch in range(epochs):
        order = torch.randperm(count, generator=keyed_generator(RUN_SEED, "minibatches", iteration, epoch))
        found += [ids.tolist() for ids in order.split(size)]
    return found


def _plain_grpo(config: GRPOConfig, models: dict[str, ReferenceLlama]) -> History:
    history, steps = [], 0
    optimizer, size = adamw(models["actor"]), config.samples_per_prompt
    for iteration in range(ITERATIONS):
        rows = [
            collect_row(models, SAMPLING, iteration, sample)
            for sample in samples_of(iteration, config.prompts_per_step, size)
        ]
        for row in rows:
            row["score"] = (row["raw"] - SCALE.mean) / SCALE.deviation
        for first in range(0, len(rows), size):
            scores = torch.tensor([row["score"] for row in rows[first : first + size]], dtype=torch.float64)
            for row in rows[first : first + size]:
                advantage = row["score"] - scores.mean()
                if config.scale_advantages:
                    advantage = advantage / (scores.std() + 1e-6)
                row["advantages"] = torch.full_like(row["old"], float(advantage))
        updates = []
        for ids in _orders(len(rows), config.minibatch_size, config.epochs, iteration):
            picked = [rows[index] for index in ids]

            def terms(model: ReferenceLlama, row: Row) -> dict[str, torch.Tensor]:
                return policy_loss(config, config.kl_coef, model, row)

            updates.append(update(models["actor"], optimizer, terms, picked, steps, config.aggregation))
            steps += 1
        history.append(report(rows) | _means(updates))
    return [*history, weights_of(models, ["actor"])]


def _nll(model: ReferenceLlama, row: Row) -> dict[str, torch.Tensor]:
    return {"loss": -model.logprobs(row["tokens"])[row["start"] :]}


def _plain_best_of_n(models: dict[str, ReferenceLlama]) -> History:
    config, history, steps = BEST_OF_N, [], 0
    optimizer, size = adamw(models["actor"]), BEST_OF_N.samples_per_prompt
    for iteration in range(ITERATIONS):
        samples = samples_of(iteration, config.prompts_per_step, size)
        rows = [collect_row(models, SAMPLING, iteration, sample) for sample in samples]
        for row in rows:
            row["score"] = (row["raw"] - SCALE.mean) / SCALE.deviation - config.missing_eos_penalty * row["truncated"]
        groups = [rows[first : first + size] for first in range(0, len(rows), size)]
        best = [max(group, key=lambda row: row["score"]) for group in groups]
        updates = []
        for ids in _orders(len(best), config.minibatch_size, config.epochs, iteration):
            updates.append(update(models["actor"], optimizer, _nll, [best[index] for index in ids], steps))
            steps += 1
        mean = sum(row["score"] for row in best) / len(best)
        history.append(report(rows) | {"score_best": mean} | _means(updates))
    return [*history, weights_of(models, ["actor"])]


def _plain_best_of_all(models: dict[str, ReferenceLlama]) -> History:
    config = BEST_OF_ALL
    optimizer, history = adamw(models["actor"]), []
    with torch.no_grad():
        scores = [float(models["reward"].score(torch.tensor(prompt + answer))) for prompt, answer in DIALOGUES]
    kept = sorted(range(len(scores)), key=lambda place: -scores[place])[: config.keep]  # a stable sort: ties by order
    for step in range(STEPS):
        ids = []
        for place in range(step * config.minibatch_size, (step + 1) * config.minibatch_size):
            order = torch.randperm(len(kept), generator=keyed_generator(RUN_SEED, "kept", place // len(kept)))
            ids.append(kept[int(order[place % len(kept)])])
        rows = []
        for place in dict.fromkeys(ids):
            prompt, answer = DIALOGUES[place]
            rows.append({"tokens": torch.tensor(prompt + answer), "start": len(prompt)})
        found = update(models["actor"], optimizer, _nll, rows, step)
        mean = sum(scores[place] for place in kept) / len(kept)
        history.append(found | {"kept": float(len(kept)), "kept_score": mean, "kept_score_lowest": scores[kept[-1]]})
    return [*history, weights_of(models, ["actor"])]
