"""Rule rewards: the allow-list of functions that ``algorithm.rules`` may name, each with its weight.

A rule sees one answer and returns a number, by custom in [0, 1].  ``@rule`` puts a function on the list under its
own name; a configuration can name what is on the list and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
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


def chosen_rules(weights: Mapping[str, float]) -> list[tuple[Rule, float]]:
    """The named rules with their weights.  ConfigError names an unknown one."""
    unknown = [f"algorithm.rules.{name}: no such rule{suggestion(name, list(RULES))}" for name in weights]
    unknown = [text for name, text in zip(weights, unknown, strict=True) if name not in RULES]
    if unknown:
        raise ConfigError(unknown)
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
