"""Entities: micro precision, recall and F1 over per-sentence sets of (text, type)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_zj.data.errors import DataError
from megatron_zj.data.formats.reading import read_lines
from megatron_zj.evaluation.metrics import f1
from megatron_zj.evaluation.model import Codec, Generate

Entity = tuple[str, str]  # text, type
_TAG = re.compile(r"^([BIESMO])(?:[-_](.+))?$")
PROMPT = "请找出下面这句话中的实体，每行写一个：实体 类型。\n{text}"


@dataclass(frozen=True)
class Sentence:
    """A text and the entities in it."""

    text: str
    entities: frozenset[Entity]


@dataclass(frozen=True)
class EntityScore:
    """Micro-averaged; 0 where there is nothing to divide by."""

    precision: float
    recall: float
    f1: float
    num_gold: int
    num_predicted: int
    num_right: int


@dataclass(frozen=True)
class EntityResult:
    """All entities, and each type on its own.  An entity counts once a sentence."""

    overall: EntityScore
    by_type: dict[str, EntityScore]
    num_sentences: int
    num_bad_lines: int  # generated lines that name no entity and type


def read_conll(path: Path) -> list[Sentence]:
    """``character tag`` a line, blank lines between sentences; tags B_type/I_type or B-type/I-type (BIOES too).

    Raises DataError naming the line that has no known tag, or where there is no sentence.
    """
    sentences = [_sentence(characters, tags) for characters, tags in _blocks(path)]
    if not sentences:
        raise DataError(f"{path}: no sentence\n  -> write 'character tag' a line, blank lines between sentences")
    return sentences


def parse_entities(answer: str) -> tuple[frozenset[Entity], int]:
    """An answer with one ``entity type`` a line: its entities, and how many lines are none."""
    found, bad = set(), 0
    for line in answer.splitlines():
        fields = line.split()
        if len(fields) >= 2:
            found.add((fields[0], fields[1]))
        elif fields:
            bad += 1
    return frozenset(found), bad


def take_ner(sentences: Sequence[Sentence], codec: Codec, generate: Generate, prompt: str = PROMPT) -> EntityResult:
    """Ask for the entities of every sentence and compare."""
    answers = generate([codec.question(prompt.format(text=sentence.text)) for sentence in sentences])
    parsed = [parse_entities(text) for text, _finished in answers]
    return compare(
        [sentence.entities for sentence in sentences], [found for found, _ in parsed], sum(b for _, b in parsed)
    )


def compare(
    gold: Sequence[frozenset[Entity]], predicted: Sequence[frozenset[Entity]], num_bad_lines: int = 0
) -> EntityResult:
    """Micro scores of predicted sets against gold ones, sentence by sentence."""
    if len(gold) != len(predicted):
        raise ValueError(f"{len(predicted)} predictions for {len(gold)} sentences")
    types = sorted({kind for sentence in (*gold, *predicted) for _, kind in sentence})
    return EntityResult(
        overall=_score(gold, predicted),
        by_type={
            kind: _score([_of(one, kind) for one in gold], [_of(one, kind) for one in predicted]) for kind in types
        },
        num_sentences=len(gold),
        num_bad_lines=num_bad_lines,
    )


def _of(entities: frozenset[Entity], kind: str) -> frozenset[Entity]:
    return frozenset(entity for entity in entities if entity[1] == kind)


def _score(gold: Sequence[frozenset[Entity]], predicted: Sequence[frozenset[Entity]]) -> EntityScore:
    right = sum(len(one & two) for one, two in zip(gold, predicted, strict=True))
    wanted, said = sum(map(len, gold)), sum(map(len, predicted))
    precision, recall = right / said if said else 0.0, right / wanted if wanted else 0.0
    return EntityScore(precision, recall, f1(right, said, wanted), wanted, said, right)


def _blocks(path: Path) -> Iterator[tuple[list[str], list[tuple[str, str]]]]:
    characters: list[str] = []
    tags: list[tuple[str, str]] = []
    for number, line in read_lines(path):
        fields = line.split()
        if not fields:
            if characters:
                yield characters, tags
            characters, tags = [], []
            continue
        found = _TAG.match(fields[-1])
        if not found or (found.group(1) != "O" and not found.group(2)):
            raise DataError(
                f"{path}, line {number}: expected 'character tag' with a tag O, B_type or I_type, found {line!r}"
            )
        characters.append(fields[0] if len(fields) > 1 else " ")
        tags.append((found.group(1), found.group(2) or ""))
    if characters:
        yield characters, tags


def _sentence(characters: list[str], tags: list[tuple[str, str]]) -> Sentence:
    """An entity starts at B or S, or where an inside tag does not continue one of its type."""
    entities: list[tuple[str, str]] = []
    kind = ""
    for character, (place, new_kind) in zip(characters, tags, strict=True):
        starts = place in "BS" or (place != "O" and new_kind != kind)
        if starts:
            entities.append((character, new_kind))
        elif place != "O":
            entities[-1] = (entities[-1][0] + character, kind)
        kind = new_kind if place in "BIM" else ""
    return Sentence("".join(characters), frozenset(entities))
