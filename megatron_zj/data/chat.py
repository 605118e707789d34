"""Chat templates as data, and dialogues to spans of ids: the one place where the chat string is made.

Training, generation and evaluation all render through ``render``, so the string cannot differ between them.  The loss
mask comes from the structure (which span is an assistant's), never from ids: a pad id equal to eos cannot erase an eos.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from megatron_zj.config.loader import suggestion
from megatron_zj.data.errors import BadRecord, DataError
from megatron_zj.data.tokenizer import Tokenizer

RoleName = Literal["system", "user", "assistant"]
CONTENT = "{content}"
_OWN = ("bos", "eos")  # tokens that every tokenizer has, under names of its own


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: RoleName
    content: str


@dataclass(frozen=True)
class Token:
    """A special token of a template: ``bos``, ``eos``, or the text of an added token."""

    name: str


Part = str | Token  # text (``{content}`` stands for the turn's content) or one special token


@dataclass(frozen=True)
class ChatTemplate:
    """What surrounds the turns.  Neighbouring texts are tokenized apart: each part is one call of the tokenizer."""

    start: tuple[Part, ...]  # before everything
    system: tuple[Part, ...]  # a system turn, after start
    user: tuple[Part, ...]  # a user turn, up to where the answer begins
    assistant: tuple[Part, ...]  # an answer; all of it carries loss
    between: tuple[Part, ...]  # between an answer and the next user turn


_TEMPLATES = {
    # Zhongjing (SupritYoung/Zhongjing, template "ziya"): bos at every turn, <human> and <bot> single tokens.
    "ziya": ChatTemplate(
        start=(Token("bos"),),
        system=(CONTENT, "\n"),
        user=(Token("<human>"), f":{CONTENT}\n", Token("<bot>"), ":"),
        assistant=(CONTENT, Token("eos")),
        between=("\n", Token("bos")),
    ),
    # ChiMed-GPT (fengshen, finetune_ziya_with_hf): brackets are plain text, no bos.
    "chimed_gpt": ChatTemplate(
        start=(),
        system=(f"{CONTENT}\n",),
        user=(f"[human]:{CONTENT}\n[bot]:",),
        assistant=(CONTENT, Token("eos")),
        between=(),
    ),
}
TEMPLATES: Mapping[str, ChatTemplate] = MappingProxyType(_TEMPLATES)


@dataclass(frozen=True)
class Span:
    """Consecutive ids of a row; ``target``: they carry loss."""

    ids: tuple[int, ...]
    target: bool


def chat_template(name: str) -> ChatTemplate:
    """The template with this name.  Raises DataError, with the nearest known name."""
    if name not in TEMPLATES:
        raise DataError(f"data.template: no template {name!r}{suggestion(name, list(TEMPLATES))}")
    return TEMPLATES[name]


def missing_tokens(template: ChatTemplate, tokenizer: Tokenizer) -> list[str]:
    """The special tokens of a template that the tokenizer does not have."""
    parts = [part for turn in vars(template).values() for part in turn]
    names = dict.fromkeys(part.name for part in parts if isinstance(part, Token))
    return [name for name in names if name not in (*_OWN, *tokenizer.specials)]


def check_order(messages: Sequence[Message], last: RoleName | None = None, field: str = "messages") -> None:
    """Turns must be: an optional system turn, then user, assistant, user ... up to ``last``, none of them empty.

    Raises BadRecord; ``field``: what the user's record calls the turns.
    """
    turns = list(messages)
    for index, message in enumerate(turns):
        if not message.content.strip():
            raise BadRecord(f"turn {index + 1} ({message.role}) is empty", field=f"{field}[{index}].content")
    first = 1 if turns and turns[0].role == "system" else 0
    if len(turns) == first:
        raise BadRecord("the dialogue has no user turn", field=field)
    for index, message in enumerate(turns[first:]):
        expected = "assistant" if index % 2 else "user"
        if message.role != expected:
            raise BadRecord(
                f"turn {first + index + 1} is from {message.role!r} where {expected!r} must speak",
                field=f"{field}[{first + index}].role",
                hint="join neighbouring turns of one speaker and begin with the user, or set data.on_bad_record=skip",
            )
    if last is not None and turns[-1].role != last:
        asked = "the dialogue ends without an answer" if last == "assistant" else "a prompt must end with a user turn"
        raise BadRecord(asked, field=field)


def render(messages: Sequence[Message], template: ChatTemplate, tokenizer: Tokenizer) -> list[Span]:
    """Spans of a dialogue in order, context and answers apart.

    Every answer with its eos is one target span; nothing else is.  A dialogue that ends with the user gives a prompt:
    the last span is context and ends exactly where the answer begins.  Raises BadRecord on empty or misordered turns.
    """
    spans: list[Span] = []
    context: list[int] = []
    for part, content, is_answer in _parts(messages, template):
        ids = _encode(part, content, tokenizer)
        if is_answer and context:
            spans.append(Span(tuple(context), False))
            context = []
        if is_answer and spans and spans[-1].target:
            spans[-1] = Span((*spans[-1].ids, *ids), True)
        elif is_answer:
            spans.append(Span(tuple(ids), True))
        else:
            context += ids
    return [*spans, Span(tuple(context), False)] if context else spans


def render_prompt(messages: Sequence[Message], template: ChatTemplate, tokenizer: Tokenizer) -> list[int]:
    """Ids of a prompt for generation: ``messages`` ends with the user, the ids end where the answer begins."""
    check_order(messages, "user")
    return [token_id for span in render(messages, template, tokenizer) for token_id in span.ids]


def _parts(messages: Sequence[Message], template: ChatTemplate) -> list[tuple[Part, str, bool]]:
    """Every part of the chat string in order: the part, the content that goes in it, whether it is an answer's."""
    check_order(messages)
    parts: list[tuple[Part, str, bool]] = [(part, "", False) for part in template.start]
    answered = False
    for message in messages:
        if message.role == "user" and answered:
            parts += [(part, "", False) for part in template.between]
        answered = message.role == "assistant"
        turn = {"system": template.system, "user": template.user, "assistant": template.assistant}[message.role]
        parts += [(part, message.content, answered) for part in turn]
    return parts


def _encode(part: Part, content: str, tokenizer: Tokenizer) -> list[int]:
    if isinstance(part, str):
        return tokenizer.encode(part.replace(CONTENT, content))
    own = dict(zip(_OWN, (tokenizer.bos_id, tokenizer.eos_id), strict=True))
    return [own[part.name] if part.name in own else tokenizer.special_id(part.name)]
