"""PPO on a tiny world twice: by the framework on some layout, and written out in plain torch, row by row."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_zj.algorithms.ppo import PPO, PPORoles, ScoreScale
from megatron_zj.config.algorithm import PPOConfig, SamplingConfig
from megatron_zj.config.model import HeadKind, ModelConfig
from megatron_zj.config.optim import EngineConfig, OptimConfig
from megatron_zj.config.parallel import ParallelConfig, PlacementConfig
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.engine.build import build_engine
from megatron_zj.models.canonical import canonical_tensors, initial_tensor
from megatron_zj.roles.exchange import Exchange
from megatron_zj.roles.placement import build_placements
from megatron_zj.roles.role import Role
from megatron_zj.roles.world import World
from megatron_zj.rollout.generate import Rollout
from megatron_zj.rollout.sampling import draw, sample_noise
from megatron_zj.runtime.seed import keyed_generator
from megatron_zj.runtime.timers import Timers
from tests.helpers.reference_llama import ReferenceLlama

MODEL = ModelConfig(
    vocab_size=60,
    hidden_size=32,
    ffn_hidden_size=48,
    num_layers=4,
    num_attention_heads=4,
    num_query_groups=2,
    max_position_embeddings=48,
    init_std=0.12,
    vocab_multiple=16,
)
PPO_CONFIG = PPOConfig(
    sampling=SamplingConfig(max_new_tokens=9, temperature=0.9),
    prompts_per_step=4,
    samples_per_prompt=2,
    epochs=2,
    minibatch_size=4,
    gamma=0.98,
    lam=0.9,
    kl_coef=0.07,
    entropy_coef=0.01,
    missing_eos_penalty=0.3,
)
OPTIM = OptimConfig(lr=2e-3, weight_decay=0.1, clip_grad=0.5, schedule="constant", warmup_steps=1)
SCALE = ScoreScale(0.1, 0.4)
HEADS: dict[str, HeadKind] = {"actor": "lm", "reference": "lm", "critic": "value", "reward": "score"}
SEEDS = {"actor": 1, "reference": 1, "critic": 2, "reward": 3}
STOP, RUN_SEED, ITERATIONS = 17, 13, 2
PROMPTS = [[7], [8, 9, 10], [11, 12], [13, 14, 15, 16], [17, 18], [19], [20, 21, 22], [23, 24]]


class Prompts:
    """Prompts in file order, for ever."""

    num_units = len(PROMPTS)

    def __init__(self) -> None:
        self.position = 0

    def next(self, num_units: int, rank: int, world_size: int) -> Batch:
        ids = list(range(self.position, self.position + num_units))
        self.position += num_units
        mine = torch.tensor_split(torch.tensor(ids), world_size)[rank].tolist()
        rows = Rows.of([PROMPTS[index % len(PROMPTS)] for index in mine], torch.int64)
        return Batch(rows, {}, {"sample_id": torch.tensor(mine, dtype=torch.int64), "prompt_length": rows.lengths})

    def describe(self, draw: int) -> str:
        return f"prompt {draw}"

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def initial_weights(role: str) -> dict[str, Tensor]:
    """Whole tensors by canonical name."""
    return {t.name: initial_tensor(t, MODEL, SEEDS[role]) for t in canonical_tensors(MODEL, HEADS[role])}


def build_ppo(
    parallel: ParallelConfig, engine: EngineConfig, placements: dict[str, PlacementConfig], where: dict[str, str]
) -> PPO:
    """The framework's PPO with fresh weights.  ``where``: role -> placement, "all" by default."""
    world, exchange, host = World.current(), Exchange(), torch.device("cpu")
    used = {where.get(name, "all") for name in HEADS}
    built = build_placements(parallel, placements, used, world.size, 60)
    roles = {}
    for name, head in HEADS.items():
        placement = built[where.get(name, "all")]
        optim = OPTIM if name in ("actor", "critic") else None
        made = None
        if placement.groups is not None:
            made = build_engine(MODEL, head, placement.groups, engine, optim, 100, host, SEEDS[name])
        roles[name] = Role(name, placement, made, exchange)
    rollout = Rollout(PPO_CONFIG.sampling, frozenset({STOP}), RUN_SEED)
    return PPO(PPO_CONFIG, PPORoles(**roles), Prompts(), rollout, world, RUN_SEED, Timers(host), SCALE)


