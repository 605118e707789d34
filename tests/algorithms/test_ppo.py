"""PPO equals an independent plain-torch PPO, and the same numbers come out of every layout and placement."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

from megatron_zj.algorithms.experience import ParityError
from megatron_zj.algorithms.health import HealthError
from megatron_zj.config.algorithm import ParityConfig, PPOConfig
from megatron_zj.config.health import HealthConfig
from megatron_zj.config.sampling import SamplingConfig
from tests.algorithms import ppo_world
from tests.algorithms.layouts import LAYOUTS, MORE_LAYOUTS, Layout
from tests.algorithms.plain_ppo import PlainPPO
from tests.algorithms.ppo_world import History
from tests.helpers.ranks import run_ranks

TOLERANCE = 2e-5
OPTIONS: dict[str, dict[str, Any]] = {
    "kl k3 in loss, sequences": {"kl_in": "loss", "kl_estimator": "k3", "aggregation": "sequence", "kl_coef": 0.3},
    "adaptive kl, k2, running scores": {
        "kl_controller": "adaptive",
        "kl_estimator": "k2",
        "kl_target": 0.01,
        "kl_horizon": 40,
        "running_scores": True,
        "score_clip": 1.0,
    },
    "asymmetric and dual clip, no value clip": {
        "clip_ratio": 0.02,
        "clip_high": 0.04,
        "dual_clip": 1.01,
        "clip_value": None,
        "whiten_advantages": False,
        "recompute_logprobs": False,
    },
    "critic first, early stop, penalties, rules": {
        "critic_warmup_steps": 1,
        "early_stop_kl": 1e-9,
        "length_penalty": 0.05,
        "length_free": 3,
        "rules": {"varied": 0.5},
        "kl_estimator": "abs",
        "entropy_coef": 0.0,
        "kl_controller": "adaptive",
        "kl_target": 0.01,
        "kl_horizon": 40,
    },
}
# a penalty makes what is sampled from another distribution than what is learned
SAMPLING_OPTIONS: dict[str, Any] = {
    "sampling": SamplingConfig(
        max_new_tokens=9,
        temperature=0.9,
        repetition_penalty=1.2,
        min_new_tokens=2,
        stop_strings=("J", "K", "[", "VX"),
    ),
    "parity": ParityConfig(mean=None),
    "importance_cap": 1.02,
    "balance_minibatches": True,
    "score_sign": -1,
}


@pytest.fixture(scope="module")
def plain() -> History:
    history = PlainPPO(ppo_world.PPO_CONFIG).run()
    assert 0 < history[0]["truncated"] < 1  # both kinds of ending are in it
    assert any(history[1][f"{name}/clip_fraction"] > 0 for name in ("actor", "critic"))  # the clips bind
    assert abs(history[1]["kl"]) > 1e-3
    return history


def _check(found: History, expected: History) -> None:
    differences = ppo_world.differences(found, expected)
    worst = max(differences, key=lambda name: differences[name])
    assert differences[worst] <= TOLERANCE, (worst, differences[worst])


@pytest.mark.parametrize("layout", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_LAYOUTS)])
def test_two_iterations_equal_plain_torch(layout: str, plain: History) -> None:
    """Metrics, the sampled tokens, and every tensor of actor and critic."""
    place = {**LAYOUTS, **MORE_LAYOUTS}[layout]
    for found in run_ranks(place.world, ppo_world.run_ppo, place):
        _check(found[0], plain)
        assert found[0][0]["actor/first_ratio_off"] == 0


OPTION_LAYOUTS = ["one rank", "small packs", "dp2", "cp2", "split 2 + 2"]
OPTION_LAYOUTS += [pytest.param(name, marks=pytest.mark.slow) for name in ("tp2 sp", "pp2", "split 2 + 4")]


@pytest.fixture(scope="module")
def variants() -> list[tuple[PPOConfig, History]]:
    changed = [*OPTIONS.values(), SAMPLING_OPTIONS]
    configs = [dataclasses.replace(ppo_world.PPO_CONFIG, **changes) for changes in changed]
    return [(config, PlainPPO(config).run()) for config in configs]


@pytest.mark.parametrize("layout", OPTION_LAYOUTS)
def test_every_option_equals_plain_torch(layout: str, variants: list[tuple[PPOConfig, History]]) -> None:
    configs = [config for config, _ in variants]
    for histories in run_ranks(LAYOUTS[layout].world, ppo_world.run_ppo, LAYOUTS[layout], configs):
        for found, (_, expected) in zip(histories, variants, strict=True):
            _check(found, expected)


def test_the_options_do_something(variants: list[tuple[PPOConfig, History]]) -> None:
    in_loss, adaptive, clips, late, sampled = (history for _, history in variants)
    assert in_loss[1]["actor/kl_loss"] > 0
    assert in_loss[0]["actor/weight"] == ppo_world.PPO_CONFIG.minibatch_size
    assert adaptive[1]["kl_coef"] != adaptive[0]["kl_coef"]
    assert clips[1]["actor/clip_fraction"] > 0
    assert clips[1]["critic/clip_fraction"] == 0
    assert "actor/loss" not in late[0]
    assert "actor/loss" in late[1]
    assert late[1]["kl_coef"] == late[0]["kl_coef"]  # no controller while only the critic learns
    assert 0.8 < sampled[0]["actor/importance"] < 1.02
    ends = [chr(ord("A") + row[-1]) for row in sampled[0]["samples"]]
    assert any(letter in "JK[X" for letter in ends)
    assert 0 < sampled[0]["truncated"] < 1


def _perturbed_after_sampling(changes: dict[str, Any]) -> list[str]:
    """What a run says whose actor's weights move between sampling and scoring."""
    ppo = ppo_world.build_ppo(dataclasses.replace(ppo_world.PPO_CONFIG, **changes), Layout())
    generate = ppo.models.actor.generate

    def then_move(*args: Any) -> Any:
        samples = generate(*args)
        assert ppo.models.actor.engine is not None
        with torch.no_grad():
            for parameter in ppo.models.actor.engine.chunks[0].parameters():
                parameter.mul_(1.05)
        return samples

    ppo.models.actor.generate = then_move  # type: ignore[method-assign]
    try:
        metrics = ppo.step()
    except ParityError as error:
        return [str(error)]
    return [f"{name} {value}" for name, value in metrics.items() if name.startswith(("parity", "actor/importance"))]


