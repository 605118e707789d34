"""How a model computes and learns: precision, recompute, micro-batches, AdamW and its schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LossScaleConfig:
    """fp16 loss scaling, meant for the mean loss of a full micro-batch (the engine's losses are sums).

    ``initial`` is kept for ever when ``window`` is 0 (constant scale).
    """

    initial: float = 65536.0
    window: int = 1000  # steps without overflow before the scale doubles
    minimum: float = 1.0  # the scale never falls below
    hysteresis: int = 2  # overflows before the scale halves


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How one model is run, apart from its layout.  None of it changes an fp32 result."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    micro_batch_tokens: int = 4096  # budget of one packed micro-batch, tokens
    recompute: Literal["none", "selective", "full"] = "none"  # activation recomputation
    recompute_modules: tuple[Literal["core_attn", "mlp", "layernorm"], ...] = ("core_attn",)  # selective only
    recompute_num_layers: int = 1  # full only: layers a recomputed block
    distributed_optimizer: bool = False  # shard optimizer state over data-parallel ranks
    overlap_grad_reduce: bool = False  # reduce gradients while the backward pass still runs
    overlap_param_gather: bool = False  # needs distributed_optimizer and overlap_grad_reduce
    loss_scale: LossScaleConfig = LossScaleConfig()  # fp16 only
    offload_idle: bool = False  # roles that share ranks: the idle ones' weights and optimizer state go to the host
    check_for_nan: bool = True  # stop on a NaN or Inf loss

    def __post_init__(self) -> None:
        if self.micro_batch_tokens < 1:
            raise ValueError(f"micro_batch_tokens must be >= 1, got {self.micro_batch_tokens}")
        if self.overlap_param_gather and not (self.distributed_optimizer and self.overlap_grad_reduce):
            raise ValueError("overlap_param_gather needs distributed_optimizer=true and overlap_grad_reduce=true")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter 2019) with a warm-up and a decay, counted in optimizer steps."""

    lr: float = 1e-3  # peak
    min_lr: float = 0.0  # where the decay ends
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.95  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.0  # not applied to biases, norms, scalar heads' biases
    clip_grad: float = 1.0  # global gradient norm; 0: no clipping
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = 0  # optimizer steps of linear warm-up
    decay_steps: int | None = None  # None: the run's number of optimizer steps

    def __post_init__(self) -> None:
        if self.lr < 0 or self.min_lr < 0 or self.min_lr > max(self.lr, 0.0):
            raise ValueError(f"need 0 <= min_lr <= lr, got min_lr={self.min_lr} lr={self.lr}")
        if self.warmup_steps < 0 or (self.decay_steps is not None and self.decay_steps <= self.warmup_steps):
            raise ValueError(f"need 0 <= warmup_steps < decay_steps, got {self.warmup_steps}, {self.decay_steps}")
