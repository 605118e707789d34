"""This framework's PPO as one side of tools/bench_ppo.py: the protocol of benchmarks/peers/trl_ppo.py.

    python benchmarks/own_ppo.py SETTINGS.json                    one process
    torchrun --nproc-per-node 2 benchmarks/own_ppo.py SETTINGS.json

Without weights in the settings' place it makes them and writes them there, for the other side to read.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_zj.algorithms.ppo import PPO, PPORoles
from megatron_zj.algorithms.shaping import ScoreScale, Shaping
from megatron_zj.config.algorithm import PPOConfig
from megatron_zj.config.derived import ALL
from megatron_zj.config.model import HeadKind, ModelConfig
from megatron_zj.config.optim import EngineConfig, OptimConfig
from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.config.sampling import SamplingConfig
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.engine.build import build_engine
from megatron_zj.engine.decode import Decoder
from megatron_zj.engine.engine import Engine
from megatron_zj.engine.optimizer import Optimizer
from megatron_zj.models.canonical import canonical_tensors, initial_tensor, write_stage
from megatron_zj.models.presets import preset
from megatron_zj.roles.exchange import Exchange
from megatron_zj.roles.placement import build_placements
from megatron_zj.roles.role import Role
from megatron_zj.roles.world import World, gather_in_order
from megatron_zj.rollout.generate import Rollout
from megatron_zj.runtime.distributed import Process, session
from megatron_zj.runtime.memory import peak_memory_mib
from megatron_zj.runtime.timers import Timers

HEADS: dict[str, HeadKind] = {"actor": "lm", "reference": "lm", "critic": "value", "reward": "score"}
CONSTANT = 3.0  # of the embedding's channel 0, which makes the stop token's logit a constant


class Prompts:
    """The settings' prompts, round and round."""

    def __init__(self, prompts: list[list[int]]) -> None:
        self.prompts, self.position = prompts, 0
        self.num_units = len(prompts)

    def next(self, num_units: int, rank: int, world_size: int) -> Batch:
        """This rank's share of the next ones."""
        ids = torch.arange(self.position, self.position + num_units)
        self.position += num_units
        mine = torch.tensor_split(ids, world_size)[rank]
        rows = Rows.of([self.prompts[index % len(self.prompts)] for index in mine.tolist()], torch.int64)
        return Batch(rows, {}, {"sample_id": mine, "prompt_length": rows.lengths})

    def describe(self, draw: int) -> str:
        """For messages."""
        return f"prompt {draw}"

    def state_dict(self) -> dict[str, Any]:
        """Nothing is saved here."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing was saved."""


