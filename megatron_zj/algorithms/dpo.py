"""Direct preference optimization on ranked responses (Rafailov et al. 2023, eq. 7).

With r = beta x (log pi(response) - log pi_ref(response)), each pair of a group costs -log sigmoid(r_better - r_worse),
averaged over the group's pairs and then over groups; ``label_smoothing`` e takes (1 - e) of it and e of the reverse
(Mitchell 2023).

The loss needs sums over whole responses, which context parallelism and packing cut apart.  So a step first computes
log pi without gradients, from it the loss and its derivative c by each response's log-probability, where the rows are
at home; the update then descends on the sum of c x log pi, whose gradient is the loss's own, by the chain rule.  One
forward pass more, and in return any layout works and a group need not fit one micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_zj.algorithms.experience import as_rows
from megatron_zj.algorithms.functional import wins
from megatron_zj.algorithms.resumable import Resumable
from megatron_zj.config.algorithm import DPOConfig
from megatron_zj.config.model import Want
from megatron_zj.data.batch import GROUP, Batch
from megatron_zj.data.packing import PackedBatch
from megatron_zj.data.stream import Stream
from megatron_zj.engine.objective import LossTerms, Metrics
from megatron_zj.roles.role import Role
from megatron_zj.roles.world import World, WorldBatch, world_sum
from megatron_zj.runtime.timers import Timers

_SUMS = ("loss", "pairs", "pair_accuracy", "margin", "reward_better", "reward_worse", "groups")


@dataclass(frozen=True)
class WeightedLogprobs:
    """sum of ``loss_weight`` x log-probability, by the sum of ``loss_count``: both fields of the tokens."""

    wants: tuple[Want, ...] = ("logprobs",)
    temperature: float = 1.0

    def weight(self, batch: PackedBatch) -> Tensor:
        """What the rows say."""
        return (batch.per_token["loss_count"] * batch.targets).sum()

    def needs(self, batch: PackedBatch) -> Tensor:
        """[T]: response tokens."""
        return batch.per_token["loss_weight"]

    def __call__(self, outputs: dict[str, Tensor], batch: PackedBatch) -> LossTerms:
        return LossTerms((outputs["logprobs"] * batch.per_token["loss_weight"] * batch.targets).sum())


class DPO(Resumable):
    """One optimizer step a step, on the next ranked groups of the stream."""

    def __init__(
        self,
        config: DPOConfig,
        actor: Role,
        reference: Role,
        stream: Stream,
        world: World,
        timers: Timers,
        validation: Stream | None = None,
    ) -> None:
        self.config, self.actor, self.reference, self.stream = config, actor, reference, stream
        self.world, self.timers, self.validation = world, timers, validation
        super().__init__(stream=stream)

    @property
    def roles(self) -> dict[str, Role]:
        """Every model of the algorithm, by name."""
        return {"actor": self.actor, "reference": self.reference}

    def step(self) -> Metrics:
        """Judge the next groups, then one update."""
        with self.timers("judge"):
            batch, metrics = self._judge(self.stream, self.config.global_batch_size)
        with self.timers("update"):
            updated = self.actor.update(WeightedLogprobs(), batch).wait()
        self.num_steps_done += 1
        return updated | _means(metrics) | {"tokens": float(sum(batch.row_lengths))}

    def evaluate(self) -> Metrics:
        """The loss over one epoch of the validation stream; {} without one."""
        if self.validation is None:
            return {}
        start, left, size = self.validation.state_dict(), self.validation.num_units, self.config.global_batch_size
        found = torch.zeros(len(_SUMS), dtype=torch.float64)
        for first in range(0, left, size):
            found += self._judge(self.validation, min(size, left - first))[1]
        self.validation.load_state_dict(start)
        return _means(found)

    def _judge(self, stream: Stream, num_groups: int) -> tuple[WorldBatch, Tensor]:
        """The next groups with their tokens' weights in the loss, and the world's sums."""
        drawn = stream.next(num_groups, self.world.rank, self.world.size)
        ungrouped = {name: values for name, values in drawn.per_row.items() if name != GROUP}
        batch = WorldBatch.gather(Batch(drawn.tokens, drawn.per_token, ungrouped))
        ref_logprobs = self.reference.infer("logprobs", batch)
        logprobs = as_rows(self.actor.infer("logprobs", batch).wait())
        gain = logprobs.replace(logprobs.values - as_rows(ref_logprobs.wait()).values)
        prompts = drawn.per_row["prompt_length"].tolist()
        gains = [float(row[start:].double().sum()) for row, start in zip(gain.split(), prompts, strict=True)]
        rewards_R = (self.config.beta * torch.tensor(gains, dtype=torch.float64)).requires_grad_()
        sums, first_rows = self._loss(rewards_R, drawn)
        (slope_R,) = torch.autograd.grad(sums[0] + 0.0 * rewards_R.sum(), rewards_R)
        weights, counts = torch.zeros_like(gain.values), torch.zeros_like(drawn.tokens.values)
        for row, (weight, count) in enumerate(
            zip(gain.replace(weights).split(), gain.replace(counts).split(), strict=True)
        ):
            weight[prompts[row] :] = self.config.beta * float(slope_R[row])
            count[-1] = int(row in first_rows)
        fields = {"loss_weight": gain.replace(weights), "loss_count": gain.replace(counts)}
        return batch.with_fields(fields), world_sum(sums)

    def _loss(self, rewards_R: Tensor, rows: Batch) -> tuple[Tensor, set[int]]:
        """[len(_SUMS)] of this rank's groups, and the first row of each group that has a pair."""
        sums, first_rows = torch.zeros(len(_SUMS), dtype=torch.float64), set()
        smoothing = self.config.label_smoothing
        for group in rows.units():
            pairs = _pairs(group, rows.per_row["rank"].tolist(), self.config.pairs == "best_worst")
            if not pairs:
                continue
            better, worse = torch.tensor(pairs).unbind(1)
            margin_P = rewards_R[better] - rewards_R[worse]
            sigmoid = torch.nn.functional.logsigmoid
            loss = (-(1 - smoothing) * sigmoid(margin_P) - smoothing * sigmoid(-margin_P)).mean()
            entries = [margin_P.new_tensor(float(len(margin_P))), wins(margin_P).sum(), margin_P.sum()]
            entries += [rewards_R[better].sum(), rewards_R[worse].sum(), margin_P.new_ones(())]
            sums = sums + torch.stack([loss, *entries])
            first_rows.add(group[0])
        return sums, first_rows


def _pairs(group: Sequence[int], ranks: Sequence[int], extremes: bool) -> list[tuple[int, int]]:
    """(better, worse) rows of a group; ``extremes``: the first best and the first worst only."""
    if extremes:
        best, worst = min(group, key=lambda row: ranks[row]), max(group, key=lambda row: ranks[row])
        return [(best, worst)] if ranks[best] < ranks[worst] else []
    return [(one, other) for one in group for other in group if ranks[one] < ranks[other]]


def _means(sums: Tensor) -> Metrics:
    """Per group the loss, per pair the rest."""
    found = dict(zip(_SUMS, sums.tolist(), strict=True))
    groups, pairs = max(found.pop("groups"), 1.0), max(found.pop("pairs"), 1.0)
    return {name: value / (groups if name == "loss" else pairs) for name, value in found.items()}
