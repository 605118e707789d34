"""PPO in plain torch, written from the papers one row at a time; only the random keys are the framework's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_zj.config.algorithm import PPOConfig
from megatron_zj.config.sampling import SamplingConfig
from megatron_zj.rollout.sampling import sample_noise
from megatron_zj.runtime.seed import keyed_generator
from tests.algorithms.plain_optimizer import adamw, apply_gradients
from tests.algorithms.plain_rollout import answer
from tests.algorithms.ppo_world import (
    HEADS,
    ITERATIONS,
    MODEL,
    PROMPTS,
    RUN_SEED,
    SCALE,
    STOP,
    History,
    decode,
    initial_weights,
)
from tests.helpers.reference_llama import ReferenceLlama

Row = dict[str, Any]


class PlainPPO:
    """One configuration; ``run`` gives what an iteration measured and sampled, and last the weights."""

    def __init__(self, config: PPOConfig, dtype: torch.dtype = torch.float32) -> None:
        self.config = config
        self.models = {
            name: ReferenceLlama(MODEL, head, state=initial_weights(name), dtype=dtype) for name, head in HEADS.items()
        }
        self.optimizers = {name: adamw(self.models[name]) for name in ("actor", "critic")}
        self.steps = {"actor": 0, "critic": 0}
        self.kl_coef = config.kl_coef
        self.all_scores: list[float] = []

    def run(self) -> History:
        history = [self._iterate(iteration) for iteration in range(ITERATIONS)]
        return [*history, weights_of(self.models, ("actor", "critic"))]

    def _iterate(self, iteration: int) -> dict[str, Any]:
        config = self.config
        rows = [
            collect_row(self.models, config.sampling, iteration, sample)
            for sample in samples_of(iteration, config.prompts_per_step, config.samples_per_prompt)
        ]
        self._score(rows)
        self._advantages(rows)
        metrics: dict[str, Any] = report(rows) | {"kl_coef": self.kl_coef}
        updates: list[dict[str, float]] = []
        stopped = iteration < config.critic_warmup_steps
        for epoch in range(config.epochs):
            order = torch.randperm(len(rows), generator=keyed_generator(RUN_SEED, "minibatches", iteration, epoch))
            for picked in self._minibatches([rows[index] for index in order.tolist()]):
                found = {f"critic/{key}": value for key, value in self._update("critic", picked).items()}
                if not stopped:
                    actor = self._update("actor", picked)
                    found |= {f"actor/{key}": value for key, value in actor.items()}
                    stopped = config.early_stop_kl is not None and actor["approx_kl"] > config.early_stop_kl
                updates.append(found)
        for key in sorted({key for update in updates for key in update}):
            values = [update[key] for update in updates if key in update]
            metrics[key] = sum(values) / len(values)
        if config.kl_controller == "adaptive" and iteration >= config.critic_warmup_steps:
            assert config.kl_target is not None
            error = min(0.2, max(-0.2, (metrics["kl"] - config.kl_target) / config.kl_target))
            self.kl_coef = self.kl_coef * (1 + error * len(rows) / config.kl_horizon)
        return metrics

    def _minibatches(self, rows: list[Row]) -> list[list[Row]]:
        """Neighbours; or, longest first, dealt forth and back like cards."""
        size = self.config.minibatch_size
        if not self.config.balance_minibatches:
            return [rows[start : start + size] for start in range(0, len(rows), size)]
        hands: list[list[Row]] = [[] for _ in range(len(rows) // size)]
        seats = list(range(len(hands)))
        for place, row in enumerate(sorted(rows, key=lambda row: len(row["tokens"]), reverse=True)):
            turn, seat = divmod(place, len(hands))
            hands[seats[::-1][seat] if turn % 2 else seats[seat]].append(row)
        return hands

    def _score(self, rows: Sequence[Row]) -> None:
        config = self.config
        mean, deviation = (SCALE.mean, SCALE.deviation) if config.whiten_scores else (0.0, 1.0)
        if config.running_scores:
            self.all_scores += [row["raw"] for row in rows]
            mean = sum(self.all_scores) / len(self.all_scores)
            deviation = math.sqrt(sum((score - mean) ** 2 for score in self.all_scores) / len(self.all_scores))
        for row in rows:
            score = (row["raw"] - mean) / deviation
            if "varied" in config.rules:
                text = decode(row["tokens"][row["start"] :].tolist())
                grams = [text[at : at + 3] for at in range(len(text) - 2)]
                score += config.rules["varied"] * (len(set(grams)) / len(grams) if grams else 1.0)
            if config.score_clip is not None:
                score = max(-config.score_clip, min(config.score_clip, score))
            score *= config.score_sign
            score -= config.missing_eos_penalty * row["truncated"]
            row["score"] = score - config.length_penalty * max(0, len(row["old"]) - config.length_free)

    def _advantages(self, rows: Sequence[Row]) -> None:
        config = self.config
        for row in rows:
            rewards = torch.zeros_like(row["old"])
            if config.kl_in == "reward":
                rewards = -self.kl_coef * kl_of(row["old"], row["ref"], config.kl_estimator)
            rewards[-1] += row["score"]
            following, running, found = 0.0, 0.0, []
            for reward, value in zip(reversed(rewards.tolist()), reversed(row["values"].tolist()), strict=True):
                running = reward + config.gamma * following - value + config.gamma * config.lam * running
                following = value
                found.append(running)
            row["raw_advantages"] = torch.tensor(found[::-1], dtype=row["values"].dtype)
            row["returns"] = row["raw_advantages"] + row["values"]
        everything = torch.cat([row["raw_advantages"] for row in rows]).double()
        mean, deviation = everything.mean(), everything.std(correction=0)
        for row in rows:
            row["advantages"] = row["raw_advantages"]
            if config.whiten_advantages:
                white = (row["raw_advantages"] - mean) / (deviation + 1e-8)
                row["advantages"] = white.to(row["values"].dtype)

    def _update(self, name: str, rows: list[Row]) -> dict[str, float]:
        loss = value_loss if name == "critic" else policy_loss
        coef = self.kl_coef if self.config.kl_in == "loss" else 0.0
        found = update(
            self.models[name],
            self.optimizers[name],
            lambda model, row: loss(self.config, coef, model, row),
            rows,
            self.steps[name],
            self.config.aggregation,
        )
        self.steps[name] += 1
        return found


def weights_of(models: dict[str, ReferenceLlama], names: Sequence[str]) -> dict[str, Tensor]:
    """Every tensor of these models: ``actor/model.norm.weight``."""
    return {f"{name}/{key}": value.detach() for name in names for key, value in models[name].named_parameters()}


def samples_of(iteration: int, prompts: int, copies: int) -> list[tuple[int, list[int]]]:
    """Sample ids and prompts of an iteration."""
    return [
        (prompt * copies + copy, PROMPTS[prompt % len(PROMPTS)])
        for prompt in range(iteration * prompts, (iteration + 1) * prompts)
        for copy in range(copies)
    ]


@torch.no_grad()
def collect_row(
    models: dict[str, ReferenceLlama], sampling: SamplingConfig, iteration: int, sample: tuple[int, list[int]]
) -> Row:
    """One sampled answer with what every model says about its response tokens."""
    sample_id, prompt = sample
    noise = sample_noise(RUN_SEED, iteration, sample_id, sampling.max_new_tokens)
    drawn, sampled, ended = answer(models["actor"], prompt, noise, sampling, frozenset({STOP}), decode)
    row, start = torch.tensor([*prompt, *drawn]), len(prompt)
    found: Row = {"tokens": row, "start": start, "truncated": not ended}
    found["old"] = models["actor"].logprobs(row, sampling.temperature)[start:]
    found["sampled"] = found["old"].new_tensor(sampled)
    found["raw"] = float(models["reward"].score(row))
    if "reference" in models:
        found["ref"] = models["reference"].logprobs(row, sampling.temperature)[start:]
    if "critic" in models:
        found["values"] = models["critic"].values(row)[start:]
    return found


def report(rows: Sequence[Row]) -> dict[str, Any]:
    """Of an iteration's samples, and themselves."""
    tokens = sum(len(row["old"]) for row in rows)
    lengths = torch.tensor([float(len(row["old"])) for row in rows], dtype=torch.float64)
    raw = torch.tensor([row["raw"] for row in rows], dtype=torch.float64)
    found: dict[str, Any] = {
        "score": sum(row["raw"] for row in rows) / len(rows),
        "score_scaled": sum(row["score"] for row in rows) / len(rows),
        "response_length": tokens / len(rows),
        "truncated": sum(row["truncated"] for row in rows) / len(rows),
        "length_correlation": float(torch.corrcoef(torch.stack([lengths, raw]))[0, 1]),
        "tokens": float(tokens),
        "samples": [row["tokens"].tolist() for row in rows],
    }
    if "ref" in rows[0]:
        kl = sum(float((row["old"] - row["ref"]).sum()) for row in rows)
        k3 = sum(float(((row["ref"] - row["old"]).exp() - 1 + row["old"] - row["ref"]).sum()) for row in rows)
        found |= {"kl": kl / len(rows), "kl_per_token": kl / tokens, "kl_k3": k3 / tokens}
        found["entropy"] = -sum(float(row["old"].sum()) for row in rows) / tokens
    if "returns" in rows[0]:
        errors = torch.cat([row["returns"] - row["values"] for row in rows]).double()
        returns = torch.cat([row["returns"] for row in rows]).double()
        found["explained_variance"] = float(1 - errors.var(correction=0) / returns.var(correction=0))
    return found


