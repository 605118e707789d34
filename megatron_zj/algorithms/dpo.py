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

import torch
from torch import Tensor

from megatron_zj.algorithms.experience import as_rows
from megatron_zj.algorithms.functional import (
    mask_responses,
    preference_loss,
    ranked_pairs,
    response_sums,
    spread_over_responses,
    wins,
)
from megatron_zj.algorithms.objectives import WeightedLogprobs
from megatron_zj.algorithms.resumable import Resumable
from megatron_zj.config.algorithm import DPOConfig
from megatron_zj.data.batch import GROUP, Batch
from megatron_zj.data.stream import Stream
from megatron_zj.engine.objective import Metrics
from megatron_zj.roles.role import Role
from megatron_zj.roles.world import World, WorldBatch, world_sum
from megatron_zj.runtime.timers import Timers

_SUMS = ("loss", "pairs", "pair_accuracy", "margin", "reward_better", "reward_worse", "groups")


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
        mask = mask_responses(drawn.tokens, drawn.per_row["prompt_length"])
        batch = WorldBatch.gather(Batch(drawn.tokens, {**drawn.per_token, "response_mask": mask}, ungrouped))
        answers = [role.infer("logprobs", batch, at="response_mask") for role in (self.reference, self.actor)]
        ref_logprobs, logprobs = (as_rows(answer.wait()).values for answer in answers)
        gain = drawn.tokens.replace(logprobs - ref_logprobs)
        rewards_R = (self.config.beta * response_sums(gain, mask)).requires_grad_()
        sums, first_rows = self._loss(rewards_R, drawn)
        (slope_R,) = torch.autograd.grad(sums[0], rewards_R)
        weights_R = (self.config.beta * slope_R).to(gain.values.dtype)
        counts_T = torch.zeros_like(drawn.tokens.values)
        counts_T[drawn.tokens.offsets[1:][first_rows] - 1] = 1
        fields = {"loss_weight": spread_over_responses(weights_R, mask), "loss_count": mask.replace(counts_T)}
        return batch.with_fields(fields), world_sum(sums)

    def _loss(self, rewards_R: Tensor, rows: Batch) -> tuple[Tensor, Tensor]:
        """[len(_SUMS)] of this rank's groups, and the first row [G] of each group that has a pair."""
        ranks, extremes = rows.per_row["rank"].tolist(), self.config.pairs == "best_worst"
        pairs = [(group[0], *pair) for group in rows.units() for pair in ranked_pairs(group, ranks, extremes)]
        first, better, worse = torch.tensor(pairs, dtype=torch.int64).view(-1, 3).unbind(1)
        margin_P, first_rows = rewards_R[better] - rewards_R[worse], torch.unique(first)
        loss_P = preference_loss(margin_P, self.config.label_smoothing) / first.bincount()[first]
        of_pairs = [loss_P, torch.ones_like(margin_P), wins(margin_P), margin_P, rewards_R[better], rewards_R[worse]]
        return torch.stack([*(terms.sum() for terms in of_pairs), margin_P.new_tensor(len(first_rows))]), first_rows


def _means(sums: Tensor) -> Metrics:
    """Per group the loss, per pair the rest."""
    found = dict(zip(_SUMS, sums.tolist(), strict=True))
    groups, pairs = max(found.pop("groups"), 1.0), max(found.pop("pairs"), 1.0)
    return {name: value / (groups if name == "loss" else pairs) for name, value in found.items()}