class Stopwatch:
    """Seconds inside the model: prefill, decode, forward and backward passes, optimizer steps."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for owner, name in ((Decoder, "prefill"), (Decoder, "decode"), (Engine, "_run"), (Optimizer, "step")):
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            found = function(*args, **kwargs)
            self.seconds += time.perf_counter() - begin
            return found

        return call


def shape(settings: dict[str, Any]) -> ModelConfig:
    """The model both sides run."""
    return preset(settings["preset"])


def initial_weights(model: ModelConfig, stop: int, stop_logit: float) -> dict[str, Tensor]:
    """Random weights whose stop token has about this logit (others: about 0) whatever was said before."""
    weights = {t.name: initial_tensor(t, model, 0) for t in canonical_tensors(model, "lm")}
    weights["model.embed_tokens.weight"][:, 0] = CONSTANT
    head = weights["lm_head.weight"]
    head[:, 0] = 0.0
    head[stop] = 0.0
    head[stop, 0] = stop_logit / model.hidden_size**0.5
    return {name: value.contiguous() for name, value in weights.items()}


def build_roles(settings: dict[str, Any], process: Process) -> dict[str, Role]:
    """Actor and reference from the weights, critic and reward model on the same trunk."""
    model, parallel = shape(settings), ParallelConfig(**settings["parallel"])
    placement = build_placements(parallel, {}, {ALL}, process.world_size, 600)[ALL]
    if placement.groups is None:
        raise RuntimeError("no placement")
    optim = OptimConfig(lr=settings["lr"], schedule="constant", clip_grad=0.0)
    engine_config = EngineConfig(micro_batch_tokens=settings["micro_batch_tokens"])
    weights, exchange, roles = load_file(settings["weights"]), Exchange(), {}
    for name, head in HEADS.items():
        learns = optim if name in ("actor", "critic") else None
        engine = build_engine(model, head, placement.groups, engine_config, learns, 10**6, process.device, 1)
        own = {t.name: initial_tensor(t, model, 1) for t in canonical_tensors(model, head) if t.name not in weights}
        write_stage(engine.chunks, placement.groups, {**own, **weights}.__getitem__)
        if engine.optimizer is not None:
            engine.optimizer.reload_main_weights()
        roles[name] = Role(name, placement, engine, exchange)
    return roles


def build_ppo(settings: dict[str, Any], process: Process) -> PPO:
    """The algorithm as ``zj train`` builds it."""
    rows = settings["rows"]
    config = PPOConfig(
        sampling=SamplingConfig(
            max_new_tokens=settings["new_tokens"], temperature=settings["temperature"], max_batch_rows=rows
        ),
        prompts_per_step=rows,
        minibatch_size=rows // settings["minibatches"],
        epochs=1,
        recompute_logprobs=settings["recompute"],
        whiten_scores=False,
    )
    stop_ids = frozenset({settings["stop"]}) if settings["ragged"] else frozenset()
    rollout = Rollout(config.sampling, stop_ids, 0)
    shaping = Shaping(config, ScoreScale(), lambda ids: "")
    roles, prompts = PPORoles(**build_roles(settings, process)), Prompts(settings["prompts"])
    return PPO(config, roles, prompts, rollout, World.current(), 0, Timers(process.device), shaping)


@contextmanager
def recorded_lengths(ppo: PPO, into: list[int]) -> Iterator[None]:
    """Response lengths of the iteration, in the order of the prompts."""
    learn = ppo.learn

    def recording(samples: Any) -> Any:
        masks = samples.local.per_token["response_mask"].split()
        into.extend(gather_in_order([int(mask.sum()) for mask in masks]))
        return learn(samples)

    ppo.learn = recording  # type: ignore[method-assign]
    yield
    ppo.learn = learn  # type: ignore[method-assign]


def serve(ppo: PPO, process: Process) -> None:
    """One iteration a line of input, read by rank 0."""
    watch = Stopwatch()
    _say(process, {"ready": True})
    while _another(process):
        lengths: list[int] = []
        with recorded_lengths(ppo, lengths):
            watch.seconds, begin, busy = 0.0, time.perf_counter(), time.process_time()
            ppo.step()
            whole, processor = time.perf_counter() - begin, time.process_time() - busy
        found = {name.removeprefix("time/"): value for name, value in ppo.timers.pop().items()}
        _say(
            process,
            {
                "seconds": {
                    "generate": found["generate"],
                    "score": found["collect"] - found["generate"],
                    "learn": whole - found["collect"],
                },
                "processor": processor,
                "outside": 1.0 - watch.seconds / whole,
                "lengths": lengths,
                "peak_mib": peak_memory_mib(process.device),
            },
        )


def _another(process: Process) -> bool:
    asked = [bool(sys.stdin.readline())] if process.rank == 0 else [False]
    dist.broadcast_object_list(asked, 0)
    return asked[0]


def _say(process: Process, message: dict[str, Any]) -> None:
    if process.rank == 0:
        sys.stdout.write("PEER " + json.dumps(message) + "\n")
        sys.stdout.flush()


def main() -> None:
    """Serve iterations until the input ends."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    with session("cpu", 600) as process:
        torch.set_num_threads(settings["threads"])
        weights = Path(settings["weights"])
        if process.rank == 0 and not weights.exists():
            part = weights.with_suffix(".part")
            save_file(initial_weights(shape(settings), settings["stop"], settings["stop_logit"]), part)
            os.replace(part, weights)
        dist.barrier()
        serve(build_ppo(settings, process), process)


if __name__ == "__main__":
    main()
