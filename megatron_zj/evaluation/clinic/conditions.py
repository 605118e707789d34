"""The table: pairs of look-alike conditions, each with what a doctor must know of it (``conditions.json``).

Written for testing software; simplified; no medical advice.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

NOTICE = "仅供软件测试，不构成医疗建议 (for testing software; no medical advice)"
TABLE = "conditions.json"


@dataclass(frozen=True)
class Condition:
    """One row of the table; every text is a phrase that fits into a sentence."""

    name: str
    complaint: str  # what both conditions of the pair begin with
    question: str  # what tells the pair apart
    sign: str  # what a patient with this one answers
    examination: str
    treatment: str
    alternative: str  # instead of the treatment, for the group at risk
    risk_group: str  # must not get the treatment
    risk_statement: str  # how a member of that group says so
    red_flag: str  # to the emergency room at once
    in_dialogues: bool  # False: the encyclopaedia alone tells of it


@dataclass(frozen=True)
class Clinic:
    """The whole table, in order; ``pairs`` holds (one, look-alike)."""

    pairs: tuple[tuple[Condition, Condition], ...]

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Every condition."""
        return tuple(condition for pair in self.pairs for condition in pair)

    @property
    def dialogue_pairs(self) -> tuple[tuple[Condition, Condition], ...]:
        """The pairs patients come with."""
        return tuple(pair for pair in self.pairs if pair[0].in_dialogues)

    @property
    def encyclopaedia_only(self) -> tuple[Condition, ...]:
        """The conditions no dialogue mentions: the exam asks about these."""
        return tuple(condition for condition in self.conditions if not condition.in_dialogues)

    def named(self, name: str) -> Condition:
        """The condition with this name.  Raises KeyError."""
        for condition in self.conditions:
            if condition.name == name:
                return condition
        raise KeyError(f"the clinic has no condition {name!r}")


def load_clinic() -> Clinic:
    """Read the table that ships with the package.  Raises ValueError where a row is incomplete."""
    text = resources.files(__package__).joinpath(TABLE).read_text(encoding="utf-8")
    pairs = []
    for index, pair in enumerate(json.loads(text)["pairs"]):
        shared = {key: pair[key] for key in ("complaint", "question", "in_dialogues")}
        rows = [_condition({**shared, **row}, index) for row in pair["conditions"]]
        if len(rows) != 2:
            raise ValueError(f"{TABLE}: pair {index} has {len(rows)} conditions, not 2")
        pairs.append((rows[0], rows[1]))
    return Clinic(tuple(pairs))


def _condition(row: dict[str, Any], index: int) -> Condition:
    expected = {field.name for field in fields(Condition)}
    if set(row) != expected:
        raise ValueError(f"{TABLE}: pair {index}: missing or unknown fields {sorted(set(row) ^ expected)}")
    return Condition(**row)
