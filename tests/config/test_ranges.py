"""Every number of a configuration has a range, and one outside it is refused by its dotted key."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_zj.config import checkpoint, data, inference, model, optim, parallel, run
from megatron_zj.config.checks import check
from megatron_zj.config.loader import ConfigError, load, to_dict
from megatron_zj.config.ranges import check_ranges
from megatron_zj.config.run import RunConfig

MODULES = (checkpoint, data, inference, model, optim, parallel, run)
ANY_NUMBER = {"seed"}  # every value has a meaning
NUMBERS = {int, float, int | None, float | None, tuple[int, ...], tuple[float, ...] | None}


def numbers() -> list[tuple[type[Any], str]]:
    """Every field of a configuration that holds numbers, with its class."""
    classes = {
        found
        for module in MODULES
        for _, found in inspect.getmembers(module, dataclasses.is_dataclass)
        if found.__module__ == module.__name__
    }
    return [
        (schema, name)
        for schema in sorted(classes, key=lambda schema: schema.__name__)
        for name, hint in get_type_hints(schema).items()
        if hint in NUMBERS and name not in ANY_NUMBER
    ]


def values(schema: type[Any]) -> dict[str, Any]:
    """The defaults of a class, and something for what has none."""
    needed = {"load": "x", "checkpoint": {"load": "x"}, "kind": "linear", "factor": 2.0}
    if schema is RunConfig:
        needed = {"algorithm": {"kind": "pretrain"}, "data": {"kind": "corpus"}}
    fields = {field.name for field in dataclasses.fields(schema) if field.default is dataclasses.MISSING}
    return {name: value for name, value in needed.items() if name in fields}


@pytest.mark.parametrize(("schema", "name"), numbers())
def test_a_number_below_every_meaning_is_refused_by_its_key(schema: type[Any], name: str) -> None:
    hint = get_type_hints(schema)[name]
    wrong: Any = [-1] if "tuple" in str(hint) else -1
    with pytest.raises(ConfigError) as caught:
        load(schema, {**values(schema), name: wrong}, "some.where")
    assert caught.value.problems[0].startswith(f"some.where.{name}: must be ")
    assert caught.value.problems[0].endswith((", got -1", ", got -1.0"))


@dataclasses.dataclass(frozen=True)
class Shares:
    share: float = 0.5
    counts: tuple[int, ...] | None = None
    size: int = 1

    def __post_init__(self) -> None:
        check_ranges(self, share="[0, 1)", counts="(0, inf)", size="[1, inf)")


@given(st.floats(allow_nan=False), st.none() | st.lists(st.integers()).map(tuple), st.integers())
def test_exactly_the_values_outside_their_intervals_are_named(
    share: float, counts: tuple[int, ...] | None, size: int
) -> None:
    wrong = {"share": not 0 <= share < 1, "counts": any(n <= 0 for n in counts or ()), "size": size < 1}
    expected = [name for name, found in wrong.items() if found]
    try:
        Shares(share, counts, size)
        named = []
    except ConfigError as error:
        named = [problem.partition(":")[0] for problem in error.problems]
    assert list(dict.fromkeys(named)) == expected


@given(st.data())
def test_whatever_numbers_a_run_is_given_it_is_refused_or_checked_and_never_fails(draw: st.DataObject) -> None:
    plain = to_dict(load(RunConfig, {"algorithm": {"kind": "ppo"}, "data": {"kind": "prompts"}}))
    places = [
        (group, key)
        for group in ("algorithm", "data", "run", "model", "parallel", "engine", "optim", "checkpoint")
        for key, value in plain[group].items()
        if type(value) in (int, float)
    ]
    for group, key in draw.draw(st.lists(st.sampled_from(places), min_size=1, max_size=4)):
        number = st.integers(-3, 70) if isinstance(plain[group][key], int) else st.floats(-2, 2)
        plain[group][key] = draw.draw(number)
    try:
        config = load(RunConfig, plain)
    except ConfigError:
        return
    check(config, draw.draw(st.none() | st.integers(1, 9)), files=False)
