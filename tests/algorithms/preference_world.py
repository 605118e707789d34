"""Reward models and DPO on tiny rankings: by the framework on some layout, and in plain torch, one pair at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_zj.algorithms.dpo import DPO
from megatron_zj.algorithms.reward import RankedGroups
from megatron_zj.algorithms.supervised import Supervised
from megatron_zj.config.algorithm import DPOConfig
from megatron_zj.config.model import HeadKind
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.roles.world import World
from megatron_zj.runtime.timers import Timers
from tests.algorithms.layouts import Layout
from tests.algorithms.plain_optimizer import adamw
from tests.algorithms.plain_ppo import step_optimizer, weights_of
from tests.algorithms.ppo_world import MODEL, History, build_roles, initial_weights, whole_weights
from tests.helpers.reference_llama import ReferenceLlama

# prompt, responses by rank (equal numbers: a tie)
RANKINGS: list[tuple[list[int], list[tuple[int, list[int]]]]] = [
    ([7, 8], [(0, [9, 10, 11]), (1, [9, 12, 13, 14, 15])]),
    ([20], [(0, [21, 22]), (2, [23]), (1, [24, 25, 26, 27]), (3, [21, 28])]),
    ([30, 31, 32], [(1, [33, 34]), (0, [33, 35, 36, 37]), (1, [38])]),
    ([40, 41], [(0, [42]), (0, [43, 44])]),  # all tied: teaches nothing
    ([45], [(1, [46, 47, 48]), (0, [46, 47])]),
    ([50, 51, 52, 53], [(0, [54, 55]), (1, [56, 57, 58])]),
]
GROUPS_A_STEP, STEPS = 3, 2
REWARD_LOSSES: dict[str, dict[str, Any]] = {
    "pairs": {},
    "pairs, centered": {"centering": 0.2},
    "pairs, margin": {"margin": 0.3},
    "plackett_luce": {"loss": "plackett_luce"},
    "plackett_luce, centered": {"loss": "plackett_luce", "centering": 0.1},
    "per_token": {"loss": "per_token", "margin": 0.1},
    "per_token, centered": {"loss": "per_token", "margin": 0.1, "centering": 0.1},
}
DPO_CONFIGS = {
    "all": DPOConfig(global_batch_size=GROUPS_A_STEP, beta=0.3),
    "best and worst, smoothed": DPOConfig(
        global_batch_size=GROUPS_A_STEP, beta=0.5, label_smoothing=0.1, pairs="best_worst"
    ),
}


class Rankings:
    """Groups in file order, for ever."""

    num_units = len(RANKINGS)

    def __init__(self) -> None:
        self.position = 0

    def next(self, num_units: int, rank: int, world_size: int) -> Batch:
        ids = torch.arange(self.position, self.position + num_units)
        self.position += num_units
        rows, fields = [], []
        for group in torch.tensor_split(ids, world_size)[rank].tolist():
            prompt, responses = RANKINGS[group % len(RANKINGS)]
            rows += [prompt + response for _, response in responses]
            fields += [(group, place, len(prompt)) for place, _ in responses]
        columns = torch.tensor(fields, dtype=torch.int64).view(-1, 3)
        names = ("group", "rank", "prompt_length")
        return Batch(Rows.of(rows, torch.int64), {}, {name: columns[:, at].clone() for at, name in enumerate(names)})

    def describe(self, draw: int) -> str:
        return f"ranking {draw}"

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def run_reward(layout: Layout, losses: Sequence[dict[str, Any]]) -> list[History]:
    """By loss: each step's metrics, validation, and last the weights."""
    histories = []
    for options in losses:
        roles = build_roles(["reward"], layout, trained=("reward",))
        timers = Timers(torch.device("cpu"))
        algorithm = Supervised(
            roles["reward"], RankedGroups(**options), Rankings(), GROUPS_A_STEP, World.current(), timers, Rankings()
        )
        history = [algorithm.step() for _ in range(STEPS)]
        histories.append([*history, algorithm.evaluate(), whole_weights(roles, ["reward"])])
    return histories


def run_dpo(layout: Layout, configs: Sequence[DPOConfig]) -> list[History]:
    """By configuration: each step's metrics, validation, and last the weights."""
    histories = []
    for config in configs:
        roles = build_roles(["actor", "reference"], layout)
        timers = Timers(torch.device("cpu"))
        algorithm = DPO(config, roles["actor"], roles["reference"], Rankings(), World.current(), timers, Rankings())
        history = [algorithm.step() for _ in range(STEPS)]
        histories.append([*history, algorithm.evaluate(), whole_weights(roles, ["actor"])])
    return histories


# The same in plain torch ------------------------------------------------------------------------------------------


def plain_reward(options: dict[str, Any], dtype: torch.dtype = torch.float32) -> History:
    model = ReferenceLlama(MODEL, "score", state=initial_weights("reward"), dtype=dtype)
    if not options.get("centering"):  # by differences alone nothing is known about the constant
        model.score_head.bias.requires_grad_(False)
    optimizer = adamw(model)
    history: History = []
    for step in range(STEPS):
        loss, metrics = _reward_loss(model, options, _groups(step))
        norm, rate = step_optimizer(model, optimizer, loss, step)
        weight = sum(bool(_ordered(responses)) for _, responses in _groups(step))
        update = {"loss": float(loss.detach()), "weight": float(weight), "grad_norm": norm, "lr": rate}
        history.append(metrics | update)
    with torch.no_grad():
        loss, metrics = _reward_loss(model, options, RANKINGS)
    return [*history, metrics | {"loss": float(loss)}, weights_of({"reward": model}, ["reward"])]


