"""The demo's targets: a run that meets them passes, and each missed one is noticed by itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from megatron_zj.evaluation.targets import Target, demo_targets, learning_targets

GOOD: dict[str, Any] = {
    "exam_accuracy": {"untrained": 0.25, "scratch_sft": 0.26, "pretrain_sft": 0.92, "ppo": 0.91},
    "reward_pair_accuracy": 0.95,
    "oracle_score": {"sft": 0.7, "ppo": 0.85},
    "learning": {
        "ppo": {"kl_highest": 1.0, "kl_target": 5.0, "held_out_kl_curve": {"10": 0.5, "20": 4.9}},
        "grpo": {"oracle_score": 0.8, "kl_highest": 1.0, "kl_target": 5.0, "held_out_kl_curve": {"20": 1.0}},
        "rejection": {"oracle_score": 0.8, "held_out_kl_curve": {"10": 1.0, "20": 2.0}},
        "dpo": {"oracle_score": 0.8, "held_out_kl_curve": {"10": 1.0, "20": 0.9}},
        "ppo_flipped": {"oracle_score": 0.4},
    },
}


def missed(**changes: Any) -> list[str]:
    """Claims missed by GOOD with these values, given as a__b=value."""
    summary = copy.deepcopy(GOOD)
    for path, value in changes.items():
        *folders, name = path.split("__")
        place = summary
        for folder in folders:
            place = place[folder]
        place[name] = value
    return [target.claim for target in (*demo_targets(summary), *learning_targets(summary)) if not target.met]


def test_a_good_run_misses_nothing() -> None:
    assert missed() == []


@pytest.mark.parametrize(
    ("path", "value", "claim"),
    [
        ("exam_accuracy__untrained", 0.14, "exam, untrained"),
        ("exam_accuracy__untrained", 0.36, "exam, untrained"),
        ("exam_accuracy__scratch_sft", 0.46, "exam, SFT from scratch"),
        ("exam_accuracy__ppo", 0.89, "exam, change by PPO"),
        ("reward_pair_accuracy", 0.89, "reward model, held-out pairs"),
        ("oracle_score__ppo", 0.79, "oracle score, gain by PPO"),
        ("learning__ppo__kl_highest", 5.1, "KL of ppo at its highest"),
        ("learning__ppo__kl_highest", None, "KL of ppo at its highest"),
        ("learning__grpo__kl_highest", 5.1, "KL of grpo at its highest"),
        ("learning__grpo__kl_target", None, "KL of grpo at its highest"),
        ("learning__ppo__held_out_kl_curve", {"10": 5.1, "20": 1.0}, "KL of ppo on held-out patients"),
        ("learning__grpo__held_out_kl_curve", {}, "KL of grpo on held-out patients"),
        ("learning__rejection__held_out_kl_curve", {"10": 1.0, "20": 5.1}, "KL of rejection on held-out patients"),
        ("learning__dpo__held_out_kl_curve", {"10": None, "20": 1.0}, "KL of dpo on held-out patients"),
        ("learning__grpo__oracle_score", 0.74, "oracle score, gain by grpo"),
        ("learning__rejection__oracle_score", 0.74, "oracle score, gain by rejection"),
        ("learning__dpo__oracle_score", 0.74, "oracle score, gain by dpo"),
        ("learning__ppo_flipped__oracle_score", 0.66, "oracle score, change by ppo_flipped"),
        ("reward_pair_accuracy", None, "reward model, held-out pairs"),
        ("reward_pair_accuracy", float("nan"), "reward model, held-out pairs"),
        ("learning__ppo_flipped", {}, "oracle score, change by ppo_flipped"),
    ],
)
def test_each_missed_target_is_noticed_alone(path: str, value: Any, claim: str) -> None:
    assert missed(**{path: value}) == [claim]


def test_without_a_target_no_kl_is_measured_against_it() -> None:
    """All are held against PPO's."""
    held_out = [f"KL of {name} on held-out patients" for name in ("ppo", "grpo", "rejection", "dpo")]
    assert missed(learning__ppo__kl_target=None) == ["KL of ppo at its highest", *held_out]


def test_weak_models_miss_their_own_targets() -> None:
    """These numbers are also the start of a change, so they move together with it."""
    assert missed(exam_accuracy__pretrain_sft=0.79, exam_accuracy__ppo=0.79) == ["exam, pre-training + SFT"]
    assert "oracle score, SFT" in missed(oracle_score__sft=0.59, learning__ppo_flipped__oracle_score=0.5)


def test_a_target_reads_as_a_line() -> None:
    assert str(Target("exam, untrained", 0.2417, 0.15, 0.35)) == "met     exam, untrained: 0.242 (0.15 to 0.35)"
    assert str(Target("gain", None, 0.1)) == "MISSED  gain: not measured (>= 0.1)"
    assert str(Target("KL", 6.0, high=5.0)) == "MISSED  KL: 6.000 (<= 5)"
