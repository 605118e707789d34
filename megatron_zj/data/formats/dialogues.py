"""Dialogues and single exchanges for SFT."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from megatron_zj.data.chat import Message, RoleName
from megatron_zj.data.errors import BadRecord
from megatron_zj.data.formats.rankings import CLINIC_ROLES, STANDARD_ROLES, history_of
from megatron_zj.data.formats.registry import Format, has_keys
from megatron_zj.data.records import DialogueRecord, PromptRecord, exchange, messages_of, text_of

_SHAREGPT_ROLES: dict[str, RoleName] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_BENTSAO_TURN = re.compile(r"<(user|bot)>\s*[:：]")


def _clinic(field: str, *, role: str = "role", content: str = "content") -> Callable[[dict[str, Any]], DialogueRecord]:
    """Of a transcript under ``field`` what the templates need: what the doctor says before the patient, and a patient's
    last words without an answer, are left out; neighbouring turns of one speaker are joined by a line break."""

    def convert(value: dict[str, Any]) -> DialogueRecord:
        joined: list[Message] = []
        for message in messages_of(value[field], field, CLINIC_ROLES, role=role, content=content):
            if joined and joined[-1].role == message.role:
                joined[-1] = Message(message.role, f"{joined[-1].content}\n{message.content}")
            else:
                joined.append(message)
        while joined and joined[0].role == "assistant":
            joined.pop(0)
        while joined and joined[-1].role == "user":
            joined.pop()
        if not joined:
            raise BadRecord("no question is followed by an answer", field=field)
        return DialogueRecord(tuple(joined), field)

    return convert


def _messages(value: dict[str, Any]) -> DialogueRecord | PromptRecord:
    turns = messages_of(value["messages"], "messages", STANDARD_ROLES, role="role", content="content")
    asks = bool(turns) and turns[-1].role == "user"
    return PromptRecord(turns) if asks else DialogueRecord(turns)


def _sharegpt(value: dict[str, Any]) -> DialogueRecord:
    return DialogueRecord(
        messages_of(value["conversations"], "conversations", _SHAREGPT_ROLES, role="from", content="value"),
        "conversations",
    )


def _alpaca(value: dict[str, Any]) -> DialogueRecord:
    """instruction (or ``instruct``), input, output, history; each text may be a list of one."""
    key = "instruction" if "instruction" in value else "instruct"
    asked = text_of(value[key], key)
    more = text_of(value.get("input"), "input", empty=True) if value.get("input") != [] else ""
    question = f"{asked}\n{more}" if more else asked
    answer = Message("assistant", text_of(value["output"], "output"))
    return DialogueRecord((*exchange(history_of(value.get("history")), question), answer))


def _bentsao(value: dict[str, Any]) -> DialogueRecord:
    """Earlier turns inside ``instruction``: `` <user>: ... <bot>: ... <user>: ...``."""
    pieces = _BENTSAO_TURN.split(value["instruction"])
    if pieces[0].strip():
        raise BadRecord(f"text before the first <user>: {pieces[0].strip()[:20]!r}", field="instruction")
    turns = [
        Message("user" if speaker == "user" else "assistant", text_of(text, "instruction"))
        for speaker, text in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    return DialogueRecord((*turns, Message("assistant", text_of(value["output"], "output"))))


def _toyhom(value: dict[str, Any]) -> DialogueRecord:
    """The title is the question in short; it is left out where the question repeats it."""
    title, ask = text_of(value["title"], "title", empty=True), text_of(value["ask"], "ask")
    question = f"{title}\n{ask}" if title and not ask.startswith(title) else ask
    return DialogueRecord((Message("user", question), Message("assistant", text_of(value["answer"], "answer"))))


def _turn_lists(value: dict[str, Any]) -> DialogueRecord:
    """ChiMed-GPT's records: the questions, and their answers."""
    asked, answered = value["prompt"], value["output"]
    if not asked:
        raise BadRecord("the list of questions is empty", field="prompt")
    if len(asked) != len(answered):
        raise BadRecord(f"{len(asked)} questions and {len(answered)} answers", field="output")
    turns: list[Message] = []
    for index, (question, answer) in enumerate(zip(asked, answered, strict=True)):
        turns.append(Message("user", text_of(question, f"prompt[{index}]")))
        turns.append(Message("assistant", text_of(answer, f"output[{index}]")))
    return DialogueRecord(tuple(turns))


def _is_cmdd(value: Any) -> bool:
    if not has_keys("messages")(value) or not isinstance(value["messages"], list):
        return False
    return any(isinstance(turn, dict) and turn.get("role") in ("doctor", "patient") for turn in value["messages"])


def _is_bentsao(value: Any) -> bool:
    asked = value.get("instruction") if isinstance(value, dict) else None
    return isinstance(asked, str) and _BENTSAO_TURN.match(asked.strip()) is not None


def _is_turn_lists(value: Any) -> bool:
    return has_keys("prompt", "output")(value) and isinstance(value["prompt"], list)


def _is_alpaca(value: Any) -> bool:
    return isinstance(value, dict) and "output" in value and ("instruction" in value or "instruct" in value)


_TURNS = '[{"role": ..., "content": ...}, ...]'
FORMATS = (
    Format(
        name="cmdd",
        shape=f'{{"messages": {_TURNS}}} with roles doctor and patient',
        matches=_is_cmdd,
        convert=_clinic("messages"),
    ),
    Format(
        name="cmdd_raw",
        shape='{"dialogue-content": [{"speaker": 医生 or 患者, "sentence": ...}, ...]}',
        matches=has_keys("dialogue-content"),
        convert=_clinic("dialogue-content", role="speaker", content="sentence"),
    ),
    Format(
        name="messages",
        shape=f'{{"messages": {_TURNS}}} with roles system, user and assistant',
        matches=has_keys("messages"),
        convert=_messages,
    ),
    Format(
        name="disc",
        shape=f'{{"conversation": {_TURNS}}}',
        matches=has_keys("conversation"),
        convert=_clinic("conversation"),
    ),
    Format(
        name="sharegpt",
        shape='{"conversations": [{"from": human or gpt, "value": ...}, ...]}',
        matches=has_keys("conversations"),
        convert=_sharegpt,
    ),
    Format(
        name="bentsao",
        shape='{"instruction": "<user>: ... <bot>: ... <user>: ...", "output": ...}',
        matches=_is_bentsao,
        convert=_bentsao,
    ),
    Format(
        name="toyhom",
        shape="a table with columns department, title, ask, answer",
        matches=has_keys("title", "ask", "answer"),
        convert=_toyhom,
    ),
    Format(
        name="turn_lists",
        shape='{"prompt": [questions], "output": [answers]}',
        matches=_is_turn_lists,
        convert=_turn_lists,
    ),
    Format(
        name="alpaca",
        shape='{"instruction" (or "instruct"): ..., "input": ..., "output": ..., "history": [[q, a], ...]}',
        matches=_is_alpaca,
        convert=_alpaca,
    ),
)