def test_the_parity_gate_stops_a_run_whose_policy_moved_after_sampling() -> None:
    [[said]] = run_ranks(1, _perturbed_after_sampling, {"parity": ParityConfig(mean=0.01)})
    assert "parity/mean" in said
    assert "algorithm.parity.mean = 0.01" in said
    assert "algorithm.importance_cap" in said
    [lines] = run_ranks(1, _perturbed_after_sampling, {"parity": ParityConfig(mean=None), "importance_cap": 1.01})
    found = {name: float(value) for name, value in (line.split() for line in lines)}
    assert found["parity/mean"] > 0.01
    assert found["parity/max"] > found["parity/mean"]
    assert found["parity/k3"] > 1e-5
    assert found["actor/importance"] < 1.0  # capped above, so the mean is below 1


def _moved_before_learning(config: PPOConfig) -> str:
    """What a run says whose actor's weights move between scoring and learning."""
    ppo = ppo_world.build_ppo(config, Layout())
    samples, metrics = ppo.collect()
    assert ppo.models.actor.engine is not None
    with torch.no_grad():
        for parameter in ppo.models.actor.engine.chunks[0].parameters():
            parameter.mul_(1.001)
    try:
        return " ".join(ppo.health(1, metrics | ppo.learn(samples)))
    except HealthError as error:
        return str(error)


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ("warn", "alarm/ratio"),
        ("stop", "alarm 'ratio' for 1 iterations.*the weights changed between scoring and learning"),
    ],
)
def test_a_ratio_that_is_not_1_on_the_first_minibatch_is_an_alarm(action: Any, words: str) -> None:
    config = dataclasses.replace(ppo_world.PPO_CONFIG, health=HealthConfig(action=action, patience=1))
    [said] = run_ranks(1, _moved_before_learning, config)
    assert re.search(words, said)
