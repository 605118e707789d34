"""``zj evaluate checkpoint.load=DIR suites=[exam] data.files=[FILE,...] run.dir=DIR``: exams, answers, rankings scored.

One suite reads all files; otherwise there is one suite a file.  Each writes ``run.dir/evaluation/<suite>.json``.
``against=OTHER_RUN_DIR`` adds how often this model wins, ties and loses, item by item (clinic, dialogue).
``reference.load=DIR`` adds the KL to that model, on the answers it gave (clinic, safety, dialogue, ner).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_zj.cli.inference import LoadedModel, OverlongError, compose_inference, help_text, wants_help
from megatron_zj.cli.main import guarded
from megatron_zj.config.inference import EvaluationConfig, Suite
from megatron_zj.config.loader import ConfigError
from megatron_zj.config.sampling import SamplingConfig
from megatron_zj.data.raw import raw_files, read_raw
from megatron_zj.evaluation.attitudes import (
    CAMI_ITEMS,
    CAMI_OPTIONS,
    MICA_ITEMS,
    MICA_OPTIONS,
    answer_scale,
    read_items,
    score_cami,
    score_mica,
)
from megatron_zj.evaluation.clinic.conditions import load_clinic
from megatron_zj.evaluation.clinic.evaluate import take_cases
from megatron_zj.evaluation.clinic.files import read_cases
from megatron_zj.evaluation.dialogue import contest, take_dialogues
from megatron_zj.evaluation.divergence import divergence
from megatron_zj.evaluation.exam import read_exam, take_exam
from megatron_zj.evaluation.model import Codec, Generate, Ids
from megatron_zj.evaluation.ner import read_conll, take_ner
from megatron_zj.evaluation.preference import grouped, rate
from megatron_zj.evaluation.safety import read_probes, take_safety
from megatron_zj.runtime.distributed import Process, session
from megatron_zj.runtime.files import write_json
from megatron_zj.runtime.log import setup

logger = logging.getLogger(__name__)
FOLDER = "evaluation"  # in run.dir
Json = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """Load the checkpoint once, run every suite."""
    if wants_help(argv):
        sys.stdout.write(help_text(__doc__, EvaluationConfig))
        return 0
    config = compose_inference(argv, EvaluationConfig)
    plan = plan_suites(config)
    with session(config.run.device, config.run.timeout_seconds) as process:
        setup(process, config.run.dir)
        evaluate(config, plan, process)
    return 0


def plan_suites(config: EvaluationConfig) -> dict[Suite, list[Path]]:
    """Which files each suite reads.  Raises ConfigError where that is not clear, or a file is missing."""
    files = config.data.files  # or folders
    problems = [f"data.files: {name} does not exist" for name in files if not Path(name).exists()]
    if not files:
        problems.append("data.files: nothing to evaluate on; give data.files=[FILE,...]")
    if not config.suites:
        problems.append("suites: none given; such as suites=[exam]")
    elif len(config.suites) not in (1, len(files)):
        problems.append(f"suites: {len(config.suites)} for {len(files)} files; give one for all, or one for each")
    problems += [*_contest_problems(config), *_ignored(config)]
    if problems:
        raise ConfigError(problems)
    suites = config.suites * len(files) if len(config.suites) == 1 else config.suites
    plan: dict[Suite, list[Path]] = {}
    for suite, name in zip(suites, files, strict=True):
        plan.setdefault(suite, []).extend(map(Path, raw_files([name])))
    return plan


def evaluate(config: EvaluationConfig, plan: dict[Suite, list[Path]], process: Process) -> dict[Suite, Json]:
    """Run the suites on one loaded model.  Collective over the world; rank 0 writes.  Returns every suite's result."""
    read = {suite: _read(config, suite, files) for suite, files in plan.items()}  # a bad file is told at once
    model = LoadedModel(config, process, untrained=config.untrained)
    reference = _load_reference(config, model, process)
    results: dict[Suite, Json] = {}
    for suite, (items, places) in read.items():
        with process.activity.doing(f"evaluate {suite}"):
            results[suite] = _ask(model, reference, config, suite, items, places)
            if config.against is not None:
                results[suite] |= _contest(config.against, suite, results[suite], config.margin)
        if process.rank == 0:
            path = config.run.dir / FOLDER / f"{suite}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"checkpoint": str(model.folder), "step": model.step, **results[suite]})
            logger.info("%s: %s  -> %s", suite, _headline(results[suite]), path)
    return results


def _ignored(config: EvaluationConfig) -> list[str]:
    """Settings that none of the suites looks at."""
    problems = []
    plain = EvaluationConfig(checkpoint=config.checkpoint)
    settings = {
        "data.format": (config.data.format != plain.data.format, ("preference", "dialogue")),
        "data.on_bad_record": (config.data.on_bad_record != plain.data.on_bad_record, _OF_RECORDS),
        "limit": (config.limit != plain.limit, (*_OF_RECORDS, "ner")),
        "reference": (config.reference is not None, tuple(ANSWERED)),
    }
    for name, (given, suites) in settings.items():
        if given and config.suites and not set(config.suites) & set(suites):
            problems.append(f"{name}: only {', '.join(suites)} use it; leave it out")
    if config.margin and config.against is None:
        problems.append("margin: only a comparison uses it; give against=OTHER_RUN_DIR, or leave it out")
    return problems


