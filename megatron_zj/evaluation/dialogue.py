"""Generated answers against written ones: overlap, and win/tie/loss between two models.

Overlap is on characters without white space.  BLEU-n here has uniform weights over orders 1 .. n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_zj.data.chat import Message
from megatron_zj.evaluation.metrics import Interval, bootstrap, character_f1, corpus_bleu, rouge_l, rouge_n
from megatron_zj.evaluation.model import Codec, Generate, checked


@dataclass(frozen=True)
class DialogueResult:
    """Shares in [0, 1]; ``share_finished``: answers that ended by themselves."""

    bleu_1: float
    bleu_2: float
    bleu_4: float
    rouge_1: float
    rouge_2: float
    rouge_l: float
    character_f1: Interval
    mean_length: float  # characters
    share_finished: float
    num_items: int
    scores: list[float]  # character F1 of each answer, for a contest


@dataclass(frozen=True)
class Contest:
    """Shares of items that the first of two models wins, ties and loses; they sum to 1."""

    win: float
    tie: float
    loss: float
    num_items: int


def take_dialogues(
    dialogues: Sequence[Sequence[Message]], codec: Codec, generate: Generate
) -> tuple[DialogueResult, list[str]]:
    """Answer the last user turn of every dialogue and compare with the written answer.  Returns the answers too."""
    for index, messages in enumerate(dialogues):
        if len(messages) < 2 or messages[-1].role != "assistant":
            raise ValueError(f"dialogue {index} does not end with a written answer to compare with")
    answers = list(generate([codec.prompt(messages[:-1]) for messages in dialogues]))
    golds = [messages[-1].content for messages in dialogues]
    texts = [text for text, _finished in answers]
    return compare(texts, golds, [finished for _text, finished in answers]), texts


def compare(texts: Sequence[str], golds: Sequence[str], finished: Sequence[bool]) -> DialogueResult:
    """Overlap of each text with its gold."""
    if not texts:
        raise ValueError("no answers to compare")
    pairs = list(zip(texts, golds, strict=True))
    references = [[gold] for gold in golds]
    scores = [character_f1(text, gold) for text, gold in pairs]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return DialogueResult(
        bleu_1=corpus_bleu(texts, references, (1.0,)),
        bleu_2=corpus_bleu(texts, references, (0.5, 0.5)),
        bleu_4=corpus_bleu(texts, references),
        rouge_1=mean([rouge_n(text, gold, 1) for text, gold in pairs]),
        rouge_2=mean([rouge_n(text, gold, 2) for text, gold in pairs]),
        rouge_l=mean([rouge_l(text, gold) for text, gold in pairs]),
        character_f1=bootstrap(scores),
        mean_length=mean([float(len(text)) for text in texts]),
        share_finished=mean([float(value) for value in finished]),
        num_items=len(texts),
        scores=scores,
    )


def contest(one: Sequence[float], two: Sequence[float], margin: float = 0.0) -> Contest:
    """Compare two models' scores item by item; differences up to ``margin`` are ties."""
    first, second = checked(one, len(one), "the first model"), checked(two, len(one), "the second model")
    differences = [a - b for a, b in zip(first, second, strict=True)]
    if not differences:
        raise ValueError("no items to compare")
    wins = sum(difference > margin for difference in differences)
    losses = sum(difference < -margin for difference in differences)
    size = len(differences)
    return Contest(wins / size, (size - wins - losses) / size, losses / size, size)