def kl_of(logprobs: Tensor, ref: Tensor, estimator: str) -> Tensor:
    """Schulman's estimators of KL(pi || ref)."""
    ratio = (ref - logprobs).exp()
    return {
        "k1": -ratio.log(),
        "k2": 0.5 * ratio.log() ** 2,
        "k3": ratio - 1 - ratio.log(),
        "abs": ratio.log().abs(),
    }[estimator]


def policy_loss(config: Any, kl_coef: float, model: ReferenceLlama, row: Row) -> dict[str, Tensor]:
    """Per-token loss and metrics of one row."""
    temperature = config.sampling.temperature
    new = model.logprobs(row["tokens"], temperature)[row["start"] :]
    ratio, advantages = (new - row["old"]).exp(), row["advantages"]
    high = config.clip_ratio if config.clip_high is None else config.clip_high
    held = ratio.clamp(1 - config.clip_ratio, 1 + high)
    gain = torch.minimum(ratio * advantages, held * advantages)
    binds = held * advantages < ratio * advantages
    if config.dual_clip is not None:
        lowest = torch.where(advantages < 0, config.dual_clip * advantages, torch.full_like(advantages, -math.inf))
        binds = binds | (gain < lowest)
        gain = torch.maximum(gain, lowest)
    found = {"approx_kl": (ratio - 1 - (new - row["old"])).detach(), "clip_fraction": binds.to(new.dtype)}
    loss = -gain
    if getattr(config, "importance_cap", None) is not None:
        found["importance"] = (row["old"] - row["sampled"]).exp().clamp(max=config.importance_cap)
        loss = loss * found["importance"]
    if kl_coef:
        kl = kl_of(new, row["ref"], config.kl_estimator)
        loss, found["kl_loss"] = loss + kl_coef * kl, kl.detach()
    if config.entropy_coef:
        entropy = model.entropy(row["tokens"], temperature)[row["start"] :]
        loss, found["entropy"] = loss - config.entropy_coef * entropy, entropy.detach()
    return {"loss": loss, **found}


