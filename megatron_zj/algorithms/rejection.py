"""Rejection sampling: SFT on what the reward model likes best.  Two forms, one SFT (ChiMed-GPT, arXiv 2311.06025).

``BestOfN``, as the paper says: every iteration samples N answers a prompt from the current model, keeps each prompt's
best by reward (the first of equals) and learns it.

``BestOfAll``, as the released code does: scores existing dialogues once, keeps the global best ``keep`` of them (of
equal scores the earlier in the data), and learns those; nothing is sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_zj.algorithms.experience import (
    as_rows,
    as_tensor,
    averages,
    describe_samples,
    measure_parity,
    minibatches,
    next_prompts,
    prefixed,
    require_parity,
)
from megatron_zj.algorithms.functional import first_of_equals, row_digests
from megatron_zj.algorithms.health import Health
from megatron_zj.algorithms.pretrain import NextToken
from megatron_zj.algorithms.resumable import Resumable
from megatron_zj.algorithms.shaping import Shaping, require_finite_scores
from megatron_zj.config.algorithm import RejectionConfig
from megatron_zj.data.batch import Batch
from megatron_zj.data.stream import Stream
from megatron_zj.engine.objective import Metrics
from megatron_zj.roles.role import Role
from megatron_zj.roles.world import World, WorldBatch, gather_in_order, world_sum
from megatron_zj.rollout.generate import Rollout
from megatron_zj.runtime.seed import keyed_generator
from megatron_zj.runtime.timers import Timers


class BestOfN(Resumable):
    """Sample, keep the best answer to each prompt, SFT, repeat."""

    def __init__(
        self,
        config: RejectionConfig,
        roles: dict[str, Role],
        prompts: Stream,
        rollout: Rollout,
        world: World,
        seed: int,
        timers: Timers,
        shaping: Shaping,
    ) -> None:
        self.config, self.roles, self.prompts, self.rollout = config, roles, prompts, rollout
        self.world, self.seed, self.timers, self.shaping = world, seed, timers, shaping
        self.health = Health(config.health, None, speaks=world.rank == 0)
        super().__init__(prompts=prompts, shaping=shaping, health=self.health)

    def step(self) -> Metrics:
        """One iteration."""
        with self.timers("collect"):
            best, metrics = self.collect()
        with self.timers("learn"):
            metrics |= self.learn(best)
        self.num_steps_done += 1
        return metrics | self.health(self.num_steps_done, metrics)

    def collect(self) -> tuple[WorldBatch, Metrics]:
        """Each prompt's best answer, as rows to learn."""
        config, actor = self.config, self.roles["actor"]
        with self.timers("generate"):
            prompts = next_prompts(self.prompts, config, self.world)
            samples = actor.generate(self.rollout.at_step(self.num_steps_done), prompts)
        raw_scores, local, metrics = self.roles["reward"].infer("scores", samples), samples.local, {}
        if any(limit is not None for limit in vars(config.parity).values()):
            logprobs = as_rows(actor.infer("logprobs", samples, self.rollout.temperature, "response_mask").wait())
            metrics = measure_parity(local, logprobs)
            require_parity(metrics, config.parity)
        raw = as_tensor(raw_scores.wait())
        scores = self.shaping(raw, local)
        best = scores.view(-1, config.samples_per_prompt).max(1)
        first = torch.arange(len(best.values)) * config.samples_per_prompt
        chosen = local.select((first + best.indices).tolist())
        sums = world_sum(torch.stack([best.values.double().sum(), torch.tensor(float(len(first)))]))
        metrics |= describe_samples(local, raw, scores) | {"score_best": float(sums[0] / sums[1])}
        return WorldBatch.gather(chosen.with_fields({"loss_mask": chosen.per_token["response_mask"]})), metrics

    def learn(self, best: WorldBatch) -> Metrics:
        """SFT on the kept answers."""
        config, objective, updates = self.config, NextToken(), []
        for ids in minibatches(best, config, self.seed, self.num_steps_done):
            updates.append(self.roles["actor"].update(objective, best, ids).wait())
        return prefixed("actor/", averages(updates))


