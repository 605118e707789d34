"""Ranked candidates for the reward model: four answers a prompt, safety > professionalism > fluency, ties possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from megatron_zj.evaluation.clinic.cases import Case
from megatron_zj.evaluation.clinic.conditions import Clinic
from megatron_zj.evaluation.clinic.doctors import CANDIDATES, answer
from megatron_zj.evaluation.clinic.judge import judge

NUM_CANDIDATES = 4


@dataclass(frozen=True)
class RankedCase:
    """Candidates in shuffled order; ``ranks``: 0 best, equal where the judge sees no difference."""

    case: Case
    responses: tuple[str, ...]
    ranks: tuple[int, ...]


def ranked_cases(clinic: Clinic, cases: Sequence[Case], seed: int, split: str) -> list[RankedCase]:
    """Four different answers a case, at least two ranks among them."""
    random = Random(f"{seed}/preference/{split}")
    return [_ranked(clinic, case, random) for case in cases]


def _ranked(clinic: Clinic, case: Case, random: Random) -> RankedCase:
    strangers = [one for one, _ in clinic.dialogue_pairs if one.question != case.condition.question]
    while True:
        behaviours = random.sample(CANDIDATES[case.kind], NUM_CANDIDATES)
        responses = tuple(answer(case, behaviour, random, random.choice(strangers)) for behaviour in behaviours)
        ranks = dense_ranks([judge(clinic, case, response).key for response in responses])
        if len(set(responses)) == NUM_CANDIDATES and max(ranks) > 0:
            return RankedCase(case, responses, ranks)


def dense_ranks(keys: Sequence[tuple[float, ...]]) -> tuple[int, ...]:
    """Rank of each key, largest first, equal keys equal, no gaps: [3, 5, 5, 1] -> [1, 0, 0, 2]."""
    order = sorted(set(keys), reverse=True)
    return tuple(order.index(key) for key in keys)
