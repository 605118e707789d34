"""The loader: plain data into frozen dataclasses, strictly; and back."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zj.cli.compose import frozen_text
from megatron_zj.config.algorithm import PPOConfig, PretrainConfig, RewardConfig, RoleConfig, SFTConfig
from megatron_zj.config.checkpoint import CheckpointConfig
from megatron_zj.config.data import ChatConfig, CorpusConfig, PreferenceConfig, PromptsConfig, TokenizerConfig
from megatron_zj.config.loader import ConfigError, load, to_dict
from megatron_zj.config.model import ModelConfig, RopeScalingConfig
from megatron_zj.config.optim import EngineConfig, LossScaleConfig, OptimConfig
from megatron_zj.config.parallel import ParallelConfig, PlacementConfig
from megatron_zj.config.run import RunConfig, RunSettings
from megatron_zj.config.sampling import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class Adam:
    kind: Literal["adam"] = "adam"
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class Sgd:
    kind: Literal["sgd"] = "sgd"
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if self.momentum < 0:
            raise ValueError(f"momentum must be >= 0, got {self.momentum}")


@dataclass(frozen=True, kw_only=True)
class Toy:
    steps: int
    optim: Adam | Sgd = Adam()
    maybe: Adam | Sgd | None = None
    path: Path | None = None
    mode: Literal["fast", "exact", 3] = "fast"
    names: tuple[str, ...] = ()
    named: dict[str, Sgd] | None = None
    flag: bool = False


def problems(data: dict[str, Any], schema: type[Any] = Toy) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(schema, data)
    return caught.value.problems


def test_every_understood_annotation_loads_to_its_own_type() -> None:
    toy = load(
        Toy,
        {
            "steps": 3,
            "optim": {"kind": "sgd", "momentum": 1},
            "maybe": {"kind": "adam", "betas": [0, 1]},
            "path": "a/b",
            "mode": 3,
            "names": ["x", "y"],
            "named": {"one": {}},
            "flag": True,
        },
    )
    assert toy == Toy(
        steps=3,
        optim=Sgd(momentum=1.0),
        maybe=Adam(betas=(0.0, 1.0)),
        path=Path("a/b"),
        mode=3,
        names=("x", "y"),
        named={"one": Sgd()},
        flag=True,
    )
    assert isinstance(toy.optim, Sgd)
    assert type(toy.optim.momentum) is float


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"steps": 1, "stepps": 2}, "stepps: unknown key; did you mean 'steps'?"),
        ({"steps": 1, "optim": {"kind": "sgd", "betas": [0, 1]}}, "optim.betas: unknown key for kind 'sgd'; known: "),
        ({}, "steps: missing"),
        ({"steps": "3"}, "steps: expected an integer, got the string '3'; write it without quotes"),
        ({"steps": True}, "steps: expected an integer, got True"),
        ({"steps": 2**63}, "steps: 9223372036854775808 does not fit in 64 bits; write a smaller number"),
        ({"steps": 1, "optim": {"kind": "sgd", "momentum": 10**400}}, "optim.momentum: 1000"),
        ({"steps": 1, "optim": {"kind": ["sgd"]}}, "optim.kind: unknown kind ['sgd']"),
        ({"steps": 2.0}, "steps: expected an integer, got 2.0; write 2"),
        ({"steps": None}, "steps: expected an integer, got null"),
        ({"steps": 1, "flag": 1}, "flag: expected true or false, got 1"),
        ({"steps": 1, "flag": "yes"}, "flag: expected true or false, got the string 'yes'"),
        ({"steps": 1, "path": 5}, "path: expected a path (a string), got 5; quote it"),
        ({"steps": 1, "path": ""}, "path: expected a path"),
        ({"steps": 1, "mode": "exakt"}, "mode: the string 'exakt' is not one of fast, exact, 3; did you mean 'exact'?"),
        ({"steps": 1, "mode": "3"}, "mode: the string '3' is not one of"),
        ({"steps": 1, "names": "x"}, "names: expected a list, got the string 'x'; write names=[x]"),
        ({"steps": 1, "names": ["x", 2]}, "names[1]: expected a string, got 2"),
        ({"steps": 1, "optim": {"kind": "adam", "betas": [1, 2, 3]}}, "optim.betas: expected 2 items, got 3"),
        ({"steps": 1, "optim": {"kind": "adan"}}, "optim.kind: unknown kind 'adan'; did you mean 'adam'?"),
        ({"steps": 1, "optim": {}}, "optim.kind: missing; one of adam, sgd"),
        ({"steps": 1, "optim": "adam"}, "optim: expected a mapping with a kind (adam, sgd)"),
        ({"steps": 1, "optim": {"kind": "sgd", "momentum": -1}}, "optim: momentum must be >= 0, got -1.0"),
        ({"steps": 1, "optim": {"kind": "sgd", "momentum": float("nan")}}, "optim.momentum: nan is not a number"),
        ({"steps": 1, "named": {"a": {"momentum": "x"}}}, "named.a.momentum: expected a number, got the string 'x'"),
        ({"steps": 1, "named": {1: {}}}, "named: the key 1 is not a string"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_path_and_a_remedy(data: dict[str, Any], expected: str) -> None:
    (problem,) = problems(data)
    assert problem.startswith(expected)


def test_all_problems_are_reported_at_once() -> None:
    assert len(problems({"stepz": 1, "flag": 3, "mode": "x"})) == 4  # and steps is missing


def test_a_long_list_of_problems_stays_on_one_screen() -> None:
    with pytest.raises(ConfigError) as caught:
        load(Toy, {"steps": 1, **{f"unknown_{i}": i for i in range(100)}})
    assert len(caught.value.problems) == 100
    assert len(str(caught.value).splitlines()) < 20


def test_a_home_folder_is_expanded_so_that_no_folder_is_named_tilde() -> None:
    assert load(Toy, {"steps": 1, "path": "~/runs"}).path == Path.home() / "runs"


def test_every_field_of_the_schema_is_keyword_only_and_frozen() -> None:
    seen: list[type[Any]] = [RunConfig, RunSettings, ModelConfig, RopeScalingConfig, TokenizerConfig, ParallelConfig]
    seen += [PlacementConfig, EngineConfig, LossScaleConfig, OptimConfig, CheckpointConfig, RoleConfig, SamplingConfig]
    seen += [CorpusConfig, ChatConfig, PreferenceConfig, PromptsConfig, PretrainConfig, SFTConfig, RewardConfig]
    for schema in [*seen, PPOConfig]:
        assert schema.__dataclass_params__.frozen, schema
        assert all(field.kw_only for field in fields(schema)), schema


NUMBERS = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
POSITIVE = st.floats(min_value=1e-300, allow_nan=False, allow_infinity=False, max_value=1e300)
COUNTS = st.integers(1, 10**9)
TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=8)
PATHS = st.builds(Path, TEXT.map(lambda text: f"文/{text}"))
OPTIMS = st.builds(
    OptimConfig,
    lr=st.floats(0.1, 10),
    min_lr=st.floats(0, 0.1),
    eps=POSITIVE,
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    decay_steps=st.none() | st.integers(1, 10**9),
)
ENGINES = st.builds(
    EngineConfig,
    precision=st.sampled_from(["fp32", "bf16", "fp16"]),
    recompute_modules=st.lists(st.sampled_from(["core_attn", "mlp", "layernorm"])).map(tuple),
    loss_scale=st.builds(LossScaleConfig, initial=POSITIVE, window=COUNTS),
)
ROLES = st.builds(RoleConfig, load=st.none() | PATHS, engine=st.none() | ENGINES, optim=st.none() | OPTIMS)
ALGORITHMS = st.one_of(
    st.builds(PretrainConfig, model=ROLES),
    st.builds(SFTConfig, global_batch_size=COUNTS),
    st.builds(RewardConfig, centering=NUMBERS),
    st.builds(PPOConfig, critic=ROLES, kl_target=st.none() | POSITIVE, whiten_scores=st.booleans()),
)
FILES = st.lists(TEXT, max_size=3).map(tuple)
DATA = st.one_of(
    st.builds(CorpusConfig, files=FILES, weights=st.none() | st.lists(POSITIVE, max_size=3).map(tuple)),
    st.builds(ChatConfig, files=FILES, overlong=st.sampled_from(["error", "truncate", "split", "skip"])),
    st.builds(PreferenceConfig, validation_files=FILES),
    st.builds(PromptsConfig, template=st.sampled_from(["ziya", "chimed_gpt"])),
)
SCALINGS = st.builds(RopeScalingConfig, kind=st.sampled_from(["linear", "llama3"]), factor=POSITIVE)
RUNS = st.builds(
    RunConfig,
    algorithm=ALGORITHMS,
    data=DATA,
    run=st.builds(RunSettings, dir=PATHS, seed=st.integers(1 - 2**63, 2**63 - 1), wandb_project=st.none() | TEXT),
    model=st.builds(ModelConfig, rope_scaling=st.none() | SCALINGS, norm_eps=POSITIVE),
    tokenizer=st.builds(TokenizerConfig, path=st.none() | PATHS, special_tokens=FILES),
    placements=st.dictionaries(TEXT, st.builds(PlacementConfig, num_ranks=st.none() | COUNTS), max_size=2),
    engine=ENGINES,
    optim=OPTIMS,
    world_size=st.none() | st.integers(1, 10**6),
)


@settings(max_examples=60)
@given(RUNS)
def test_a_configuration_survives_dict_json_and_yaml_unchanged(config: RunConfig) -> None:
    plain = to_dict(config)
    assert load(RunConfig, plain) == config
    assert load(RunConfig, json.loads(json.dumps(plain))) == config
    assert load(RunConfig, yaml.safe_load(frozen_text(config))) == config


@settings(max_examples=30)
@given(RUNS, st.data())
def test_an_unknown_key_anywhere_is_found_by_its_path(config: RunConfig, data: st.DataObject) -> None:
    plain = to_dict(config)
    places = [(), *((key,) for key in ("algorithm", "data", "run", "model", "engine", "optim"))]
    place = data.draw(st.sampled_from([*places, ("engine", "loss_scale")]))
    spot = plain
    for key in place:
        spot = spot[key]
    spot["no_such_key"] = 1
    (problem,) = problems(plain, RunConfig)
    assert problem.startswith(".".join([*place, "no_such_key"]) + ": unknown key")
