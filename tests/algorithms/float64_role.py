"""Roles in float64 on plain-torch models, so that only the algorithm layer can differ between worlds.

Every rank holds a whole model and serves its own home rows; gradients are summed over the world.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_zj.config.model import HeadKind, ModelConfig, Want
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.data.packing import PackedBatch, pack, plan_packs
from megatron_zj.engine.objective import Comparing, Metrics, Objective, Selective
from megatron_zj.roles.exchange import Pending
from megatron_zj.roles.world import WorldBatch, gather_in_order
from megatron_zj.rollout.generate import Rollout
from megatron_zj.rollout.sampling import sample_noise
from tests.algorithms.plain_optimizer import adamw, apply_gradients
from tests.algorithms.plain_rollout import answer
from tests.helpers.reference_llama import ReferenceLlama

EXACT = torch.float64
UNREAD = 7.0  # what stands where an output is not asked for: any algorithm that looks there is far off


class Float64Role:
    """As ``Role``, without engines and placements.  ``budget``: tokens of a micro-batch."""

    engine = None

    def __init__(self, model: ModelConfig, head: HeadKind, weights: dict[str, Tensor], budget: int) -> None:
        self.model = ReferenceLlama(model, head, state=weights, dtype=EXACT)
        self.optimizer, self.budget, self.num_updates = adamw(self.model), budget, 0

    @torch.no_grad()
    def infer(
        self, want: Want, batch: WorldBatch, temperature: float = 1.0, at: str | None = None
    ) -> Pending[Rows | Tensor]:
        rows = batch.local.tokens
        assert want == "scores" or at is not None, f"{want} is computed for every token, though few are read"
        empty = torch.zeros(0, dtype=EXACT)
        found = self.model.outputs(rows.split(), want, temperature) if len(rows.lengths) else empty
        if at is not None:
            found = found.where(batch.local.per_token[at].values != 0, UNREAD)
        return Pending(lambda: found if want == "scores" else rows.replace(found))

    def generate(self, sample: Any, prompts: WorldBatch) -> WorldBatch:
        return WorldBatch.gather(sample(self, prompts.local))

    def update(self, objective: Objective, batch: WorldBatch, row_ids: Sequence[int] | None = None) -> Pending[Metrics]:
        loss, metrics = self._sums(objective, batch, row_ids)
        self.optimizer.zero_grad(set_to_none=False)
        (loss / metrics["weight"]).backward()
        if isinstance(objective, Comparing) and objective.differences_only:
            self.model.score_head.bias.grad = None
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad)
        norm, rate = apply_gradients(self.model, self.optimizer, self.num_updates)
        self.num_updates += 1
        return Pending(lambda: metrics | {"grad_norm": norm, "lr": rate})

    @torch.no_grad()
    def evaluate(self, objective: Objective, batch: WorldBatch) -> Pending[Metrics]:
        metrics = self._sums(objective, batch, None)[1]
        return Pending(lambda: dict(metrics))

    def _sums(
        self, objective: Objective, batch: WorldBatch, row_ids: Sequence[int] | None
    ) -> tuple[Tensor, dict[str, float]]:
        """This rank's loss, and the world's metrics by the world's weight."""
        home = batch.home[dist.get_rank()]
        units = [[row - home[0] for row in unit if row in home] for unit in batch.units(row_ids)]
        lengths = batch.local.tokens.lengths.tolist()
        loss, sums = sum(p.sum() * 0.0 for p in self.model.parameters()), {"weight": 0.0, "loss": 0.0}
        for ids in plan_packs(lengths, [unit for unit in units if unit], self.budget):
            packed = pack(batch.local, ids)
            outputs = self._outputs(packed, objective.wants, objective.temperature)
            if isinstance(objective, Selective):
                needed = packed.targets & (objective.needs(packed) != 0)
                outputs = {want: given.where(needed, UNREAD) for want, given in outputs.items()}
            terms = objective(outputs, packed)
            loss = loss + terms.loss
            for name, value in {"weight": objective.weight(packed), "loss": terms.loss, **terms.metrics}.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        totals: dict[str, float] = {}
        for part in gather_in_order([sums]):
            for name, value in part.items():
                totals[name] = totals.get(name, 0.0) + value
        weight = totals.pop("weight")
        return loss, {name: value / weight for name, value in totals.items()} | {"weight": weight}

    def _outputs(self, packed: PackedBatch, wants: Sequence[Want], temperature: float) -> dict[Want, Tensor]:
        places = zip(packed.cu_seqlens_list, packed.lengths, strict=False)
        rows = [packed.tokens[start : start + length] for start, length in places]
        outputs: dict[Want, Tensor] = {}
        for want in wants:
            if want == "scores":
                outputs[want] = self.model.outputs(rows, want)
            elif self.model.head == "score":
                outputs[want] = torch.cat([self.model.score_head(self.model.hidden(row))[:, 0] for row in rows])
            else:  # a slot carries what is said of the next token
                found = [self.model.outputs([row], want, temperature) for row in rows]
                outputs[want] = torch.cat([torch.cat([row[1:], row.new_zeros(1)]) for row in found])
        return outputs


class Float64Rollout(Rollout):
    """Samples from a Float64Role, one row and one token at a time."""

    def at_step(self, step: int) -> Any:
        return lambda role, prompts: self._samples(role, prompts, step)

    def _samples(self, role: Float64Role, prompts: Batch, step: int) -> Batch:
        rows, masks, logprobs, cut = [], [], [], []
        ids = prompts.per_row["sample_id"].tolist()
        for prompt, sample_id in zip(prompts.tokens.split(), ids, strict=True):
            noise = sample_noise(self.seed, step, sample_id, self.sampling.max_new_tokens)
            assert self.decode is not None
            drawn, sampled, ended = answer(
                role.model, prompt.tolist(), noise, self.sampling, self.stop_ids, self.decode
            )
            rows.append(torch.cat([prompt, torch.tensor(drawn)]))
            masks.append((torch.arange(len(rows[-1])) >= len(prompt)).long())
            logprobs.append(torch.tensor([0.0] * len(prompt) + sampled, dtype=EXACT))
            cut.append(int(not ended))
        fields = {"response_mask": Rows.of(masks, torch.int64), "sampling_logprobs": Rows.of(logprobs, EXACT)}
        return Batch(Rows.of(rows, torch.int64), fields, prompts.per_row | {"truncated": torch.tensor(cut)})