def value_loss(config: PPOConfig, kl_coef: float, model: ReferenceLlama, row: Row) -> dict[str, Tensor]:
    """Per-token loss and metrics of one row."""
    new = model.values(row["tokens"])[row["start"] :]
    free = (new - row["returns"]).square()
    held = free
    if config.clip_value is not None:
        near = row["values"] + (new - row["values"]).clamp(-config.clip_value, config.clip_value)
        held = (near - row["returns"]).square()
    binds = held > free * (1 + 1e-4)  # rounding is no clip
    return {"loss": 0.5 * torch.maximum(free, held), "clip_fraction": binds.to(new.dtype)}


def update(
    model: ReferenceLlama,
    optimizer: torch.optim.AdamW,
    terms_of: Callable[[ReferenceLlama, Row], dict[str, Tensor]],
    rows: list[Row],
    step: int,
    aggregation: str = "token",
) -> dict[str, float]:
    """One optimizer step on the mean over tokens, or over rows of their token means."""
    terms = [terms_of(model, row) for row in rows]
    weight = sum(len(one["loss"]) for one in terms) if aggregation == "token" else len(rows)

    def mean(name: str) -> Tensor:
        parts = [one[name].sum() if aggregation == "token" else one[name].mean() for one in terms]
        return torch.stack(parts).sum() / weight

    loss = mean("loss")
    norm, rate = step_optimizer(model, optimizer, loss, step)
    found = {name: float(mean(name).detach()) for name in terms[0]}
    return found | {"grad_norm": norm, "lr": rate, "weight": float(weight)}


def step_optimizer(model: ReferenceLlama, optimizer: torch.optim.AdamW, loss: Tensor, step: int) -> tuple[float, float]:
    """Gradient norm and learning rate of the step."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    return apply_gradients(model, optimizer, step)
