"""How a model computes and learns: precision, recompute, micro-batches, AdamW and its schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_zj.config.ranges import check_ranges


@dataclass(frozen=True, kw_only=True)
class LossScaleConfig:
    """fp16 loss scaling, meant for the mean loss of a full micro-batch (the engine's losses are sums).

    ``initial`` is kept for ever when ``window`` is 0 (constant scale).
    """

    initial: float = 65536.0
    window: int = 1000  # steps without overflow before the scale doubles
    minimum: float = 1.0  # the scale never falls below
    hysteresis: int = 2  # overflows before the scale halves

    def __post_init__(self) -> None:
        check_ranges(self, initial="(0, inf)", window="[0, inf)", minimum="(0, inf)", hysteresis="[1, inf)")


@dataclass(frozen=True, kw_only=True)
class ForwardConfig:
    """How one model computes, trained or not."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    micro_batch_tokens: int = 4096  # budget of one packed micro-batch, tokens

    def __post_init__(self) -> None:
        check_ranges(self, micro_batch_tokens="[1, inf)")


@dataclass(frozen=True, kw_only=True)
class EngineConfig(ForwardConfig):
    """How one model is run, apart from its layout.  None of it changes an fp32 result."""

    recompute: Literal["none", "selective", "full"] = "none"  # activation recomputation
    recompute_modules: tuple[Literal["core_attn", "mlp", "layernorm"], ...] = ("core_attn",)  # selective only
    recompute_num_layers: int = 1  # full only: layers a recomputed block
    distributed_optimizer: bool = False  # shard optimizer state over data-parallel ranks
    overlap_grad_reduce: bool = False  # reduce gradients while the backward pass still runs
    overlap_param_gather: bool = False  # needs distributed_optimizer and overlap_grad_reduce
    loss_scale: LossScaleConfig = LossScaleConfig()  # fp16 only
    offload_idle: bool = False  # roles that share ranks: the idle ones' weights and optimizer state go to the host
    overlap_offload: bool = False  # of idle models: copy beside the computing; up to two more on the device meanwhile
    check_for_nan: bool = True  # stop on a NaN or Inf loss or gradient; False: skip such steps

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, recompute_num_layers="[1, inf)")
        if self.overlap_param_gather and not (self.distributed_optimizer and self.overlap_grad_reduce):
            raise ValueError("overlap_param_gather needs distributed_optimizer=true and overlap_grad_reduce=true")
        if self.overlap_offload and not self.offload_idle:
            raise ValueError("overlap_offload needs offload_idle=true")


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
        check_ranges(
            self,
            lr="[0, inf)",
            min_lr="[0, inf)",
            beta1="[0, 1)",
            beta2="[0, 1)",
            eps="(0, inf)",
            weight_decay="[0, inf)",
            clip_grad="[0, inf)",
            warmup_steps="[0, inf)",
            decay_steps="[1, inf)",
        )
        if self.min_lr > self.lr:
            raise ValueError(f"need min_lr <= lr, got min_lr={self.min_lr} lr={self.lr}")
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            raise ValueError(f"need warmup_steps < decay_steps, got {self.warmup_steps}, {self.decay_steps}")
