"""A tiny world for PPO by the framework on some layout; tests/algorithms/plain_ppo.py has it in plain torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_zj.algorithms.ppo import PPO, PPORoles
from megatron_zj.algorithms.shaping import ScoreScale, Shaping
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
from megatron_zj.roles.world import World, WorldBatch
from megatron_zj.rollout.generate import Rollout
from megatron_zj.runtime.timers import Timers

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
PROBE = [torch.arange(3, 15), torch.arange(30, 37), torch.arange(40, 59)]


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
    parallel: ParallelConfig,
    engine: EngineConfig,
    placements: dict[str, PlacementConfig],
    where: dict[str, str],
    trained: Sequence[str] = ("actor", "critic"),
) -> dict[str, Role]:
    """The framework's roles with fresh weights.  ``where``: role -> placement, "all" by default."""
    world, exchange, host = World.current(), Exchange(), torch.device("cpu")
    names = list(names)
    built = build_placements(parallel, placements, {where.get(name, "all") for name in names}, world.size, 60)
    roles = {}
    for name in names:
        placement = built[where.get(name, "all")]
        optim = OPTIM if name in trained else None
        made = None
        if placement.groups is not None:
            made = build_engine(MODEL, HEADS[name], placement.groups, engine, optim, 100, host, SEEDS[name])
        roles[name] = Role(name, placement, made, exchange)
    return roles


def decode(ids: Sequence[int]) -> str:
    """Text of which rules can tell something: one letter an id."""
    return "".join(chr(ord("A") + index) for index in ids)


def build_ppo(config: PPOConfig, *layout: Any) -> PPO:
    """The framework's PPO; ``layout`` as ``build_roles`` takes it."""
    roles = build_roles(HEADS, *layout)
    rollout = Rollout(config.sampling, frozenset({STOP}), RUN_SEED)
    timers, shaping = Timers(torch.device("cpu")), Shaping(config, SCALE, decode)
    return PPO(config, PPORoles(**roles), Prompts(), rollout, World.current(), RUN_SEED, timers, shaping)


def run_ppo(
    parallel: ParallelConfig,
    engine: EngineConfig,
    placements: dict[str, PlacementConfig] | None = None,
    where: dict[str, str] | None = None,
    configs: Sequence[PPOConfig] = (PPO_CONFIG,),
) -> list[list[dict[str, float]]]:
    """By configuration: metrics of each iteration, and last what the final weights say about the probe."""
    histories = []
    for config in configs:
        ppo = build_ppo(config, parallel, engine, placements or {}, where or {})
        metrics = [ppo.step() for _ in range(ITERATIONS)]
        dist.barrier()
        histories.append([*metrics, probe_roles(ppo.roles, {"actor": "logprobs", "critic": "values"})])
    return histories


def probe_roles(roles: dict[str, Role], wants: dict[str, Any]) -> dict[str, float]:
    """What the models say about some fixed rows, by role and token."""
    final = {}
    for name, want in wants.items():
        found = roles[name].infer(want, _probe()).wait()
        assert isinstance(found, Rows)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, found.values.tolist())
        for index, value in enumerate([v for part in everyone for v in part]):
            final[f"{name}/{index}"] = value
    return final


def _probe() -> WorldBatch:
    mine = torch.tensor_split(torch.arange(len(PROBE)), dist.get_world_size())[dist.get_rank()].tolist()
    return WorldBatch.gather(Batch(Rows.of([PROBE[index] for index in mine], torch.int64)))


def differences(found: Sequence[dict[str, float]], expected: Sequence[dict[str, float]]) -> dict[str, float]:
    """Relative differences (absolute below 1) of everything in ``expected``, by iteration and name."""
    worst = {}
    for index, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        for name, value in theirs.items():
            worst[f"{index}/{name}"] = abs(mine[name] - value) / max(1.0, abs(value))
    return worst
