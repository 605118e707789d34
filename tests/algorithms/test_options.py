"""The smaller formulas of reinforcement learning against their definitions, and state that survives a stop."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_zj.algorithms import functional as f
from megatron_zj.algorithms.controllers import KLController, RunningMoments
from megatron_zj.algorithms.experience import ParityError, minibatches, require_parity
from megatron_zj.algorithms.health import CHECKS, Health, HealthError
from megatron_zj.algorithms.objectives import PolicyObjective
from megatron_zj.algorithms.rules import RULES, Answer, chosen_rules
from megatron_zj.algorithms.shaping import ScoreError, ScoreScale, Shaping
from megatron_zj.config.algorithm import GRPOConfig, ParityConfig, PPOConfig, RejectionConfig
from megatron_zj.config.checks import check
from megatron_zj.config.health import HealthConfig
from megatron_zj.config.loader import ConfigError, load
from megatron_zj.config.run import RunConfig
from megatron_zj.config.sampling import SamplingConfig
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.data.packing import pack
from megatron_zj.roles.world import WorldBatch
from tests.helpers.ranks import run_ranks


def test_kl_estimators_have_the_expectation_they_claim() -> None:
    """Over a whole categorical distribution, so that there is no noise."""
    generator = torch.Generator().manual_seed(1)
    policy = torch.randn(50, generator=generator, dtype=torch.float64).log_softmax(0)
    reference = (policy + 0.2 * torch.randn(50, generator=generator, dtype=torch.float64)).log_softmax(0)
    kl = float((policy.exp() * (policy - reference)).sum())
    found = {name: (policy.exp() * f.estimate_kl(policy, reference, name)) for name in ("k1", "k2", "k3", "abs")}
    assert float(found["k1"].sum()) == pytest.approx(kl)
    assert float(found["k3"].sum()) == pytest.approx(kl)
    assert float(found["k2"].sum()) == pytest.approx(kl, rel=0.1)  # biased, close
    assert float(found["abs"].sum()) > kl
    assert float(found["k3"].min()) >= 0 > float(found["k1"].min())


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_whose_gradient_each_estimator_has_in_a_loss(estimator: Any) -> None:
    logits = torch.randn(9, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    reference = torch.randn(9, generator=torch.Generator().manual_seed(3), dtype=torch.float64).log_softmax(0)
    policy = logits.log_softmax(0)
    truths = {
        "none": torch.zeros_like(logits),
        "of KL(pi || ref)": _gradient((policy.exp() * (policy - reference)).sum(), logits),
        "of KL(ref || pi)": _gradient((reference.exp() * (reference - policy)).sum(), logits),
    }
    # tokens are drawn from pi and then held: the expectation's own weights have no gradient
    found = _gradient((policy.exp().detach() * f.estimate_kl(policy, reference, estimator)).sum(), logits)
    same = [name for name, truth in truths.items() if torch.allclose(found, truth, atol=1e-12)]
    assert same == {"k1": ["none"], "k2": ["of KL(pi || ref)"], "k3": ["of KL(ref || pi)"], "abs": []}[estimator]


def _gradient(value: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, logits, retain_graph=True)[0]


def test_dual_clip_bounds_what_a_bad_token_costs() -> None:
    ratio, advantages = torch.tensor([9.0, 2.0, 9.0]), torch.tensor([-1.0, -1.0, 1.0])
    loss, bound = f.clipped_policy_loss(ratio.log(), advantages, 0.2, 0.3, 3.0)
    assert loss.tolist() == pytest.approx([3.0, 2.0, -1.3])
    assert bound.tolist() == [1, 0, 1]


def test_sequence_aggregation_is_the_mean_of_row_means() -> None:
    mask = Rows.of([[0, 1, 1], [0, 0], [0, 1, 1, 1, 1]])
    values = torch.arange(10.0)
    fields = f.aggregation_fields(mask, "sequence")
    mean = (values * fields["loss_weight"].values).sum() / fields["loss_count"].values.sum()
    assert float(mean) == pytest.approx(((1 + 2) / 2 + (6 + 7 + 8 + 9) / 4) / 2)
    assert not fields["loss_count"].values.is_floating_point()


def test_importance_weights_are_capped() -> None:
    found = f.importance_weights(torch.tensor([0.0, -1.0]), torch.tensor([-3.0, -0.5]), 2.0)
    assert found.tolist() == pytest.approx([2.0, math.exp(-0.5)])


def test_importance_weights_weigh_the_loss_of_each_token_and_have_no_gradient() -> None:
    generator = torch.Generator().manual_seed(6)
    rows = Rows.of([[1, 2, 3, 4], [5, 6, 7]])
    mask = rows.replace(torch.tensor([0, 1, 1, 1, 0, 1, 1]))
    fields = {
        name: rows.replace(0.5 * torch.randn(7, generator=generator))
        for name in ("old_logprobs", "sampling_logprobs", "advantages")
    }
    packed = pack(Batch(rows, fields | f.aggregation_fields(mask, "token")), [0, 1])
    new = (packed.per_token["old_logprobs"] + 0.1 * torch.randn(7, generator=generator)).requires_grad_()
    objective = PolicyObjective(temperature=1.0, clip_ratio=0.05, importance_cap=1.2)
    terms = objective({"logprobs": new}, packed)
    expected = torch.zeros(())
    weights = []
    for at in range(7):
        old, sampled, advantage, weight = (
            packed.per_token[name][at] for name in ("old_logprobs", "sampling_logprobs", "advantages", "loss_weight")
        )
        ratio = (new[at] - old).exp()
        cost = -torch.minimum(ratio * advantage, ratio.clamp(0.95, 1.05) * advantage)
        weights.append(min(math.exp(float(old - sampled)), 1.2) * float(weight))
        expected = expected + weights[-1] * cost
    assert terms.loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert torch.allclose(_gradient(terms.loss, new), _gradient(expected, new), atol=1e-6)
    assert float(terms.metrics["importance"]) == pytest.approx(sum(weights), abs=1e-6)
    assert 0 < sum(weight == 1.2 for weight in weights) < 5  # the cap binds on some


def test_group_advantages_of_a_worked_group() -> None:
    scores = torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0, 4.0])
    deviation = math.sqrt((4 + 1 + 9) / 2)
    found = f.group_advantages(scores, 3, scale=True).tolist()
    assert found == pytest.approx([-2 / deviation, -1 / deviation, 3 / deviation, 0, 0, 0], abs=1e-5)
    assert f.group_advantages(scores, 3, scale=False).tolist() == pytest.approx([-2, -1, 3, 0, 0, 0])


def test_repetition_counts_what_came_before() -> None:
    assert f.repetition(torch.tensor([1, 2, 3, 4, 5])) == 0
    assert f.repetition(torch.tensor([7] * 8)) == pytest.approx(4 / 5)
    assert f.repetition(torch.tensor([1, 2])) == 0


def test_the_adaptive_coefficient_follows_ziegler_and_resumes_exactly() -> None:
    controller = KLController(0.2, 6.0, 10000)
    controller.update(9.0, 256)  # 50 % above: counts as 20 %
    assert controller.coef == pytest.approx(0.2 * (1 + 0.2 * 256 / 10000))
    controller.update(5.7, 256)
    assert controller.coef == pytest.approx(0.2 * (1 + 0.2 * 256 / 10000) * (1 - 0.05 * 256 / 10000))
    other = KLController(0.2, 6.0, 10000)
    other.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert other.coef == controller.coef  # to the bit
    fixed = KLController(0.2)
    fixed.update(1e9, 256)
    assert fixed.coef == 0.2


def test_running_moments_equal_those_of_everything_and_resume_exactly() -> None:
    values = torch.randn(40, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 3 + 100
    running = RunningMoments()
    for part in values.split([3, 1, 0, 16, 20]):
        if len(part):
            running.add(len(part), float(part.mean()), float(part.std(correction=0)))
        again = RunningMoments()
        again.load_state_dict(json.loads(json.dumps(running.state_dict())))
        assert vars(again) == vars(running)
        running = again
    assert running.mean == pytest.approx(float(values.mean()))
    assert running.deviation == pytest.approx(float(values.std(correction=0)))


def test_rules_come_from_the_list_only() -> None:
    text = "请就医。请就医。"
    answer = Answer("", text, torch.zeros(0), torch.zeros(0), truncated=True)
    assert RULES["refers_to_doctor"](answer) == 1
    assert RULES["ends"](answer) == 0
    assert RULES["chinese"](answer) == 1
    assert RULES["varied"](answer) == pytest.approx(4 / 6)
    assert [weight for _, weight in chosen_rules({"ends": 0.5})] == [0.5]
    with pytest.raises(ConfigError, match=r"algorithm\.rules\.varid: no such rule; did you mean 'varied'"):
        chosen_rules({"varid": 1.0})


def test_the_parity_gate_names_the_number_and_the_limit() -> None:
    found = {"parity/max": 0.5, "parity/mean": 0.01, "parity/k3": 1e-4}
    require_parity(found, ParityConfig(max=0.6))
    with pytest.raises(ParityError, match=r"parity/max = 0.5 > algorithm.parity.max = 0.1"):
        require_parity(found, ParityConfig(max=0.1))
    with pytest.raises(ParityError, match="parity/mean = nan"):
        require_parity(found | {"parity/mean": math.nan}, ParityConfig())


GOOD = {
    "actor/first_ratio_off": 0.0,
    "kl": 4.0,
    "actor/clip_fraction": 0.1,
    "critic/clip_fraction": 0.1,
    "explained_variance": 0.5,
    "entropy": 2.0,
    "length_correlation": 0.2,
    "truncated": 0.1,
    "repetition": 0.1,
}
BAD = {
    "ratio": ("actor/first_ratio_off", 0.01),
    "kl_negative": ("kl", -2.0),
    "kl_high": ("kl", 20.0),
    "policy_clip": ("actor/clip_fraction", 0.9),
    "value_clip": ("critic/clip_fraction", 0.9),
    "explained_variance": ("explained_variance", -3.0),
    "entropy": ("entropy", 0.001),
    "length_reward": ("length_correlation", -0.95),
    "truncated": ("truncated", 1.0),
    "repetition": ("repetition", math.nan),
}


@pytest.mark.parametrize("name", [check.name for check in CHECKS])
def test_each_alarm_sounds_for_its_own_illness_only(name: str, caplog: pytest.LogCaptureFixture) -> None:
    health = Health(HealthConfig(), kl_target=6.0, speaks=True)
    assert health(1, GOOD) == {}
    metric, value = BAD[name]
    assert health(2, GOOD | {metric: value}) == {f"alarm/{name}": 1.0}
    assert name in caplog.text
    assert health(3, GOOD) == {}


def test_an_alarm_that_holds_stops_the_run_when_told_to() -> None:
    config = HealthConfig(action="stop", patience=3)
    health, ill = Health(config, None, speaks=False), GOOD | {"truncated": 1.0}
    health(1, ill)
    health(2, GOOD)  # well again: counts from the start
    health(3, ill)
    health(4, ill)
    resumed = Health(config, None, speaks=False)
    resumed.load_state_dict(json.loads(json.dumps(health.state_dict())))
    with pytest.raises(HealthError, match=r"'truncated' for 3 iterations.*max_new_tokens"):
        resumed(5, ill)
    assert Health(HealthConfig(action="off"), None, speaks=False)(1, ill) == {}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PPOConfig(kl_in="loss"), "take k2 or k3"),
        (lambda: PPOConfig(kl_controller="adaptive"), "needs kl_target"),
        (lambda: PPOConfig(dual_clip=0.9), "dual_clip: must be > 1, got 0.9"),
        (lambda: PPOConfig(gamma=1.5, lam=-0.1), r"gamma: must be in \[0, 1\], got 1.5\nlam: must be"),
        (lambda: PPOConfig(clip_value=0.0), "clip_value: must be > 0"),
        (lambda: PPOConfig(critic_warmup_steps=-1), "critic_warmup_steps: must be >= 0"),
        (lambda: GRPOConfig(kl_coef=-1.0), "kl_coef: must be >= 0"),
        (lambda: PPOConfig(length_penalty=-0.1), "length_penalty: must be >= 0"),
        (lambda: ParityConfig(mean=0.0), "mean: must be > 0"),
        (lambda: SamplingConfig(top_p=float("nan")), r"top_p: must be in \(0, 1\]"),
        (lambda: SamplingConfig(min_new_tokens=9, max_new_tokens=8), "more than max_new_tokens 8; lower it"),
        (lambda: PPOConfig(recompute_logprobs=False, importance_cap=2.0), "recompute_logprobs"),
        (lambda: GRPOConfig(samples_per_prompt=1), "samples_per_prompt must be >= 2"),
        (lambda: GRPOConfig(kl_estimator="k1"), "k2 or k3"),
        (lambda: RejectionConfig(prompts_per_step=10, minibatch_size=4), "one answer a prompt"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_dpo_refuses_dropout() -> None:
    """Its slopes are taken without, and would not be those of the step's function."""
    start = {
        "algorithm": {"kind": "dpo"},
        "data": {"kind": "preference", "max_length": 64},
        "checkpoint": {"load": "sft"},
    }
    assert not check(load(RunConfig, start), files=False)
    [found] = check(load(RunConfig, start | {"model": {"dropout": 0.1}}), files=False)
    assert found.level == "error"
    assert str(found).startswith("model.dropout: algorithm=dpo takes its loss's derivative")


