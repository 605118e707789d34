"""A tiny world for PPO by the framework on some layout; tests/algorithms/plain_ppo.py has it in plain torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from megatron_zj.algorithms.ppo import PPO, PPORoles
from megatron_zj.algorithms.shaping import ScoreScale, Shaping
from megatron_zj.config.algorithm import PPOConfig
from megatron_zj.config.model import HeadKind, ModelConfig
from megatron_zj.config.sampling import SamplingConfig
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.engine.build import build_engine
from megatron_zj.engine.objective import Metrics
from megatron_zj.models.canonical import canonical_tensors, initial_tensor, read_stage
from megatron_zj.roles.exchange import Exchange
from megatron_zj.roles.placement import build_placements
from megatron_zj.roles.role import Role
from megatron_zj.roles.world import World, WorldBatch, gather_in_order
from megatron_zj.rollout.generate import Rollout
from megatron_zj.runtime.activity import Activity
from megatron_zj.runtime.timers import Timers
from tests.algorithms.float64_role import Float64Role, Float64Rollout
from tests.algorithms.layouts import Layout
from tests.algorithms.plain_optimizer import OPTIM

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
SCALE = ScoreScale(0.1, 0.4)
HEADS: dict[str, HeadKind] = {"actor": "lm", "reference": "lm", "critic": "value", "reward": "score"}
SEEDS = {"actor": 1, "reference": 1, "critic": 2, "reward": 3}
STOP, RUN_SEED, ITERATIONS = 17, 13, 2
PROMPTS = [[7], [8, 9, 10], [11, 12], [13, 14, 15, 16], [17, 18], [19], [20, 21, 22], [23, 24]]
# Terms may cancel, so the sum is no measure of its rounding; DPO's margin starts at 0, its actor being the reference.
LOOSE = frozenset({"kl", "score_scaled", "score_best", "score_mean", "explained_variance", "margin"})
History = list[dict[str, Any]]  # by iteration: numbers, and samples; last the weights


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


def build_roles(
    names: Iterable[str],
    layout: Layout,
    trained: Sequence[str] = ("actor", "critic"),
    activity: Activity | None = None,
) -> dict[str, Role]:
    """The framework's roles with fresh weights."""
    if layout.float64:
        budget = layout.engine.micro_batch_tokens
        exact = {name: Float64Role(MODEL, HEADS[name], initial_weights(name), budget) for name in names}
        return cast(dict[str, Role], exact)
    world, exchange, host = World.current(), Exchange(activity), torch.device("cpu")
    where = {name: layout.where.get(name, "all") for name in names}
    built = build_placements(layout.parallel, layout.placements, set(where.values()), world.size, 60)
    roles = {}
    for name, at in where.items():
        placement = built[at]
        optim = OPTIM if name in trained else None
        made = None
        if placement.groups is not None:
            made = build_engine(MODEL, HEADS[name], placement.groups, layout.engine, optim, 100, host, SEEDS[name])
        roles[name] = Role(name, placement, made, exchange)
    return roles


def decode(ids: Sequence[int]) -> str:
    """Text of which rules can tell something: one letter an id."""
    return "".join(chr(ord("A") + index) for index in ids)


def build_ppo(config: PPOConfig, layout: Layout, activity: Activity | None = None) -> PPO:
    """The framework's PPO."""
    roles = build_roles(HEADS, layout, activity=activity)
    rollout = build_rollout(config.sampling, layout)
    timers, shaping = Timers(torch.device("cpu"), activity), Shaping(config, SCALE, decode)
    return PPO(config, PPORoles(**roles), Prompts(), rollout, World.current(), RUN_SEED, timers, shaping)


def build_rollout(sampling: SamplingConfig, layout: Layout) -> Rollout:
    """Ends at ``STOP``."""
    return (Float64Rollout if layout.float64 else Rollout)(sampling, frozenset({STOP}), RUN_SEED, decode)


def run_ppo(layout: Layout, configs: Sequence[PPOConfig] = (PPO_CONFIG,)) -> list[History]:
    """By configuration: what each iteration measured and sampled, and last the trained models' weights."""
    histories = []
    for config in configs:
        ppo = build_ppo(config, layout)
        samples = watch_samples(ppo.models.actor)
        steps = [ppo.step() for _ in range(ITERATIONS)]
        histories.append(history_of(steps, samples, whole_weights(ppo.roles, ("actor", "critic"))))
    return histories


def history_of(steps: Sequence[Metrics], samples: Sequence[list[list[int]]], weights: dict[str, Tensor]) -> History:
    """What two runs are compared by."""
    found = [{**metrics, "samples": rows} for metrics, rows in zip(steps, samples, strict=True)] if samples else steps
    return [*(dict(metrics) for metrics in found), weights]


def watch_samples(actor: Role) -> list[list[list[int]]]:
    """All ranks' rows that the actor generates from now on, by call."""
    seen: list[list[list[int]]] = []
    generate = actor.generate

    def watching(*args: Any) -> WorldBatch:
        samples = generate(*args)
        seen.append(gather_in_order([row.tolist() for row in samples.local.tokens.split()]))
        return samples

    actor.generate = watching  # type: ignore[method-assign]
    return seen


def whole_weights(roles: dict[str, Role], names: Iterable[str]) -> dict[str, Tensor]:
    """Every tensor of these models, whole, on every rank: ``actor/model.norm.weight``."""
    whole = {}
    for name in names:
        role: Any = roles[name]
        if isinstance(role, Float64Role):
            whole |= {f"{name}/{key}": value.detach() for key, value in role.model.named_parameters()}
            continue
        engine, pieces = role.engine, []
        if engine is not None:
            engine.gather_weights()
            if engine.groups.dp_rank == engine.groups.cp_rank == 0:
                pieces = [(key, shard.clone()) for key, shard in read_stage(engine.chunks, engine.groups).items()]
        everything = gather_in_order(pieces)
        for tensor in canonical_tensors(MODEL, HEADS[name]):
            shards = [shard for key, shard in everything if key == tensor.name]  # in the order of the tp ranks
            whole[f"{name}/{tensor.name}"] = shards[0] if tensor.tp_dim is None else torch.cat(shards, tensor.tp_dim)
    return whole


def differences(found: History, expected: History, floor: float | None = None) -> dict[str, float]:
    """How far everything in ``expected`` is off, by iteration and name.

    Numbers and tensors: the distance by the size, which counts as at least ``floor``; without one, as at least 0.01 of
    a number and 1 of a tensor or of a number whose terms cancel.  Samples: 0, or infinite.
    """
    off = {}
    for index, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        for name, value in theirs.items():
            if isinstance(value, list):
                off[f"{index}/{name}"] = 0.0 if mine[name] == value else math.inf
            else:
                one, other = (torch.as_tensor(item, dtype=torch.float64) for item in (mine[name], value))
                least = 1.0 if other.ndim or name in LOOSE else 0.01
                off[f"{index}/{name}"] = float((one - other).norm() / other.norm().clamp(min=floor or least))
    return off
