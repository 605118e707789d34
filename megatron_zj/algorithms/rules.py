"""Rule rewards: the allow-list of functions that ``algorithm.rules`` may name, each with its weight.

A rule sees one answer and returns a number, by custom in [0, 1].  ``@rule`` puts a function on the list under its
own name; a configuration can name what is on the list and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from megatron_zj.config.loader import ConfigError, suggestion


@dataclass(frozen=True)
class Answer:
    """What a rule is given: tokens [T] int64 and their text."""

    prompt: str
    response: str
    prompt_tokens: Tensor
    response_tokens: Tensor
    truncated: bool  # ended without a stop token


Rule = Callable[[Answer], float]
RULES: dict[str, Rule] = {}


def rule(function: Rule) -> Rule:
    """Put a function on the list."""
    name = getattr(function, "__name__", "")
    if not name or name in RULES:
        raise ValueError(f"a rule needs a name of its own, got {name!r}")
    RULES[name] = function
    return function


def unknown_rules(names: Iterable[str]) -> dict[str, str]:
    """What is wrong with the names that no rule has, by their configuration key."""
    unknown = [name for name in names if name not in RULES]
    return {f"algorithm.rules.{name}": f"no such rule{suggestion(name, list(RULES))}" for name in unknown}


def chosen_rules(weights: Mapping[str, float]) -> list[tuple[Rule, float]]:
    """The named rules with their weights.  ConfigError names an unknown one."""
    if wrong := unknown_rules(weights):
        raise ConfigError([f"{key}: {what}" for key, what in wrong.items()])
    return [(RULES[name], weight) for name, weight in weights.items()]


@rule
def ends(answer: Answer) -> float:
    """1 where the answer ended by itself."""
    return float(not answer.truncated)


@rule
def chinese(answer: Answer) -> float:
    """Share of Chinese characters among the answer's letters and ideographs."""
    han = len(re.findall(r"[\u3400-\u9fff]", answer.response))
    letters = len(re.findall(r"[^\W\d_]", answer.response))
    return han / letters if letters else 0.0


@rule
def varied(answer: Answer) -> float:
    """Share of the answer's character trigrams that are different."""
    text = answer.response
    grams = [text[index : index + 3] for index in range(len(text) - 2)]
    return len(set(grams)) / len(grams) if grams else 1.0


@rule
def refers_to_doctor(answer: Answer) -> float:
    """1 where the answer tells the patient to see a doctor."""
    return float(bool(re.search(r"就医|就诊|医院|医生|门诊|急诊", answer.response)))