IGNORED: dict[str, Any] = {
    "score_sign": -1,
    "rules": {"ends": 1.0},
    "score_clip": 2.0,
    "whiten_scores": False,
    "running_scores": True,
    "length_penalty": 0.1,
    "length_free": 3,
    "missing_eos_penalty": 0.5,
    "sampling": SamplingConfig(max_new_tokens=5),
    "samples_per_prompt": 8,
    "epochs": 2,
    "parity": ParityConfig(mean=None),
    "health": HealthConfig(action="stop"),
    "balance_minibatches": True,
}


@pytest.mark.parametrize("name", IGNORED)
def test_what_filtering_has_no_use_for_is_refused(name: str) -> None:
    RejectionConfig(source="filter", keep=7, minibatch_size=3, prompts_per_step=5)
    with pytest.raises(ValueError, match=f"source: filter does not use {name}; leave it out"):
        RejectionConfig(source="filter", **{name: IGNORED[name]})


def _shapes(broken_rank: int) -> str:
    samples = Batch(
        Rows.of([[1, 2, 3]]),
        {"response_mask": Rows.of([[0, 1, 1]])},
        {"truncated": torch.tensor([0])},
    )
    score = math.nan if dist.get_rank() == broken_rank else 1.0
    try:
        Shaping(PPOConfig(), ScoreScale(), lambda ids: "")(torch.tensor([score]), samples)
    except ScoreError as error:
        return str(error)
    return ""


