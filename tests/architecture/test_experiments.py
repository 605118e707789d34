"""Every experiment composes, loads and is possible at the world size it states, without a GPU or its input files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_zj.cli.compose import compose_run
from megatron_zj.config.checks import check
from megatron_zj.config.loader import ConfigError
from tests.architecture.source import ROOT

CONF = ROOT / "conf"
EXPERIMENTS = sorted(
    str(path.relative_to(CONF / "experiment").with_suffix("")) for path in CONF.rglob("experiment/**/*.yaml")
)


def errors(*overrides: str) -> list[str]:
    """What stands between this configuration and a run, on a machine that has its files and packages."""
    try:
        config = compose_run(overrides)
    except ConfigError as error:
        return [str(error)]
    return [str(finding) for finding in check(config, files=False, here=False) if finding.level == "error"]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_experiment_is_possible(experiment: str) -> None:
    assert errors(f"experiment={experiment}") == []
    assert compose_run([f"experiment={experiment}"]).world_size is not None


@pytest.mark.parametrize("layout", ["8gpu", "64gpu"])
@pytest.mark.parametrize(
    "experiment",
    [f"zhongjing/{stage}" for stage in ("pretrain", "sft", "reward", "ppo")]
    + [f"chimed_gpt/{stage}" for stage in ("pretrain", "sft", "reward", "rejection")],
)
def test_the_13b_experiments_fit_both_clusters(experiment: str, layout: str) -> None:
    name = f"{layout}_ppo" if experiment.endswith("ppo") else layout
    assert errors(f"experiment={experiment}", f"layout={name}") == []


def test_an_impossible_layout_is_found() -> None:
    assert errors("experiment=zhongjing/pretrain", "world_size=7")
    assert errors("experiment=zhongjing/pretrain", "parallel.tp=3")
    assert errors("experiment=zhongjing/pretrain", "optim.lrr=1")


def test_all_stages_of_the_demo_real_data_and_debugging_exist() -> None:
    for family in ("demo", "real", "debug"):
        assert {f"{family}/{stage}" for stage in ("pretrain", "sft", "reward", "ppo")} <= set(EXPERIMENTS)
    for family in ("demo", "debug"):
        assert {f"{family}/{kind}" for kind in ("dpo", "grpo", "rejection")} <= set(EXPERIMENTS)


def unstable_values(text: str) -> list[str]:
    """Resolvers whose value depends on when or where a file is read."""
    return re.findall(r"\$\{(?:now|oc\.env|hydra)[:.]", text)


def test_configurations_do_not_depend_on_when_or_where_they_are_read() -> None:
    found = {path.name: unstable_values(path.read_text(encoding="utf-8")) for path in CONF.rglob("*.yaml")}
    assert {name: values for name, values in found.items() if values} == {}
    assert unstable_values("dir: runs/${now:%Y}") == ["${now:"]


def test_the_entry_point_is_a_defaults_list_and_nothing_else() -> None:
    lines = [
        line for line in (CONF / "train.yaml").read_text().splitlines() if line.strip() and not line.startswith("#")
    ]
    assert lines[0] == "defaults:"
    assert all(line.startswith("  - ") for line in lines[1:])
    assert lines[-1].startswith("  - experiment: null")


def test_only_experiments_combine_groups() -> None:
    combining = {
        str(path.relative_to(CONF))
        for path in CONF.rglob("*.yaml")
        if "override /" in path.read_text(encoding="utf-8") and Path("experiment") not in path.relative_to(CONF).parents
    }
    assert combining == set()
