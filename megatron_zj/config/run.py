"""RunConfig: everything a run is, as one tree.  A field is a Hydra group; see conf/."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_zj.config.algorithm import AlgorithmConfig
from megatron_zj.config.checkpoint import CheckpointConfig
from megatron_zj.config.data import DataConfig, TokenizerConfig
from megatron_zj.config.model import ModelConfig
from megatron_zj.config.optim import EngineConfig, OptimConfig
from megatron_zj.config.parallel import ParallelConfig, PlacementConfig
from megatron_zj.config.ranges import check_ranges


@dataclass(frozen=True, kw_only=True)
class ProcessSettings:
    """What every command on a model has."""

    seed: int = 0  # root of every random stream (runtime/seed.py)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_seconds: int = 600  # of every process group: how long a rank waits for a dead one

    def __post_init__(self) -> None:
        check_ranges(self, timeout_seconds="[1, 31536000]")


@dataclass(frozen=True, kw_only=True)
class OutputSettings(ProcessSettings):
    """A command that leaves files behind."""

    dir: Path = Path("runs/default")  # logs, metrics, resolved config, checkpoints, results


@dataclass(frozen=True, kw_only=True)
class RunSettings(OutputSettings):
    """A training run: how long it is, and what it shows."""

    num_steps: int = 100  # algorithm steps (optimizer steps, or PPO iterations)
    log_every: int = 1  # steps between lines
    profile_steps: tuple[int, ...] = ()  # torch.profiler on these: <dir>/profile/step_<8 digits>_rank_<5>.json.gz
    eval_every: int = 0  # steps between validation passes; 0: only at the end, where there is validation data
    tensorboard: bool = False  # also write metrics for TensorBoard into dir
    wandb_project: str | None = None  # Weights & Biases, when installed

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, num_steps="[1, inf)", log_every="[1, inf)", profile_steps="[1, inf)", eval_every="[0, inf)")
        if beyond := [step for step in self.profile_steps if step > self.num_steps]:
            raise ValueError(f"profile_steps {beyond} come after the last step, num_steps {self.num_steps}; lower them")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run, whole and checked."""

    algorithm: AlgorithmConfig
    data: DataConfig
    run: RunSettings = RunSettings()
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)  # layout of the placement "all": every rank
    placements: dict[str, PlacementConfig] = field(default_factory=dict)  # named blocks of ranks, for split roles
    engine: EngineConfig = field(default_factory=EngineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    world_size: int | None = None  # what the experiment is laid out for; ``zj check`` uses it, torchrun must match it

    def __post_init__(self) -> None:
        check_ranges(self, world_size="[1, 1000000]")