def run_ppo(
    parallel: ParallelConfig,
    engine: EngineConfig,
    placements: dict[str, PlacementConfig] | None = None,
    where: dict[str, str] | None = None,
) -> list[dict[str, float]]:
    """Metrics of each iteration, and last a summary of the final weights (see ``fingerprint``)."""
    ppo = build_ppo(parallel, engine, placements or {}, where or {})
    metrics = [ppo.step() for _ in range(ITERATIONS)]
    dist.barrier()
    final = {}
    for name, head in (("actor", "logprobs"), ("critic", "values")):
        probe = _probe()
        found = ppo.roles[name].infer(head, probe).wait()
        assert isinstance(found, Rows)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, found.values.tolist())
        for index, value in enumerate([v for part in everyone for v in part]):
            final[f"{name}/{index}"] = value
    return [*metrics, final]


def _probe() -> Any:
    from megatron_zj.roles.world import WorldBatch

    rows = [torch.arange(3, 15), torch.arange(30, 37), torch.arange(40, 59)]
    mine = torch.tensor_split(torch.arange(len(rows)), dist.get_world_size())[dist.get_rank()].tolist()
    return WorldBatch.gather(Batch(Rows.of([rows[index] for index in mine], torch.int64)))


# The same in plain torch ------------------------------------------------------------------------------------------


def plain_ppo(dtype: torch.dtype = torch.float32) -> list[dict[str, float]]:
    """Written from the papers, one row at a time, sharing with the framework only the random keys."""
    models = {n: ReferenceLlama(MODEL, head, state=initial_weights(n), dtype=dtype) for n, head in HEADS.items()}
    optimizers = {name: _adamw(models[name]) for name in ("actor", "critic")}
    steps = dict.fromkeys(optimizers, 0)
    history = []
    for iteration in range(ITERATIONS):
        rows = [_collect_row(models, iteration, sample) for sample in _samples(iteration)]
        _advantages(rows)
        metrics = _report(rows)
        updates = []
        for epoch in range(PPO_CONFIG.epochs):
            order = torch.randperm(len(rows), generator=keyed_generator(RUN_SEED, "minibatches", iteration, epoch))
            for ids in order.split(PPO_CONFIG.minibatch_size):
                picked = [rows[index] for index in ids.tolist()]
                found = {}
                for name, loss_of in (("critic", _value_loss), ("actor", _policy_loss)):
                    values = _update(models[name], optimizers[name], loss_of, picked, steps[name])
                    steps[name] += 1
                    found.update({f"{name}/{key}": value for key, value in values.items()})
                updates.append(found)
        metrics.update({key: sum(update[key] for update in updates) / len(updates) for key in updates[0]})
        history.append(metrics)
    with torch.no_grad():
        probe = [torch.arange(3, 15), torch.arange(30, 37), torch.arange(40, 59)]
        final = {f"actor/{i}": float(v) for i, v in enumerate(models["actor"].outputs(probe, "logprobs"))}
        final |= {f"critic/{i}": float(v) for i, v in enumerate(models["critic"].outputs(probe, "values"))}
    return [*history, final]


def _samples(iteration: int) -> list[tuple[int, list[int]]]:
    first = iteration * PPO_CONFIG.prompts_per_step
    copies = PPO_CONFIG.samples_per_prompt
    return [
        (prompt * copies + copy_, PROMPTS[prompt % len(PROMPTS)])
        for prompt in range(first, first + PPO_CONFIG.prompts_per_step)
        for copy_ in range(copies)
    ]


@torch.no_grad()
def _collect_row(models: dict[str, ReferenceLlama], iteration: int, sample: tuple[int, list[int]]) -> dict[str, Any]:
    sample_id, prompt = sample
    sampling = PPO_CONFIG.sampling
    noise = sample_noise(RUN_SEED, iteration, sample_id, sampling.max_new_tokens)
    tokens = list(prompt)
    for position in range(sampling.max_new_tokens):
        logits = models["actor"].logits(torch.tensor(tokens))[-1:]
        tokens.append(int(draw(logits, noise[position : position + 1], sampling)[0]))
        if tokens[-1] == STOP:
            break
    row, start = torch.tensor(tokens), len(prompt)
    raw = float(models["reward"].score(row))
    truncated = tokens[-1] != STOP
    return {
        "tokens": row,
        "start": start,
        "truncated": truncated,
        "old": models["actor"].logprobs(row, sampling.temperature)[start:],
        "ref": models["reference"].logprobs(row, sampling.temperature)[start:],
        "values": models["critic"].values(row)[start:],
        "raw": raw,
        "score": (raw - SCALE.mean) / SCALE.deviation - PPO_CONFIG.missing_eos_penalty * truncated,
    }


