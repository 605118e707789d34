"""The ranking objective against a loop over pairs, and its readable metrics."""

import math

import pytest
import torch

from megatron_zj.algorithms.reward import RankedGroups
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.data.packing import pack

GROUPS = [4, 4, 4, 9, 9, 7, 7, 7, 7]
RANKS = [0, 1, 1, 0, 0, 2, 0, 3, 1]  # a tie inside group 4; group 9 is one tie
LENGTHS = [3, 2, 5, 2, 2, 4, 6, 3, 3]
SCORES = torch.tensor([0.3, -0.2, 0.9, 1.0, 2.0, -1.0, 0.4, 0.1, 0.7])


def _packed():
    batch = Batch(
        Rows.of([[1] * length for length in LENGTHS]),
        {},
        {"group": torch.tensor(GROUPS), "rank": torch.tensor(RANKS)},
    )
    return pack(batch, list(range(len(GROUPS))))


def _by_hand(centering: float) -> tuple[float, int]:
    total, groups = 0.0, 0
    for group in sorted(set(GROUPS)):
        rows = [row for row, own in enumerate(GROUPS) if own == group]
        pairs = [(a, b) for a in rows for b in rows if RANKS[a] < RANKS[b]]
        if not pairs:
            continue
        groups += 1
        total += sum(math.log(1 + math.exp(float(SCORES[b] - SCORES[a]))) for a, b in pairs) / len(pairs)
        total += centering * (sum(float(SCORES[row]) for row in rows) / len(rows)) ** 2
    return total, groups


@pytest.mark.parametrize("centering", [0.0, 0.3])
def test_loss_equals_the_loop_over_pairs(centering: float) -> None:
    objective, expected = RankedGroups(centering), _by_hand(centering)
    packed = _packed()
    assert objective({"scores": SCORES}, packed).loss.item() == pytest.approx(expected[0], abs=1e-6)
    assert int(objective.weight(packed)) == expected[1]
    assert not objective.weight(packed).is_floating_point()


def test_metrics_count_pairs_and_scores_once() -> None:
    objective, packed = RankedGroups(), _packed()
    weight = float(objective.weight(packed))
    terms = objective({"scores": SCORES}, packed)
    summary = objective.summarise({name: float(value) / weight for name, value in terms.metrics.items()})
    pairs = [(a, b) for a in range(9) for b in range(9) if GROUPS[a] == GROUPS[b] and RANKS[a] < RANKS[b]]
    assert summary["pair_accuracy"] == pytest.approx(sum(bool(SCORES[a] > SCORES[b]) for a, b in pairs) / len(pairs))
    longer = [1.0 if LENGTHS[a] > LENGTHS[b] else 0.5 if LENGTHS[a] == LENGTHS[b] else 0.0 for a, b in pairs]
    assert summary["longer_wins"] == pytest.approx(sum(longer) / len(longer))
    assert 0.5 in longer
    assert summary["score_mean"] == pytest.approx(SCORES.mean().item(), abs=1e-6)
    assert summary["score_deviation"] == pytest.approx(SCORES.std(correction=0).item(), abs=1e-6)


def test_a_pack_of_padding_weighs_nothing() -> None:
    batch = Batch(Rows.of([[1, 2]]), {}, {"group": torch.tensor([0]), "rank": torch.tensor([0])})
    empty = pack(batch, [], length=4)
    terms = RankedGroups(0.1)({"scores": torch.zeros(0, requires_grad=True)}, empty)
    assert terms.loss.item() == 0
    assert int(RankedGroups().weight(empty)) == 0


def _loss(objective: RankedGroups, outputs: dict[str, torch.Tensor]) -> float:
    packed = _packed()
    return float(objective(outputs, packed).loss) / float(objective.weight(packed))


def test_plackett_luce_of_two_is_the_pair_loss_and_of_many_the_chain_of_choices() -> None:
    scores = [0.4, -1.0, 0.7, 0.1]  # by rank, best first
    lengths = [2] * 4
    rows = Rows.of([[1] * length for length in lengths])

    def loss(kind: str, ranks: list[int]) -> float:
        fields = {"group": torch.zeros(len(ranks), dtype=torch.int64), "rank": torch.tensor(ranks)}
        batch = Batch(rows.select(range(len(ranks))), {}, fields)
        packed = pack(batch, list(range(len(ranks))))
        return float(RankedGroups(0.0, kind)({"scores": torch.tensor(scores[: len(ranks)])}, packed).loss)  # type: ignore[arg-type]

    assert loss("plackett_luce", [0, 1]) == pytest.approx(loss("pairs", [0, 1]))
    exponents = [math.exp(score) for score in scores]
    chain = -sum(math.log(exponents[at] / sum(exponents[at:])) for at in range(3))
    assert loss("plackett_luce", [0, 1, 2, 3]) == pytest.approx(chain / 3)
    # a tie for the first place: each is chosen against the worse ones, not against the other
    tied = -sum(math.log(exponents[at] / (exponents[at] + exponents[2] + exponents[3])) for at in (0, 1))
    tied -= math.log(exponents[2] / sum(exponents[2:]))
    assert loss("plackett_luce", [0, 0, 1, 2]) == pytest.approx(tied / 3)


def test_a_margin_asks_for_more_where_the_ranks_are_farther_apart() -> None:
    expected = 0.0
    for group in (4, 7):
        rows = [row for row, own in enumerate(GROUPS) if own == group]
        pairs = [(a, b) for a in rows for b in rows if RANKS[a] < RANKS[b]]
        gaps = [0.5 * (RANKS[b] - RANKS[a]) + float(SCORES[b] - SCORES[a]) for a, b in pairs]
        expected += sum(math.log1p(math.exp(gap)) for gap in gaps) / len(pairs)
    assert _loss(RankedGroups(margin=0.5), {"scores": SCORES}) == pytest.approx(expected / 2, abs=1e-6)