def _groups(step: int) -> list[tuple[list[int], list[tuple[int, list[int]]]]]:
    return [RANKINGS[index % len(RANKINGS)] for index in range(step * GROUPS_A_STEP, (step + 1) * GROUPS_A_STEP)]


def _ordered(responses: list[tuple[int, list[int]]]) -> list[tuple[int, int]]:
    places = [place for place, _ in responses]
    return [(a, b) for a, b in itertools.permutations(range(len(places)), 2) if places[a] < places[b]]


def _reward_loss(model: ReferenceLlama, options: dict[str, Any], groups: Any) -> tuple[Tensor, dict[str, float]]:
    losses, right, longer = [], [], []
    everything: list[float] = []
    for prompt, responses in groups:
        rows = [torch.tensor(prompt + tokens) for _, tokens in responses]
        tables = [torch.stack([model.score(row[: end + 1]) for end in range(len(row))]) for row in rows]
        scores, pairs = [table[-1] for table in tables], _ordered(responses)
        everything += [float(score.detach()) for score in scores]
        right += [_wins(float(scores[a].detach()), float(scores[b].detach())) for a, b in pairs]
        longer += [_wins(len(rows[a]), len(rows[b])) for a, b in pairs]
        if not pairs:
            continue
        terms = []
        if options.get("loss") == "plackett_luce":
            for a in range(len(rows)):
                worse = [scores[b] for b in range(len(rows)) if (a, b) in pairs]
                if worse:
                    terms.append(-torch.log(scores[a].exp() / (scores[a].exp() + torch.stack(worse).exp().sum())))
        for a, b in pairs if options.get("loss") != "plackett_luce" else []:
            margin = options.get("margin", 0.0) * (responses[b][0] - responses[a][0])
            if options.get("loss") != "per_token":
                terms.append(torch.log1p((margin + scores[b] - scores[a]).exp()))
                continue
            shared = min(len(rows[a]), len(rows[b]))  # a response may be the beginning of another
            start = next((at for at in range(shared) if rows[a][at] != rows[b][at]), shared)
            spans = []
            for at in range(start, max(len(rows[a]), len(rows[b]))):
                high, low = tables[a][min(at, len(rows[a]) - 1)], tables[b][min(at, len(rows[b]) - 1)]
                spans.append(torch.log1p((margin + low - high).exp()))
            terms.append(torch.stack(spans).mean())
        losses.append(torch.stack(terms).mean() + options.get("centering", 0.0) * torch.stack(scores).mean() ** 2)
    mean = sum(everything) / len(everything)
    return torch.stack(losses).mean(), {
        "pair_accuracy": sum(right) / len(right),
        "longer_wins": sum(longer) / len(longer),
        "score_mean": mean,
        "score_deviation": math.sqrt(sum((score - mean) ** 2 for score in everything) / len(everything)),
    }


def _wins(one: float, other: float) -> float:
    return 0.5 if one == other else float(one > other)


def plain_dpo(config: DPOConfig, dtype: torch.dtype = torch.float32) -> History:
    names = ("actor", "reference")
    models = {name: ReferenceLlama(MODEL, _LM, state=initial_weights(name), dtype=dtype) for name in names}
    optimizer = adamw(models["actor"])
    history: History = []
    for step in range(STEPS):
        loss, metrics = _dpo_loss(models, config, _groups(step))
        norm, rate = step_optimizer(models["actor"], optimizer, loss, step)
        history.append(metrics | {"loss": float(loss.detach()), "grad_norm": norm, "lr": rate})
    with torch.no_grad():
        loss, metrics = _dpo_loss(models, config, RANKINGS)
    del history[0]["pair_accuracy"]  # the actor is still the reference: margins of 0, whose signs are rounding
    return [*history, metrics | {"loss": float(loss)}, weights_of(models, ["actor"])]


def _dpo_loss(models: dict[str, ReferenceLlama], config: DPOConfig, groups: Any) -> tuple[Tensor, dict[str, float]]:
    losses: list[Tensor] = []
    margins: list[float] = []
    for prompt, responses in groups:
        rewards = []
        for _, tokens in responses:
            row, start = torch.tensor(prompt + tokens), len(prompt)
            with torch.no_grad():
                ref = models["reference"].logprobs(row)[start:].sum()
            rewards.append(config.beta * (models["actor"].logprobs(row)[start:].sum() - ref))
        pairs = _ordered(responses)
        if config.pairs == "best_worst":
            widest = max((responses[b][0] - responses[a][0] for a, b in pairs), default=0)
            pairs = [(a, b) for a, b in pairs if responses[b][0] - responses[a][0] == widest][:1]
        if not pairs:
            continue
        margins += [float((rewards[a] - rewards[b]).detach()) for a, b in pairs]
        e = config.label_smoothing
        terms = [
            (1 - e) * torch.log1p((rewards[b] - rewards[a]).exp()) + e * torch.log1p((rewards[a] - rewards[b]).exp())
            for a, b in pairs
        ]
        losses.append(torch.stack(terms).mean())
    accuracy = sum(margin > 0 for margin in margins) / len(margins)
    return torch.stack(losses).mean(), {"margin": sum(margins) / len(margins), "pair_accuracy": accuracy}


_LM: HeadKind = "lm"