def _advantages(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        rewards = -PPO_CONFIG.kl_coef * (row["old"] - row["ref"])
        rewards[-1] += row["score"]
        following, running, found = 0.0, 0.0, []
        for reward, value in zip(reversed(rewards.tolist()), reversed(row["values"].tolist()), strict=True):
            running = reward + PPO_CONFIG.gamma * following - value + PPO_CONFIG.gamma * PPO_CONFIG.lam * running
            following = value
            found.append(running)
        row["raw_advantages"] = torch.tensor(found[::-1], dtype=row["values"].dtype)
        row["returns"] = row["raw_advantages"] + row["values"]
    everything = torch.cat([row["raw_advantages"] for row in rows]).double()
    mean, deviation = everything.mean(), everything.std(correction=0)
    for row in rows:
        row["advantages"] = ((row["raw_advantages"] - mean) / (deviation + 1e-8)).to(row["values"].dtype)


def _report(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    tokens = sum(len(row["old"]) for row in rows)
    kl = sum(float((row["old"] - row["ref"]).sum()) for row in rows)
    errors = torch.cat([row["returns"] - row["values"] for row in rows]).double()
    returns = torch.cat([row["returns"] for row in rows]).double()
    return {
        "score": sum(row["raw"] for row in rows) / len(rows),
        "score_scaled": sum(row["score"] for row in rows) / len(rows),
        "kl": kl / len(rows),
        "kl_per_token": kl / tokens,
        "response_length": tokens / len(rows),
        "truncated": sum(row["truncated"] for row in rows) / len(rows),
        "explained_variance": float(1 - errors.var(correction=0) / returns.var(correction=0)),
        "tokens": float(tokens),
    }


def _policy_loss(model: ReferenceLlama, row: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
    temperature = PPO_CONFIG.sampling.temperature
    new = model.logprobs(row["tokens"], temperature)[row["start"] :]
    entropy = model.entropy(row["tokens"], temperature)[row["start"] :]
    ratio = (new - row["old"]).exp()
    clipped = ratio.clamp(1 - PPO_CONFIG.clip_ratio, 1 + PPO_CONFIG.clip_ratio)
    gain = torch.minimum(ratio * row["advantages"], clipped * row["advantages"])
    loss = -gain.sum() - PPO_CONFIG.entropy_coef * entropy.sum()
    return loss, {
        "approx_kl": float((ratio - 1 - (new - row["old"])).sum().detach()),
        "clip_fraction": float((clipped * row["advantages"] < ratio * row["advantages"]).sum().detach()),
        "entropy": float(entropy.sum().detach()),
    }


def _value_loss(model: ReferenceLlama, row: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
    new = model.values(row["tokens"])[row["start"] :]
    near = row["values"] + (new - row["values"]).clamp(-PPO_CONFIG.clip_value, PPO_CONFIG.clip_value)
    free, held = (new - row["returns"]).square(), (near - row["returns"]).square()
    return 0.5 * torch.maximum(free, held).sum(), {"clip_fraction": float((held > free).sum())}


def _update(model: Any, optimizer: Any, loss_of: Any, rows: list[dict[str, Any]], step: int) -> dict[str, float]:
    tokens = sum(len(row["old"]) for row in rows)
    sums: dict[str, float] = {}
    total: Tensor = torch.zeros(())
    for row in rows:
        loss, found = loss_of(model, row)
        total = total + loss
        for key, value in found.items():
            sums[key] = sums.get(key, 0.0) + value
    optimizer.zero_grad(set_to_none=True)
    (total / tokens).backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_grad))
    rate = OPTIM.lr * min(1.0, (step + 1) / OPTIM.warmup_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    averages = {key: value / tokens for key, value in sums.items()}
    return averages | {"loss": float(total.detach()) / tokens, "grad_norm": norm, "lr": rate, "weight": float(tokens)}


def _adamw(model: ReferenceLlama) -> torch.optim.AdamW:
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": OPTIM.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(OPTIM.beta1, OPTIM.beta2),
        eps=OPTIM.eps,
        foreach=False,
    )


def differences(found: Sequence[dict[str, float]], expected: Sequence[dict[str, float]]) -> dict[str, float]:
    """Relative differences (absolute below 1) of everything in ``expected``, by iteration and name."""
    worst = copy.copy({})
    for index, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        for name, value in theirs.items():
            worst[f"{index}/{name}"] = abs(mine[name] - value) / max(1.0, abs(value))
    return worst
