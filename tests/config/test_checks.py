"""Whole-configuration checks: each refuses one impossible run and names the key to change."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from megatron_zj.config.checks import check, missing_inputs, require
from megatron_zj.config.derived import optimizer_steps, placements
from megatron_zj.config.loader import ConfigError, load
from megatron_zj.config.run import RunConfig
from megatron_zj.engine.schedule import LearningRate


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if nested else value
    return result


def config(**changes: Any) -> RunConfig:
    start = {"algorithm": {"kind": "pretrain"}, "data": {"kind": "corpus", "sequence_length": 128}}
    if changes.get("data", {}).get("kind", "corpus") != "corpus":
        del start["data"]["sequence_length"]
    return load(RunConfig, merged(start, changes))


def ppo(**changes: Any) -> RunConfig:
    start = {
        "algorithm": {"kind": "ppo", "reward": {"load": "rm"}},
        "data": {"kind": "prompts", "max_length": 64},
        "checkpoint": {"load": "sft"},
        "world_size": 4,
    }
    return load(RunConfig, merged(start, changes))


def errors(run: RunConfig, world_size: int | None = None, **options: Any) -> list[str]:
    options = {"files": False, **options}
    return [str(finding) for finding in check(run, world_size, **options) if finding.level == "error"]


def refused(**changes: Any) -> list[str]:
    """What the dataclasses, or else the checks, say of an impossible run."""
    try:
        return errors(config(**changes))
    except ConfigError as error:
        return list(error.problems)


def notes(run: RunConfig) -> list[str]:
    return [str(finding) for finding in check(run, files=False) if finding.level == "note"]


def test_a_sound_run_has_no_findings() -> None:
    assert check(config(world_size=8, parallel={"tp": 2, "pp": 2}), files=False) == []
    assert check(ppo(), files=False) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"world_size": 0}, "world_size: must be in [1, 1000000], got 0"),
        ({"world_size": 10**9}, "world_size: must be in [1, 1000000], got 1000000000"),
        ({"world_size": 10**20}, "world_size: 100000000000000000000 does not fit in 64 bits"),
        ({"run": {"timeout_seconds": 10**17}}, "run.timeout_seconds: must be in [1, 31536000]"),
        ({"run": {"num_steps": 1, "profile_steps": [1, 99]}}, "run: profile_steps [99] come after the last step"),
        ({"model": {"num_layers": 10**9}}, "model.num_layers: must be in [1, 10000]"),
        ({"optim": {"lr": float("inf")}}, "optim.lr: must be >= 0 and finite, got inf"),
        (
            {"algorithm": {"model": {"load_role": "x"}}},
            "algorithm.model.load_role: 'x' of no checkpoint; set ",
        ),
        ({"world_size": 6, "parallel": {"tp": 4}}, "parallel: tp 4 x pp 1 x cp 1 = 4 does not divide the 6 ranks"),
        ({"world_size": 8, "parallel": {"tp": 8}}, "parallel.tp: model.num_attention_heads = 4 is not divisible by"),
        (
            {"world_size": 4, "parallel": {"tp": 4}, "model": {"num_query_groups": 2}},
            "parallel.tp: model.num_query_groups = 2 is not divisible by tp = 4; use a tp of 1, 2",
        ),
        (
            {"world_size": 2, "parallel": {"tp": 2}, "model": {"vocab_size": 4095, "vocab_multiple": 1}},
            "parallel.tp: model.padded_vocab_size = 4095 is not divisible by tp = 2; use a tp of 1, or make "
            "model.vocab_multiple a multiple of 2",
        ),
        (
            {"world_size": 2, "parallel": {"tp": 2}, "model": {"ffn_hidden_size": 351}},
            "parallel.tp: model.ffn_hidden_size = 351 is not divisible by tp = 2",
        ),
        (
            {"world_size": 2, "parallel": {"pp": 2, "vpp": 4}},
            "parallel.pp: model.num_layers = 4 is not divisible by pp x vpp = 8",
        ),
        (
            {"data": {"sequence_length": 513}, "engine": {"micro_batch_tokens": 4096}},
            "data.sequence_length: data.sequence_length = 513 exceeds model.max_position_embeddings = 512",
        ),
        ({"data": {"sequence_length": 1}}, "data.sequence_length: must be >= 2, got 1"),
        (
            {"engine": {"micro_batch_tokens": 100}},
            "engine.micro_batch_tokens: 100 is less than the longest row (data.sequence_length = 128); raise it to 128",
        ),
        (
            {"world_size": 16, "algorithm": {"global_batch_size": 8}},
            "algorithm.global_batch_size: 8 < dp = 16 of placement 'all'",
        ),
        ({"algorithm": {"global_batch_size": 0}}, "algorithm.global_batch_size: must be >= 1, got 0"),
        ({"run": {"num_steps": 0}}, "run.num_steps: must be >= 1"),
        ({"algorithm": {"kind": "sft"}}, "data: algorithm=sft learns from data=chat, got data=corpus"),
        ({"data": {"files": ["a"], "weights": [1, 2]}}, "data.weights: 2 weights for 1 data.files"),
        ({"data": {"files": ["a"], "weights": [0]}}, "data.weights: all are 0; give a file you want a positive weight"),
        ({"data": {"validation_fraction": 1.0}}, "data.validation_fraction: must be in [0, 1), got 1.0"),
        ({"model": {"dropout": 1.0}}, "model.dropout: must be in [0, 1)"),
        (
            {"engine": {"recompute": "full", "recompute_num_layers": 3}},
            "engine.recompute_num_layers: 3 does not divide the 4 layers of a pipeline chunk",
        ),
        ({"algorithm": {"model": {"placement": "al"}}}, "algorithm.model.placement: no placement 'al'; did you mean"),
        ({"placements": {"all": {}}}, "placements.all: the name is taken"),
        (
            {"optim": {"schedule": "linear", "warmup_steps": 100}},
            "optim.warmup_steps: 100 of the run's 100 optimizer steps: no step is left for the linear decay",
        ),
        ({"model": {"num_query_groups": 0}}, "model.num_query_groups: must be >= 1, got 0"),
        ({"model": {"vocab_multiple": 0}}, "model.vocab_multiple: must be >= 1, got 0"),
        ({"model": {"head_dim": 33}}, "model: a head of 33 cannot be rotated in pairs"),
        ({"checkpoint": {"every": -5}}, "checkpoint.every: must be >= 0, got -5"),
        ({"run": {"timeout_seconds": 0}}, "run.timeout_seconds: must be in [1, 31536000], got 0"),
        ({"optim": {"beta1": 1.5}}, "optim.beta1: must be in [0, 1), got 1.5"),
        (
            {"algorithm": {"kind": "sft"}, "data": {"kind": "chat", "template": "zia"}},
            "data.template: the string 'zia' is not one of ziya, chimed_gpt; did you mean 'ziya'?",
        ),
        (
            {"algorithm": {"kind": "sft"}, "data": {"kind": "chat", "format": "alpca"}},
            "data.format: the string 'alpca' is not one of auto, ",
        ),
        (
            {"algorithm": {"kind": "reward"}, "data": {"kind": "preference", "overlong": "split"}},
            "data.overlong: split is for dialogues (data.kind=chat); set error, truncate or skip",
        ),
    ],
)
def test_an_impossible_run_is_refused_with_the_key_to_change(changes: dict[str, Any], expected: str) -> None:
    found = refused(**changes)
    assert len(found) == 1, found
    assert found[0].startswith(expected)


@pytest.mark.parametrize(
    ("model", "tp", "expected"),
    [
        (
            {"hidden_size": 136, "head_dim": 32},
            2,
            "model.hidden_size: 136 is not a multiple of 16, which FP8 products need; make model.hidden_size a "
            "multiple of 16, or set model.fp8=none",
        ),
        (
            {},  # 88 columns a rank
            4,
            "model.ffn_hidden_size: 352 is not a multiple of 16 on each of tp = 4 ranks, which FP8 products need; make "
            "model.ffn_hidden_size a multiple of 64, use a tp of 1, 2, or set model.fp8=none",
        ),
        (
            {"head_dim": 4, "num_query_groups": 1},  # 16 columns of queries, and 4 of keys and 4 of values
            1,
            "model.head_dim: 16 columns of queries and 24 of queries, keys and values are not both multiples of 16, "
            "which FP8 products need; make model.head_dim a multiple of 16, or set model.fp8=none",
        ),
        ({"vocab_size": 4095, "vocab_multiple": 1}, 1, None),  # the product with the vocabulary is not in FP8
        ({"head_dim": 8, "num_query_groups": 1}, 1, None),  # 32 and 48
        ({"ffn_hidden_size": 384}, 4, None),
    ],
)
def test_sizes_that_fp8_products_refuse_are_named_with_what_would_do(
    model: dict[str, Any], tp: int, expected: str | None
) -> None:
    asked = {"model": {**model, "kernels": "te", "fp8": "hybrid"}, "engine": {"precision": "bf16"}}
    layout = {"world_size": tp, "parallel": {"tp": tp}}
    assert errors(config(**asked, **layout), here=False) == ([] if expected is None else [expected])
    assert errors(config(model=model, **layout)) == []


@pytest.mark.parametrize(
    ("model", "precision", "expected"),
    [
        ({}, "bf16", None),
        (
            {},
            "fp32",
            "engine.precision: under context parallelism model.kernels=te has no fp32; use bf16 or fp16, "
            "parallel.cp=1, or model.kernels=auto",
        ),
        (
            {"head_dim": 20},
            "fp16",
            "model.kernels: under context parallelism te needs heads of a multiple of 8, and these are 20; set "
            "parallel.cp=1, or model.kernels=auto",
        ),
    ],
)
def test_what_transformer_engine_s_attention_refuses_under_context_parallelism_is_said_before(
    model: dict[str, Any], precision: str, expected: str | None
) -> None:
    def found(kernels: str, cp: int) -> list[str]:
        asked = {"model": {**model, "kernels": kernels}, "engine": {"precision": precision}}
        return errors(config(**asked, world_size=2, parallel={"cp": cp}), here=False)

    assert found("te", 2) == ([] if expected is None else [expected])
    assert found("te", 1) == found("auto", 2) == []


def test_placements_that_refuse_the_same_size_say_so_once() -> None:
    asked = {"model": {"hidden_size": 136, "head_dim": 32, "kernels": "te", "fp8": "hybrid"}}
    found = errors(ppo(**SPLIT, **asked, engine={"precision": "bf16"}), here=False)
    assert [line.split(":")[0] for line in found] == ["model.hidden_size"]


def test_the_number_of_running_ranks_must_be_the_configured_one() -> None:
    assert errors(config(world_size=4), 2) == [
        "world_size: the configuration is laid out for 4 ranks and 2 are running; start 4, or write world_size=2"
    ]
    assert errors(config(world_size=4), 4) == errors(config(), 7, files=False) == []


def test_a_prompt_and_its_answer_must_fit_the_positions_together() -> None:
    found = errors(ppo(data={"max_length": 400}, algorithm={"sampling": {"max_new_tokens": 200}}))
    assert found == [
        "data.max_length: data.max_length + algorithm.sampling.max_new_tokens = 600 exceeds "
        "model.max_position_embeddings = 512; lower data.max_length or algorithm.sampling.max_new_tokens, or raise the "
        "positions (a checkpoint has a fixed number)"
    ]


def test_a_role_with_its_own_engine_is_checked_with_it() -> None:
    (found,) = errors(ppo(algorithm={"critic": {"engine": {"micro_batch_tokens": 64}}}))
    assert found.startswith("algorithm.critic.engine.micro_batch_tokens: 64 is less than the longest row")


SPLIT = {
    "placements": {
        "policy": {"num_ranks": 2, "parallel": {"tp": 2}},
        "value": {"first_rank": 2, "num_ranks": 2, "parallel": {"pp": 2}},
    },
    "algorithm": {
        "actor": {"placement": "policy"},
        "reference": {"placement": "policy"},
        "critic": {"placement": "value"},
        "reward": {"placement": "value"},
    },
}


def test_split_placements_are_blocks_of_their_own_layout() -> None:
    run = ppo(**SPLIT)
    assert errors(run) == []
    policy, value = placements(run)
    assert (policy.first_rank, policy.num_ranks, policy.dp, policy.roles) == (0, 2, 1, ("actor", "reference"))
    assert (value.first_rank, value.num_ranks, value.dp, value.key) == (2, 2, 1, "placements.value.parallel")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"placements": {"value": {"first_rank": 1}}},
            "placements.value.parallel: placements 'policy' and 'value' share",
        ),
        (
            {"placements": {"value": {"num_ranks": 4}}},
            "placements.value.num_ranks: ranks 2 to 5 are not inside a world",
        ),
        (
            {"placements": {"value": {"parallel": {"tp": 2}}}},
            "placements.value.parallel: tp 2 x pp 2 x cp 1 = 4 does not",
        ),
        (
            {"algorithm": {"reward": {"placement": "all"}}},
            "placements.policy.parallel: placements 'all' and 'policy' sh",
        ),
        (
            {"placements": {"policy": {"num_ranks": 1}}, "algorithm": {"kl_coef": 0.1}},
            "placements.policy.parallel: tp 2 x pp 1 x cp 1 = 2 does not divide the 1 ranks of placement 'policy'",
        ),
    ],
)
def test_placements_that_collide_or_do_not_fit_are_refused(changes: dict[str, Any], expected: str) -> None:
    found = errors(ppo(**merged(SPLIT, changes)))
    assert found[0].startswith(expected), found


def test_a_minibatch_must_divide_the_samples_of_a_step() -> None:
    with pytest.raises(ConfigError, match="algorithm: minibatch_size 5 must divide"):
        ppo(algorithm={"minibatch_size": 5})


def test_optimizer_steps_of_ppo_count_epochs_and_minibatches() -> None:
    run = ppo(run={"num_steps": 3}, algorithm={"epochs": 2, "prompts_per_step": 8, "minibatch_size": 4})
    assert optimizer_steps(run) == 3 * 2 * 2


def test_advice_is_a_note_and_does_not_stop_the_run() -> None:
    run = config(
        world_size=3,
        optim={"warmup_steps": 200, "schedule": "constant"},
        model={"dropout": 0.1},
        placements={"idle": {}},
        algorithm={"global_batch_size": 8},
    )
    assert errors(run) == []
    assert [note.split(":")[0] for note in notes(run)] == [
        "placements.idle",
        "model.dropout",
        "algorithm.global_batch_size",
        "optim.warmup_steps",
    ]
    require(config(data={"files": ["x"]}), files=False)


def test_transformer_engine_is_asked_for_only_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(model={"kernels": "te"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (found,) = errors(run)
    assert found == (
        "model.kernels: needs transformer_engine, which is not installed here: pip install -e '.[te]' in the checkout, "
        "or model.kernels=auto"
    )
    assert errors(run, here=False) == []  # a configuration for another machine
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert errors(run) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"model": {"kernels": "triton"}},
            "model.kernels: needs triton, which is not installed here",
        ),
        ({"run": {"tensorboard": True}}, "run.tensorboard: needs tensorboard, which is not installed here"),
        ({"run": {"wandb_project": "x"}}, "run.wandb_project: needs wandb, which is not installed here"),
    ],
)
def test_a_package_that_a_setting_needs_is_missed_before_the_run(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], expected: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (found,) = errors(config(**changes))
    assert found.startswith(expected)
    assert errors(config(**changes), here=False) == []


@pytest.mark.parametrize("kernels", ["triton", "te", "torch", "auto"])
@pytest.mark.parametrize("device", ["cpu", "cuda", "auto"])
def test_kernels_that_need_a_gpu_are_refused_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, kernels: str, device: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())  # whatever is installed here
    found = errors(config(model={"kernels": kernels}, run={"device": device}))
    wanted = f"model.kernels: {kernels} needs a CUDA device and run.device is cpu; set model.kernels=auto"
    refused = device == "cpu" and kernels in ("triton", "te")
    assert [message[: len(wanted)] for message in found] == ([wanted] if refused else [])


def test_inputs_nobody_named_stop_a_run_but_not_a_check() -> None:
    run = ppo(checkpoint={"load": None}, algorithm={"reward": {"load": None}})
    assert errors(run) == []
    keys = [finding.key for finding in missing_inputs(run)]
    assert keys == ["data.files", "tokenizer.path", "checkpoint.load", "algorithm.reward.load"]
    with pytest.raises(ConfigError) as caught:
        require(run)
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize(("schedule", "level"), [("constant", "note"), ("cosine", "error"), ("linear", "error")])
def test_a_warm_up_without_end_is_refused_exactly_where_the_engine_refuses_it(schedule: str, level: str) -> None:
    run = config(run={"num_steps": 5}, optim={"schedule": schedule, "warmup_steps": 5})
    (found,) = check(run, files=False)
    assert (found.key, found.level) == ("optim.warmup_steps", level)
    if level == "error":
        with pytest.raises(ValueError, match="leaves no step"):
            LearningRate.from_config(run.optim, optimizer_steps(run))
    else:
        LearningRate.from_config(run.optim, optimizer_steps(run))
