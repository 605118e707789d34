"""Ranked responses.  Registered before dialogues: a ranking often has a dialogue's keys and more."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from typing import Any

from megatron_zj.data.chat import Message, RoleName
from megatron_zj.data.errors import BadRecord
from megatron_zj.data.formats.registry import Format, has_keys
from megatron_zj.data.records import PreferenceRecord, exchange, messages_of, text_of

STANDARD_ROLES: dict[str, RoleName] = {"system": "system", "user": "user", "assistant": "assistant"}
CLINIC_ROLES: dict[str, RoleName] = {
    **STANDARD_ROLES,
    "patient": "user",
    "doctor": "assistant",
    "患者": "user",
    "医生": "assistant",
}


def _answers(values: Sequence[Any], field: str) -> tuple[tuple[Message, ...], ...]:
    return tuple((Message("assistant", text_of(value, f"{field}[{i}]")),) for i, value in enumerate(values))


def prompt_of(value: dict[str, Any]) -> tuple[tuple[Message, ...], str]:
    """``messages`` (a list of turns) or ``prompt`` (one user turn, or a list of turns), and which of them."""
    field = "messages" if "messages" in value else "prompt"
    if isinstance(value[field], str):
        return (Message("user", text_of(value[field], field)),), field
    return messages_of(value[field], field, STANDARD_ROLES, role="role", content="content"), field


def _ranked(value: dict[str, Any]) -> PreferenceRecord:
    responses, ranks = value["responses"], value.get("ranks")
    if not isinstance(responses, list):
        raise BadRecord(f"expected a list, found {type(responses).__name__}", field="responses")
    ranks = list(range(len(responses))) if ranks is None else ranks
    if not isinstance(ranks, list) or not all(isinstance(r, int | float) and not isinstance(r, bool) for r in ranks):
        raise BadRecord("expected a list of numbers, smaller is better", field="ranks")
    answers = []
    for index, response in enumerate(responses):
        field = f"responses[{index}]"
        is_text = isinstance(response, str)
        answers.append(
            (Message("assistant", text_of(response, field)),)
            if is_text
            else messages_of(response, field, STANDARD_ROLES, role="role", content="content")
        )
    prompt, field = prompt_of(value)
    return PreferenceRecord(prompt, tuple(answers), tuple(float(rank) for rank in ranks), field)


def _pair(question: str, chosen: str, rejected: str) -> Any:
    def convert(value: dict[str, Any]) -> PreferenceRecord:
        prompt = (Message("user", text_of(value[question], question)),)
        answers = [text_of(value[chosen], chosen), text_of(value[rejected], rejected)]
        return PreferenceRecord(prompt, _answers(answers, "responses"), (0.0, 1.0))

    return convert


def _disc_ranked(value: dict[str, Any]) -> PreferenceRecord:
    """Whole dialogues judged as a whole: a response is all that follows the patient's first words."""
    prompt = (Message("user", text_of(value["prompt"], "prompt")),)
    responses, ranks = [], []
    for index, candidate in enumerate(value["candidates"]):
        field = f"candidates[{index}].conversation"
        turns = messages_of(candidate["conversation"], field, CLINIC_ROLES, role="role", content="content")
        if turns[:1] != prompt:
            raise BadRecord("the dialogue does not begin with the prompt", field=field)
        responses.append(turns[1:])
        ranks.append(-float(candidate["total"]))
    return PreferenceRecord(prompt, tuple(responses), tuple(ranks))


def _zhongjing_table(value: dict[str, Any]) -> PreferenceRecord:
    """Columns rank1 (best), rank2 ...: the responses in order."""
    columns = sorted((key for key in value if re.fullmatch(r"rank\d+", key)), key=lambda key: int(key[4:]))
    answers = tuple((Message("assistant", text_of(value[column], column)),) for column in columns)
    question = text_of(value["query"], "query")
    return PreferenceRecord(
        exchange(history_of(value.get("history")), question), answers, tuple(float(i) for i in range(len(answers)))
    )


def _zhongjing_labels(value: dict[str, Any]) -> PreferenceRecord:
    """The annotation tool's input with the annotator's ``ranks`` (1 is best), one a response."""
    columns = sorted((key for key in value if re.fullmatch(r"response_\d+", key)), key=lambda key: int(key[9:]))
    answers = tuple((Message("assistant", text_of(value[column], column)),) for column in columns)
    prompt = exchange(history_of(value.get("history")), text_of(value["query"], "query"))
    ranks = _literal(value["ranks"], "ranks") if isinstance(value["ranks"], str) else value["ranks"]
    return PreferenceRecord(prompt, answers, tuple(float(rank) for rank in ranks))


def _best_first(value: dict[str, Any]) -> PreferenceRecord:
    parts = (text_of(value["instruction"], "instruction"), text_of(value.get("input"), "input", empty=True))
    question = "\n".join(part for part in parts if part)
    answers = _answers(value["output"], "output")
    ranks = tuple(float(index) for index in range(len(answers)))
    return PreferenceRecord(exchange(history_of(value.get("history")), question), answers, ranks)


def history_of(value: Any) -> list[tuple[str, str]]:
    """Earlier (question, answer) pairs: a list of pairs, or the text of one; nothing where empty."""
    if isinstance(value, str):
        value = _literal(value, "history")
    pairs = []
    for index, pair in enumerate(value or []):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRecord("expected [question, answer]", field=f"history[{index}]")
        pairs.append((text_of(pair[0], f"history[{index}][0]"), text_of(pair[1], f"history[{index}][1]")))
    return pairs


def _literal(text: str, field: str) -> Any:
    if not text.strip():
        return []
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)  # literals only, as Python prints a list
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:  # the last: nested without end
        raise BadRecord(f"neither JSON nor a printed list: {error}", field=field) from error


def _is_best_first(value: Any) -> bool:
    return has_keys("instruction", "output")(value) and isinstance(value["output"], list) and len(value["output"]) > 1


FORMATS = (
    Format(
        name="ranked",
        shape='{"prompt" or "messages": ..., "responses": [...], "ranks": [...]}, smaller is better',
        matches=has_keys("responses"),
        convert=_ranked,
    ),
    Format(
        name="medicalgpt_reward",
        shape='{"question": ..., "response_chosen": ..., "response_rejected": ...}',
        matches=has_keys("question", "response_chosen", "response_rejected"),
        convert=_pair("question", "response_chosen", "response_rejected"),
    ),
    Format(
        name="pairs",
        shape='{"prompt": ..., "chosen": ..., "rejected": ...}',
        matches=has_keys("prompt", "chosen", "rejected"),
        convert=_pair("prompt", "chosen", "rejected"),
    ),
    Format(
        name="disc_ranked",
        shape='{"prompt": ..., "candidates": [{"total": score, "conversation": [turns]}, ...]}',
        matches=has_keys("prompt", "candidates"),
        convert=_disc_ranked,
    ),
    Format(
        name="zhongjing_ranking",
        shape="a table with columns query, history, rank1 (best), rank2 ...",
        matches=has_keys("query", "rank1"),
        convert=_zhongjing_table,
    ),
    Format(
        name="zhongjing_labels",
        shape='{"query": ..., "history": [...], "response_0": ..., "response_1": ..., "ranks": [...]}',
        matches=has_keys("query", "response_0", "ranks"),
        convert=_zhongjing_labels,
    ),
    Format(
        name="best_first",
        shape='{"instruction": ..., "output": [best, ..., worst]}',
        matches=_is_best_first,
        convert=_best_first,
    ),
)