class BestOfAll(Resumable):
    """Score all dialogues, keep the global best, SFT on them."""

    def __init__(
        self,
        config: RejectionConfig,
        roles: dict[str, Role],
        dialogues: Stream,
        world: World,
        seed: int,
        timers: Timers,
    ) -> None:
        self.config, self.roles, self.dialogues = config, roles, dialogues
        self.world, self.seed, self.timers = world, seed, timers
        super().__init__(dialogues=dialogues)
        self.kept: list[tuple[int, float]] = []  # (draw, score), best first
        self._rows: WorldBatch | None = None
        self._ids: list[int] = []  # of each kept draw, its global row id in _rows

    def step(self) -> Metrics:
        """One optimizer step on the next of the kept dialogues, in a fresh order each pass."""
        with self.timers("score"):
            rows = self._kept_rows()
        with self.timers("update"):
            ids = self._next_ids()
            metrics = self.roles["actor"].update(NextToken(), rows, ids).wait()
        tokens = sum(rows.row_lengths[row] for row in ids)
        self.num_steps_done += 1
        scores = [score for _, score in self.kept]
        return NextToken().summarise(metrics) | {
            "kept": float(len(scores)),
            "kept_score": sum(scores) / len(scores),
            "kept_score_lowest": scores[-1],
            "tokens": float(tokens),
        }

    def _next_ids(self) -> list[int]:
        """Global row ids of this step: passes over the kept rows end to end, each in an order keyed by the pass."""
        count, size = len(self.kept), self.config.minibatch_size
        places = range(self.num_steps_done * size, (self.num_steps_done + 1) * size)
        orders = {
            one: torch.randperm(count, generator=keyed_generator(self.seed, "kept", one))
            for one in range(places[0] // count, places[-1] // count + 1)
        }
        ids = [self._ids[int(orders[place // count][place % count])] for place in places]
        return list(dict.fromkeys(ids))  # a pass that ends inside a step may begin the next with the same row

    def _kept_rows(self) -> WorldBatch:
        """The kept dialogues on the ranks that drew them; scores them all at the first step of a run."""
        if self._rows is not None:
            return self._rows
        batches, draws = self._all_dialogues(), []
        if not self.kept:
            found = [self._scores(batch) for batch in batches]
            everything = [entry for entries in zip(batches, found, strict=True) for entry in _entries(*entries)]
            self.kept = _ranked(gather_in_order(everything))[: self.config.keep]
        wanted = {draw for draw, _ in self.kept}
        parts = []
        for batch in batches:
            own = batch.local.per_row["draw"].tolist()
            chosen = [row for row, draw in enumerate(own) if draw in wanted]
            parts.append(batch.local.select(chosen))
            draws += [own[row] for row in chosen]
        self._rows = WorldBatch.gather(Batch.concat(parts))
        place = {draw: row for row, draw in enumerate(gather_in_order(draws))}
        self._ids = [place[draw] for draw, _ in self.kept]
        return self._rows

    def _all_dialogues(self) -> list[WorldBatch]:
        """One epoch of the stream in pieces; a run never draws beyond it."""
        batches, left = [], self.dialogues.num_units
        start = self.dialogues.state_dict()
        while left > 0:
            size = min(left, self.config.prompts_per_step)
            batches.append(WorldBatch.gather(self.dialogues.next(size, self.world.rank, self.world.size)))
            left -= size
        self.dialogues.load_state_dict(start)
        return batches

    def _scores(self, batch: WorldBatch) -> list[float]:
        scores_R = as_tensor(self.roles["reward"].infer("scores", batch).wait())
        require_finite_scores(scores_R)
        scores: list[float] = scores_R.tolist()
        return scores

    def state_dict(self) -> dict[str, Any]:
        """Which dialogues were kept, with their scores, too."""
        return super().state_dict() | {"kept": [list(entry) for entry in self.kept]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo ``state_dict``; the rows are read again, their scores are not computed again."""
        super().load_state_dict(state)
        self.kept, self._rows = [(int(draw), float(score)) for draw, score in state["kept"]], None


_Entry = tuple[int, float, int, str]  # draw, score, place in the data, digest of the row


def _entries(batch: WorldBatch, scores: Sequence[float]) -> list[_Entry]:
    """Of this rank's rows."""
    rows = batch.local.per_row
    digests = row_digests(batch.local.tokens)
    return list(zip(rows["draw"].tolist(), scores, rows["index"].tolist(), digests, strict=True))


def _ranked(entries: Sequence[_Entry]) -> list[tuple[int, float]]:
    """(draw, score), best first; equal dialogues have the score of the first in the data, and stay in its order."""
    ordered = sorted(entries, key=lambda entry: entry[2])
    scores = [ordered[first][1] for first in first_of_equals([entry[3] for entry in ordered])]
    found = [(entry[0], score) for entry, score in zip(ordered, scores, strict=True)]
    return sorted(found, key=lambda entry: -entry[1])
