"""What an algorithm minimises, as the engine sees it: sums over a micro-batch and an integer weight."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from megatron_zj.config.model import Want
from megatron_zj.data.packing import PackedBatch

Metrics = dict[str, float]


@dataclass(frozen=True)
class LossTerms:
    """Sums over the micro-batch; the engine divides them by the global weight."""

    loss: Tensor  # scalar
    metrics: dict[str, Tensor] = field(default_factory=dict)  # scalars, same denominator as the loss


@runtime_checkable
class Selective(Protocol):
    """An objective that reads per-token outputs at some slots only; the others are then not computed (``reads``)."""

    def needs(self, batch: PackedBatch) -> Tensor:
        """[T]: not 0 at the slots whose outputs it reads, of those with a target."""


@runtime_checkable
class Comparing(Protocol):
    """An objective that may look at differences of outputs alone."""

    @property
    def differences_only(self) -> bool:
        """Whether a constant added to all outputs leaves the loss as it is.

        The gradient of the head's bias is then 0 but for rounding, which Adam would blow up to whole steps: the
        engine takes it for the 0 it is, and the bias stays.
        """


@runtime_checkable
class Rowwise(Protocol):
    """An objective that may look along rows: at tokens that context parallelism gives to different ranks."""

    @property
    def whole_rows(self) -> bool:
        """Whether it is called with whole packs, outputs and batch alike, as without context parallelism.

        Every cp rank then computes the same sums, and the engine counts them once.
        """


class Objective(Protocol):
    """A loss over head outputs.  ``outputs`` holds what ``wants`` names.

    Per-token outputs (logprobs, entropy, values) are [T] and prediction-aligned like ``batch.per_token``;
    scores are [R].  With context parallelism T is this rank's share (of a ``Rowwise`` objective: still the whole pack);
    scores are the same on every cp rank and the engine counts them once.
    """

    @property
    def wants(self) -> tuple[Want, ...]:
        """What the head is asked for."""

    @property
    def temperature(self) -> float:
        """Divides the logits before log-probabilities and entropy: 1, or a rollout's sampling temperature."""

    def weight(self, batch: PackedBatch) -> Tensor:
        """This micro-batch's share of the denominator: tokens, or pairs; an integer scalar."""

    def __call__(self, outputs: dict[str, Tensor], batch: PackedBatch) -> LossTerms:
        """The loss of the micro-batch, summed."""