def test_a_score_that_is_no_number_stops_every_rank() -> None:
    said = run_ranks(2, _shapes, 1)
    assert said[0] == said[1]
    assert "1 of the reward model's scores are not finite" in said[0]
    assert run_ranks(2, _shapes, 5) == ["", ""]


def _shaped(sign: Any) -> list[float]:
    samples = Batch(
        Rows.of([[1, 2, 3, 4], [5, 6, 7]]),
        {"response_mask": Rows.of([[0, 1, 1, 1], [0, 1, 1]])},
        {"truncated": torch.tensor([1, 0])},
    )
    config = PPOConfig(score_sign=sign, score_clip=2.0, missing_eos_penalty=0.5, length_penalty=0.25, length_free=2)
    shaped: list[float] = Shaping(config, ScoreScale(1.0, 2.0), lambda ids: "")(
        torch.tensor([9.0, 0.0]), samples
    ).tolist()
    return shaped


def test_the_sign_turns_the_score_round_and_leaves_the_penalties() -> None:
    """(9 - 1) / 2 = 4, clipped to 2; (0 - 1) / 2 = -0.5; the first pays 0.5 for its end 0.25 for its third token."""
    assert run_ranks(1, _shaped, 1) == [[2.0 - 0.75, -0.5]]
    assert run_ranks(1, _shaped, -1) == [[-2.0 - 0.75, 0.5]]


def test_balanced_minibatches_have_like_tokens_and_every_row_once() -> None:
    lengths = [int(x) for x in torch.randint(1, 200, (64,), generator=torch.Generator().manual_seed(5))]
    rows = Rows.of([[0] * length for length in lengths], torch.int64)
    batch = WorldBatch(Batch(rows), (tuple(lengths),))

    def spread(balanced: bool) -> tuple[int, list[list[int]]]:
        config = PPOConfig(prompts_per_step=64, minibatch_size=16, epochs=1, balance_minibatches=balanced)
        parts = list(minibatches(batch, config, seed=1, step=2))
        totals = [sum(lengths[row] for row in part) for part in parts]
        return max(totals) - min(totals), parts

    assert spread(True)[0] < 0.1 * spread(False)[0]
    for balanced in (True, False):
        parts = spread(balanced)[1]
        assert [len(part) for part in parts] == [16] * 4
        assert sorted(row for part in parts for row in part) == list(range(64))