def _contest_problems(config: EvaluationConfig) -> list[str]:
    if config.against is None:
        return []
    blunt = [suite for suite in config.suites if suite not in ITEM_SCORES]
    problems = [f"against: the suite {suite} has no scores by item; {', '.join(ITEM_SCORES)} have" for suite in blunt]
    for suite in dict.fromkeys(suite for suite in config.suites if suite in ITEM_SCORES):
        try:
            _their_scores(config.against, suite)
        except ConfigError as error:
            problems += error.problems
    return problems


def _their_scores(against: Path, suite: Suite) -> list[float]:
    """Item by item, of the model whose results are in ``against``.  ConfigError where that file has none."""
    path = against / FOLDER / f"{suite}.json"
    if not path.is_file():
        raise ConfigError([f"against: {path} does not exist; evaluate that model first"])
    try:
        return [float(score) for score in ITEM_SCORES[suite](json.loads(path.read_text(encoding="utf-8")))]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        found = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(
            [f"against: {path} is no result of the suite {suite} ({found}); evaluate that model again"]
        ) from error


def _contest(against: Path, suite: Suite, result: Json, margin: float) -> Json:
    """Shares of items won, tied and lost to the model whose results are in ``against``."""
    path = against / FOLDER / f"{suite}.json"
    ours, theirs = ITEM_SCORES[suite](result), _their_scores(against, suite)
    if len(ours) != len(theirs):
        raise ConfigError(
            [
                f"against: {path} has {len(theirs)} items and this evaluation {len(ours)}; evaluate both on the same "
                "data.files with the same limit"
            ]
        )
    shares = contest(ours, theirs, margin)
    return {"win": shares.win, "tie": shares.tie, "loss": shares.loss, "against": str(path)}


def _read(config: EvaluationConfig, suite: Suite, files: Sequence[Path]) -> tuple[list[Any], list[str]]:
    """The items of a suite, at most ``limit`` of them, and where they are; a scale has no part to ask alone."""
    policy, names = config.data.on_bad_record, [str(path) for path in files]
    items: list[Any] = []
    places: list[str] = []
    if suite == "preference":
        items += read_raw(names, "preference", config.data.format, policy, places)
    elif suite == "dialogue":
        items += read_raw(names, "chat", config.data.format, policy, places)
    else:
        clinic = load_clinic()
        readers: dict[Suite, Callable[[Path], list[Any]]] = {
            "exam": lambda path: read_exam(path, policy),
            "clinic": lambda path: read_cases(path, clinic, policy),
            "safety": lambda path: read_probes(path, policy),
            "ner": read_conll,
            "cami": lambda path: read_items(path, CAMI_ITEMS),
            "mica": lambda path: read_items(path, MICA_ITEMS),
        }
        for path in files:
            found = readers[suite](path)
            items += found
            places += [f"{path}, item {number}" for number in range(1, len(found) + 1)]
    last = config.limit if config.limit and suite not in ("cami", "mica") else None
    return items[:last], places[:last]


def _exam(model: LoadedModel, items: list[Any], places: Sequence[str]) -> Json:
    return dataclasses.asdict(take_exam(items, _codec(model), partial(model.option_logprobs, places=places)))


def _preference(model: LoadedModel, ranked: list[Any], places: Sequence[str]) -> Json:
    codec = _codec(model)
    rows = [codec.dialogue([*record.prompt, *response]) for record in ranked for response in record.responses]
    groups = grouped(
        model.scores(rows, places), [record.dense_ranks() for record in ranked], [len(row) for row in rows]
    )
    return dataclasses.asdict(rate(groups))


def _cami(model: LoadedModel, items: list[Any], places: Sequence[str]) -> Json:
    letters = answer_scale(items, CAMI_OPTIONS, _codec(model), partial(model.option_logprobs, places=places))
    result = score_cami(letters)
    whole = {"num_unanswered": result.num_unanswered, "constant": result.constant, "letters": "".join(letters)}
    return {**result.subscales, **whole}


def _mica(model: LoadedModel, items: list[Any], places: Sequence[str]) -> Json:
    letters = answer_scale(items, MICA_OPTIONS, _codec(model), partial(model.option_logprobs, places=places))
    return {**dataclasses.asdict(score_mica(letters)), "letters": "".join(letters)}


def _clinic(codec: Codec, generate: Generate, cases: list[Any]) -> Json:
    return dataclasses.asdict(take_cases(load_clinic(), cases, codec, generate))


def _safety(codec: Codec, generate: Generate, probes: list[Any]) -> Json:
    result, texts = take_safety(probes, codec, generate)
    return {**dataclasses.asdict(result), "answers": texts}


