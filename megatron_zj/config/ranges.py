"""The values that numbers of a configuration may have."""

from __future__ import annotations

from math import isinf
from typing import Any

from megatron_zj.config.loader import ConfigError


def check_ranges(config: Any, **intervals: str) -> None:
    """Raise ``ConfigError`` naming every field whose number is outside its interval, written ``[1, inf)``, ``[0, 1)``.

    A tuple's numbers each must be inside; None is allowed where the field's type allows it.
    """
    problems = []
    for name, interval in intervals.items():
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not _inside(number, interval):
                problems.append(f"{name}: must be {_words(interval)}{' and finite' * isinf(number)}, got {number}")
    if problems:
        raise ConfigError(problems)


def _inside(number: float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    return above and (number <= high if interval[-1] == "]" else number < high)


def _words(interval: str) -> str:
    low, high = interval[1:-1].split(", ")
    if high != "inf":
        return f"in {interval}"
    return f"{'>=' if interval[0] == '[' else '>'} {low}"
