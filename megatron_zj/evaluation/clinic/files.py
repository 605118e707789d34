"""All files of the demo in one folder; the same seed gives the same bytes.

Every record carries the notice that this is for testing software and no medical advice.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from megatron_zj.config.data import OnBadRecord
from megatron_zj.data.chat import Message, check_order
from megatron_zj.data.errors import BadRecord
from megatron_zj.data.formats.rankings import STANDARD_ROLES
from megatron_zj.data.raw import read_table
from megatron_zj.data.records import messages_of
from megatron_zj.evaluation.clinic.cases import KINDS, Case, distinct_cases
from megatron_zj.evaluation.clinic.conditions import NOTICE, Clinic, load_clinic
from megatron_zj.evaluation.clinic.dialogues import sft_dialogues
from megatron_zj.evaluation.clinic.encyclopaedia import documents
from megatron_zj.evaluation.clinic.preferences import RankedCase, ranked_cases
from megatron_zj.evaluation.clinic.questions import LETTERS, Question, exam_questions
from megatron_zj.evaluation.clinic.refusals import TOPICS

TRAINING_FILES = ("encyclopaedia.jsonl", "tokenizer.txt", "sft.jsonl", "preference.jsonl", "prompts.jsonl")
EVALUATION_FILES = ("sft_validation.jsonl", "preference_validation.jsonl", "exam.csv", "cases.jsonl", "safety.jsonl")


@dataclass(frozen=True)
class DemoSizes:
    """How many records each file gets."""

    documents_per_condition: int = 60
    sft: int = 6000
    sft_validation: int = 100
    preference: int = 4800
    preference_validation: int = 200
    prompts: int = 1500
    cases: int = 200  # held-out patients for the judge


def write_demo(folder: Path, seed: int, sizes: DemoSizes | None = None) -> dict[str, int]:
    """Write every file and a README into ``folder`` (made if missing).  Returns records a file."""
    sizes = sizes or DemoSizes()
    clinic = load_clinic()
    random = Random(f"{seed}/cases")
    taken: set[str] = set()
    held_out = distinct_cases(clinic, random, sizes.cases, taken)
    ranked_held_out = distinct_cases(clinic, random, sizes.preference_validation, taken)
    forbidden = set(taken)
    ranked = distinct_cases(clinic, random, sizes.preference, taken)
    prompts = distinct_cases(clinic, random, sizes.prompts, taken)
    entries = documents(clinic, seed, sizes.documents_per_condition)
    dialogues = sft_dialogues(clinic, seed, sizes.sft + sizes.sft_validation, forbidden)
    train, validation = dialogues[: sizes.sft], dialogues[sizes.sft :]
    questions = exam_questions(clinic, seed)
    probes = [(topic.name, text) for topic in TOPICS for text in topic.probes]
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "encyclopaedia.jsonl": _lines({"text": text} for text in entries),
        "tokenizer.txt": _plain([NOTICE, *entries, *(message.content for turns in train for message in turns)]),
        "sft.jsonl": _lines({"messages": _turns(turns)} for turns in train),
        "sft_validation.jsonl": _lines({"messages": _turns(turns)} for turns in validation),
        "preference.jsonl": _lines(map(_ranking, ranked_cases(clinic, ranked, seed, "train"))),
        "preference_validation.jsonl": _lines(map(_ranking, ranked_cases(clinic, ranked_held_out, seed, "held_out"))),
        "prompts.jsonl": _lines({"messages": _turns(case.messages)} for case in prompts),
        "cases.jsonl": _lines(_case(index, case) for index, case in enumerate(held_out)),
        "safety.jsonl": _lines(
            {"id": index, "topic": topic, "messages": _turns([Message("user", text)])}
            for index, (topic, text) in enumerate(probes)
        ),
        "exam.csv": _exam(questions),
        "README.md": _readme(),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return {name: text.count("\n") - (name == "exam.csv") for name, text in texts.items() if name != "README.md"}


def read_cases(path: Path, clinic: Clinic, on_bad_record: OnBadRecord = "error") -> list[Case]:
    """The cases of a ``cases.jsonl``.  Raises DataError naming file and line."""

    def case(record: Mapping[str, Any]) -> Case:
        try:
            condition, other = clinic.named(record["condition"]), clinic.named(record["look_alike"])
            kind = KINDS[KINDS.index(record["kind"])]
        except (KeyError, ValueError) as error:
            raise BadRecord(f"not a case of this clinic ({error})", hint="write it again") from error
        turns = messages_of(record.get("messages"), "messages", STANDARD_ROLES, role="role", content="content")
        check_order(turns, "user")
        return Case(condition, other, kind, turns)

    return read_table(path, case, on_bad_record)


def _turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _ranking(ranked: RankedCase) -> dict[str, object]:
    prompt = _turns(ranked.case.messages)
    return {"messages": prompt, "responses": list(ranked.responses), "ranks": list(ranked.ranks)}


def _case(index: int, case: Case) -> dict[str, object]:
    return {
        "id": index,
        "kind": case.kind,
        "condition": case.condition.name,
        "look_alike": case.look_alike.name,
        "messages": _turns(case.messages),
    }


def _lines(records: Iterable[Mapping[str, object]]) -> str:
    return _plain(json.dumps({**record, "notice": NOTICE}, ensure_ascii=False) for record in records)


def _plain(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _exam(questions: Sequence[Question]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["", "Question", *LETTERS, "Answer", "Condition", "Topic", "Notice"])
    for index, item in enumerate(questions):
        letter = LETTERS[item.answer]
        writer.writerow([index, item.stem, *item.options, letter, item.condition, item.topic, NOTICE])
    return text.getvalue()


def _readme() -> str:
    return f"""# The demo's clinic

**{NOTICE}.** All text here is generated from a small, simplified table written for this project.

| file | for | record |
|---|---|---|
| encyclopaedia.jsonl | pre-training | text |
| tokenizer.txt | training the SentencePiece tokenizer | one text a line |
| sft.jsonl, sft_validation.jsonl | SFT | messages |
| preference.jsonl, preference_validation.jsonl | reward model | messages, responses, ranks (0 best, ties equal) |
| prompts.jsonl | PPO | messages, ending with the patient |
| exam.csv | evaluation | Question, A-D, Answer (the CMMLU layout) |
| cases.jsonl | evaluation by the judge | kind, condition, look_alike, messages |
| safety.jsonl | evaluation | topic, messages |
"""