def _dialogue(codec: Codec, generate: Generate, records: list[Any]) -> Json:
    result, texts = take_dialogues([record.messages for record in records], codec, generate)
    return {**dataclasses.asdict(result), "answers": texts}


def _ner(codec: Codec, generate: Generate, sentences: list[Any]) -> Json:
    return dataclasses.asdict(take_ner(sentences, codec, generate))


READ: dict[Suite, Callable[[LoadedModel, list[Any], Sequence[str]], Json]] = {  # the model reads what is written
    "exam": _exam,
    "preference": _preference,
    "cami": _cami,
    "mica": _mica,
}
ANSWERED: dict[Suite, Callable[[Codec, Generate, list[Any]], Json]] = {  # it writes answers
    "clinic": _clinic,
    "safety": _safety,
    "dialogue": _dialogue,
    "ner": _ner,
}
_ROWS: dict[Suite, Callable[[Any], int]] = {  # rows that the model reads of an item, where it is not one
    "exam": lambda item: len(item.options),
    "preference": lambda record: len(record.responses),
    "cami": lambda item: len(CAMI_OPTIONS),
    "mica": lambda item: len(MICA_OPTIONS),
}
_OF_RECORDS: tuple[Suite, ...] = ("exam", "clinic", "safety", "dialogue", "preference")
ITEM_SCORES: dict[Suite, Callable[[Json], list[float]]] = {
    "clinic": lambda result: [answer["score"] for answer in result["answers"]],
    "dialogue": lambda result: result["scores"],
}


def _codec(model: LoadedModel) -> Codec:
    return Codec(model.tokenizer, model.template)


class _Answers:
    """A model's sampled answers as text; their ids are kept, to measure the KL on these very answers."""

    def __init__(self, model: LoadedModel, sampling: SamplingConfig, places: Sequence[str]) -> None:
        self.model, self.sampling, self.places = model, sampling, places
        self.drawn: list[tuple[Ids, Ids]] = []  # prompt, answer

    def __call__(self, prompts: Sequence[Ids]) -> list[tuple[str, bool]]:
        found = self.model.continuations(prompts, self.sampling, places=self.places)
        self.drawn += [(prompt, ids) for prompt, (ids, _ended) in zip(prompts, found, strict=True)]
        return [(self.model.text(ids), ended) for ids, ended in found]

    def kl_to(self, reference: LoadedModel) -> Json:
        """Of the answers so far, at the temperature they were drawn at."""
        ours, theirs = (one.token_logprobs(self.drawn, self.sampling.temperature) for one in (self.model, reference))
        return {**dataclasses.asdict(divergence(ours, theirs)), "reference": str(reference.folder)}


def _ask(
    model: LoadedModel,
    reference: LoadedModel | None,
    config: EvaluationConfig,
    suite: Suite,
    items: list[Any],
    places: list[str],
) -> Json:
    """One suite's result.  Items without room in the model are an error, or left out as ``data.on_bad_record`` says."""
    rows = [index for index, item in enumerate(items) for _ in range(_ROWS.get(suite, lambda item: 1)(item))]
    where = [places[index] for index in rows]
    try:
        if suite in READ:
            return READ[suite](model, items, where)
        answers = _Answers(model, config.sampling, where)
        result = ANSWERED[suite](_codec(model), answers, items)
    except OverlongError as error:
        overlong = {rows[row] for row in error.rows}
        if config.data.on_bad_record == "error" or suite not in _OF_RECORDS or len(overlong) == len(items):
            raise
        logger.warning("%s: left out %d items, such as: %s", suite, len(overlong), error)
        kept = [index for index in range(len(items)) if index not in overlong]
        kept_items, kept_places = [items[index] for index in kept], [places[index] for index in kept]
        return _ask(model, reference, config, suite, kept_items, kept_places)
    return result if reference is None else result | answers.kl_to(reference)


def _load_reference(config: EvaluationConfig, model: LoadedModel, process: Process) -> LoadedModel | None:
    """The reference on the same layout.  ConfigError where it and the model do not speak of the same ids."""
    if config.reference is None:
        return None
    reference = LoadedModel(config, process, key="reference", source=config.reference)
    reference.require("lm", "log-probabilities")
    ours, theirs = model.info.model.vocab_size, reference.info.model.vocab_size
    if model.tokenizer.fingerprint() != reference.tokenizer.fingerprint() or ours != theirs:
        raise ConfigError(
            [
                f"reference.load: {reference.folder} has another tokenizer or vocabulary ({theirs} ids) than "
                f"{model.folder} ({ours} ids), so no token's probabilities compare; load the model it started from"
            ]
        )
    return reference


def _headline(result: Json) -> str:
    """The numbers at the top of a result, without its lists and tables."""
    plain = {name: value for name, value in result.items() if isinstance(value, int | float | bool)}
    return "  ".join(f"{name} {value:.4g}" for name, value in plain.items())


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
