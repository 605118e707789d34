"""Composition: conf/ and the command line into a RunConfig."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_zj.cli import compose
from megatron_zj.cli.compose import (
    compose_run,
    conf_folder,
    frozen_text,
    load_frozen,
    options_of,
    parse_overrides,
    save_frozen,
)
from megatron_zj.config.algorithm import PPOConfig
from megatron_zj.config.data import ChatConfig, CorpusConfig
from megatron_zj.config.loader import ConfigError
from megatron_zj.models.presets import PRESETS

EXPERIMENTS = options_of("experiment")


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_run(overrides)
    return str(caught.value)


def test_the_promised_experiments_exist() -> None:
    promised = {f"demo/{name}" for name in ("pretrain", "sft", "sft_scratch", "reward", "ppo")}
    promised |= {
        f"{family}/{name}" for family in ("real", "zhongjing") for name in ("pretrain", "sft", "reward", "ppo")
    }
    promised |= {f"chimed_gpt/{name}" for name in ("pretrain", "sft", "reward")}
    assert promised <= set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_survives_freezing(name: str, tmp_path: Path) -> None:
    """That each is possible at its world size is tests/architecture/test_experiments.py."""
    config = compose_run([f"experiment={name}"])
    save_frozen(config, tmp_path / "config.yaml")
    assert load_frozen(tmp_path / "config.yaml") == config


def test_every_option_of_every_group_composes_alone() -> None:
    for group in ("model", "parallel", "engine", "optim", "checkpoint", "run", "tokenizer", "layout"):
        for option in options_of(group):
            compose_run([f"{group}={option}"])


def test_published_hyper_parameters_reach_the_configuration() -> None:
    pretrain = compose_run(["experiment=zhongjing/pretrain"])
    assert (pretrain.optim.lr, pretrain.optim.schedule, pretrain.algorithm.kind) == (5e-5, "cosine", "pretrain")
    assert pretrain.model.vocab_size == 39424
    sft = compose_run(["experiment=chimed_gpt/sft"]).optim
    assert (sft.lr, sft.beta2, sft.eps, sft.weight_decay, sft.clip_grad) == (1e-4, 0.98, 1e-8, 1e-4, 1.0)
    ppo = compose_run(["experiment=zhongjing/ppo"]).algorithm
    assert isinstance(ppo, PPOConfig)
    assert (ppo.kl_coef, ppo.sampling.top_p, ppo.sampling.top_k, ppo.epochs) == (0.2, 0.7, 50, 1)


def test_the_command_line_beats_the_experiment_which_beats_the_groups() -> None:
    assert compose_run(["experiment=demo/sft"]).parallel.tp == 2
    config = compose_run(["experiment=demo/sft", "parallel=pp2", "optim.lr=0.5", "run.num_steps=7"])
    assert (config.parallel.tp, config.parallel.pp, config.optim.lr, config.run.num_steps) == (1, 2, 0.5, 7)


def test_a_key_that_no_yaml_names_can_be_set_without_a_plus() -> None:
    assert compose_run(["engine.loss_scale.window=5"]).engine.loss_scale.window == 5
    assert compose_run(["placements.a.parallel.tp=2"]).placements["a"].parallel.tp == 2


def test_an_inherited_experiment_keeps_all_but_what_it_changes() -> None:
    sft, scratch = compose_run(["experiment=demo/sft"]), compose_run(["experiment=demo/sft_scratch"])
    assert scratch.checkpoint.load is None
    assert sft.checkpoint.load is not None
    assert (scratch.data, scratch.optim, scratch.parallel) == (sft.data, sft.optim, sft.parallel)


def test_switching_a_group_to_another_kind_leaves_no_key_of_the_old_kind() -> None:
    config = compose_run(["experiment=demo/sft", "data=corpus", "algorithm=pretrain", "data.files=[x]"])
    assert config.data == CorpusConfig(files=("x",))
    assert config.algorithm.kind == "pretrain"


def test_naming_the_kind_an_experiment_already_has_keeps_its_values() -> None:
    data = compose_run(["experiment=demo/sft", "data=chat"]).data
    assert isinstance(data, ChatConfig)
    assert data.max_length == 384


def test_a_role_inherits_what_it_does_not_set_from_the_run() -> None:
    config = compose_run(["algorithm=ppo", "data=prompts", "optim.beta2=0.5", "algorithm.critic.optim.lr=0.25"])
    assert isinstance(config.algorithm, PPOConfig)
    critic = config.algorithm.critic.optim
    assert critic is not None
    assert (critic.lr, critic.beta2) == (0.25, 0.5)
    assert config.algorithm.actor.optim is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lrr=1", "optim.lrr: unknown key; did you mean 'lr'?"),
        ("modle=tiny", "modle: unknown key; did you mean 'model'?"),
        ("experimentt=demo/sft", "experimentt: unknown key; did you mean 'experiment'?"),
        ("experimnt=demo/sft", "experimnt: unknown key; did you mean 'experiment'?"),
        ("layuot=8gpu", "layuot: unknown key; did you mean 'layout'?"),
        ("model=tinny", "model: no option 'tinny'; did you mean 'tiny'?"),
        ("experiment=", "experiment: empty; leave it out, or name one of chimed_gpt/"),
        ("experiment=demo/pop", "experiment: no option 'demo/pop'; did you mean 'demo/ppo'?"),
        ("experiment=null", "experiment: null; leave it out, or name one of chimed_gpt/"),
        ("model=null", "model: null; leave it out, or name one of "),
        ("data=5", "data: no option '5'; known: chat, corpus"),
        ("=5", "'=5' is no override: it has no key; write key=value"),
        ("algorithm.kind=[a]", "algorithm.kind: unknown kind ['a']; known: dpo"),
        ("model.preset=llama_7b", "model.preset: a name for the log, it chooses no shape; write model=llama_7b"),
        ("run.num_steps=ten", "run.num_steps: expected an integer, got the string 'ten'"),
        ("run.num_steps=1e3", "run.num_steps: expected an integer, got 1000.0; write 1000"),
        ("optim.lr=1e-4,3e-4", "'optim.lr=1e-4,3e-4' is a sweep; use zj launch --multirun"),
        ("run.dir=a=b", "'run.dir=a=b' is no override"),
        ("~data", "data: missing"),
        ("parallel.vpp=2", "parallel: vpp=2 needs pp > 1; set pp or vpp=1"),
    ],
)
def test_a_slip_on_the_command_line_is_named_with_a_remedy(override: str, expected: str) -> None:
    assert refusal(override).startswith(expected)


def test_special_tokens_need_no_quotes() -> None:
    (override,) = parse_overrides(["special_tokens=[<human>,<bot>]"])
    assert override.value() == ["<human>", "<bot>"]


def test_chinese_paths_need_no_quotes() -> None:
    config = compose_run(["run.dir=运行/第一", "data.files=[数据/甲.jsonl,b.jsonl,'丙 丁.jsonl']"])
    assert config.run.dir == Path("运行/第一")
    assert config.data.files == ("数据/甲.jsonl", "b.jsonl", "丙 丁.jsonl")


def test_experiments_of_ones_own_are_found_on_a_search_path(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nrun: {seed: 77}\n")
    config = compose_run([f"hydra.searchpath=['file://{tmp_path}']", "experiment=mine"])
    assert config.run.seed == 77


def test_a_broken_frozen_file_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for text, expected in (
        ("a: [", "not a YAML file"),
        ("- 1", "expected a mapping of settings, got list"),
        ("[" * 3000, "brackets or blocks are nested too deeply"),
        ("optim: {lr: 1}\nrun:\n  seed: 1\noptim: {lr: 2}", "line 4: optim is set twice; remove one of the two"),
        ("run:\n  seed: 1\n  seed: 2", "line 3: seed is set twice"),
        ("run: {sed: 1}", "run.sed: unknown key; did you mean 'seed'?"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_frozen(path)
        assert all(problem.startswith(f"{path}: ") for problem in caught.value.problems)
        assert expected in str(caught.value)


def test_small_numbers_stay_numbers_in_a_frozen_file() -> None:
    config = compose_run(["optim.eps=1e-08", "optim.lr=1e22"])
    assert yaml.safe_load(frozen_text(config))["optim"]["eps"] == 1e-8
    assert yaml.safe_load(frozen_text(config))["optim"]["lr"] == 1e22


def test_the_tree_is_found_in_an_installed_package_and_in_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "site-packages" / "megatron_zj" / "cli" / "compose.py"
    monkeypatch.setattr(compose, "__file__", str(module))
    with pytest.raises(ConfigError, match="reinstall megatron-zj"):
        conf_folder()
    for folder in (module.parents[2] / "conf", module.parents[1] / "conf"):  # the package's own wins
        folder.mkdir(parents=True)
        (folder / "train.yaml").touch()
        assert conf_folder() == folder


def test_conf_and_the_presets_hold_the_same_shapes() -> None:
    assert {name: compose_run([f"model={name}"]).model for name in options_of("model")} == PRESETS
