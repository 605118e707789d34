"""generate, chat, evaluate and convert on a small trained checkpoint, as commands."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM

from megatron_zj.checkpoint.load import newest
from megatron_zj.cli import chat, evaluate, generate
from megatron_zj.cli.inference import LoadedModel, compose_inference
from megatron_zj.cli.main import main
from megatron_zj.config.inference import GenerationConfig
from megatron_zj.data.chat import Message, render_prompt
from megatron_zj.data.tokenizer import load_tokenizer
from megatron_zj.data.vocabulary import train_sentencepiece
from megatron_zj.evaluation.attitudes import CAMI_SUBSCALES
from megatron_zj.runtime.distributed import Process
from tests.cli.commands import zj
from tests.cli.conftest import train_argv
from tests.helpers.ranks import RankFailure, run_ranks

QUESTIONS = ("头痛三天怎么办？", "孩子发热要不要去医院？", "咳嗽", "最近总是睡不好，心慌，还出汗，是什么原因？")


def asks(world: Path, run: str, **changes: object) -> list[str]:
    values: dict[str, object] = {
        "checkpoint.load": world / "sft",
        "data.files": f"[{world / 'data/prompts.jsonl'}]",
        "run.dir": world / run,
        "sampling.max_new_tokens": 6,
        "limit": 4,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    return [f"{name}={value}" for name, value in values.items()]


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_generate_writes_an_answer_a_prompt_the_same_on_every_layout(world: Path) -> None:
    assert zj(["generate", *asks(world, "one")]).code == 0
    two = zj(["generate", *asks(world, "two", parallel__tp=2)], ranks=2)
    assert two.codes == (0, 0), two.output
    answers = _read(world / "one/answers.jsonl")
    prompts = [record["messages"][-1]["content"] for record in _read(world / "data/prompts.jsonl")][:4]
    assert [answer["prompt"] for answer in answers] == prompts
    assert all(answer["answer"] and not answer["finished"] for answer in answers)
    assert _read(world / "two/answers.jsonl") == answers  # sampled, yet the same: a seed a sample


def test_generate_refuses_a_reward_model_and_a_prompt_without_room(world: Path) -> None:
    outcome = zj(["generate", *asks(world, "refused", checkpoint__load=world / "reward")])
    assert outcome.code == 1
    assert "is a reward model and gives no answers; load a language model" in outcome.error
    long = world / "long.jsonl"
    long.write_text("\n".join(json.dumps({"prompt": text}) for text in ("咳嗽", "头痛" * 600)), encoding="utf-8")
    outcome = zj(["generate", *asks(world, "refused", data__files=f"[{long}]")])
    assert outcome.code == 1
    assert f"{long}:2: the prompt ('" in outcome.error
    assert "more than the model's 512 positions; shorten the prompt or lower sampling.max_new_tokens" in outcome.error
    assert not (world / "refused/answers.jsonl").exists()
    outcome = zj(["generate", *asks(world, "kept", data__files=f"[{long}]", data__on_bad_record="skip")])
    assert outcome.code == 0, outcome.output
    assert f"left out 1 prompts, such as: {long}:2: the prompt ('" in outcome.output
    kept = (world / "kept/answers.jsonl").read_bytes()
    assert [answer["prompt"] for answer in _read(world / "kept/answers.jsonl")] == ["咳嗽"]
    outcome = zj(["generate", *asks(world, "kept")])
    assert outcome.code == 0, outcome.output
    assert f"the earlier answers are now in {world / 'kept/answers.1.jsonl'}" in outcome.output
    assert (world / "kept/answers.1.jsonl").read_bytes() == kept
    assert len(_read(world / "kept/answers.jsonl")) > 1


def test_chat_answers_starts_over_and_survives_a_question_that_is_too_long(world: Path) -> None:
    argv = ["chat", f"checkpoint.load={world / 'sft'}", "sampling.max_new_tokens=4", "sampling.temperature=0"]
    outcome = zj(argv, typed=f"头痛怎么办？\n\n/new\n{'头痛' * 600}\n头痛怎么办？\n/quit\n没有人看\n")
    assert outcome.code == 0, outcome.output
    assert "not medical advice" in outcome.output
    said = [line for line in outcome.output.split("> ")[1:] if line.strip()]
    assert len(said) == 3
    assert said[0].splitlines()[0] == said[2].splitlines()[0]  # the same question after /new: the same answer
    assert "(not sent: that is " in said[1]
    assert "没有人看" not in outcome.output
    outcome = zj(["chat", f"checkpoint.load={world / 'sft'}", "sampling.max_new_tokens=600"], typed="头痛\n")
    assert outcome.code == 1
    assert "sampling.max_new_tokens: 600 of the model's 512 positions leave no room for a question" in outcome.error


def test_evaluate_runs_every_suite_and_writes_its_result(world: Path) -> None:
    ner = world / "ner.txt"
    ner.write_text("头 B_body\n痛 I_body\n。 O\n\n发 B_sym\n热 I_sym\n", encoding="utf-8")
    files = {
        "exam": world / "data/exam.csv",
        "clinic": world / "data/cases.jsonl",
        "safety": world / "data/safety.jsonl",
        "dialogue": world / "data/sft_validation.jsonl",
        "ner": ner,
        "cami": _scale(world, "cami", 40),
        "mica": _scale(world, "mica", 16),
    }
    lists = {"suites": f"[{','.join(files)}]", "data__files": f"[{','.join(map(str, files.values()))}]"}
    outcome = zj(["evaluate", *asks(world, "suites", **lists)])
    assert outcome.code == 0, outcome.output
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (world / "suites").rglob("*.json")}
    assert set(found) == set(files)
    assert all(result["step"] == 1 and result["checkpoint"].startswith(str(world / "sft")) for result in found.values())
    assert 0 <= found["exam"]["micro"] <= 1
    assert found["exam"]["num_items"] == found["clinic"]["num_cases"] == found["safety"]["num_probes"] == 4
    assert len(found["cami"]["letters"]) == 40
    assert all(10 <= found["cami"][subscale] <= 50 for subscale in CAMI_SUBSCALES)
    assert 16 <= found["mica"]["total"] <= 96
    ranked = {"checkpoint__load": world / "reward", "data__files": f"[{world / 'data/preference_validation.jsonl'}]"}
    two = zj(["evaluate", *asks(world, "ranked", suites="[preference]", **ranked)], ranks=2)
    assert two.codes == (0, 0), two.output
    result = json.loads((world / "ranked/evaluation/preference.json").read_text(encoding="utf-8"))
    assert 0 <= result["pair_accuracy"] <= 1
    assert result["num_pairs"] > 0


def _scale(world: Path, name: str, num_items: int) -> Path:
    path = world / f"{name}.txt"
    path.write_text("".join(f"这是第{number}句话。\n" for number in range(num_items)), encoding="utf-8")
    return path


def test_two_models_are_compared_item_by_item(world: Path) -> None:
    files = {"clinic": world / "data/cases.jsonl", "dialogue": world / "data/sft_validation.jsonl"}
    lists = {"suites": f"[{','.join(files)}]", "data__files": f"[{','.join(map(str, files.values()))}]"}
    assert zj(["evaluate", *asks(world, "theirs", untrained="true", **lists)]).code == 0
    for run, expected in (("same", (0.0, 1.0, 0.0)), ("better", (1.0, 0.0, 0.0))):
        against = world / "theirs"
        if run == "better":  # than a model that scores below every possible answer
            against = _lowered(against, world / "lowered", list(files))
        argv = asks(world, run, untrained="true", against=against, **lists)
        outcome = zj(["evaluate", *argv])
        assert outcome.code == 0, outcome.output
        for suite in files:
            result = json.loads((world / run / f"evaluation/{suite}.json").read_text(encoding="utf-8"))
            assert (result["win"], result["tie"], result["loss"]) == expected
    outcome = zj(["evaluate", *asks(world, "fewer", **{**lists, "against": world / "theirs", "limit": 3})])
    assert "has 4 items and this evaluation 3" in outcome.error
    outcome = zj(["evaluate", *asks(world, "blunt", **{**lists, "suites": "[exam,clinic]", "against": world / "gone"})])
    assert "against: the suite exam has no scores by item; clinic, dialogue have" in outcome.error
    assert f"against: {world / 'gone/evaluation/clinic.json'} does not exist" in outcome.error


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"answers": [', "Expecting value: line 1 column 14"),
        ('{"scores": [1]}', "no 'answers'"),
        ('{"answers": [{"score": "high"}]}', "could not convert string to float: 'high'"),
        ('{"answers": [1]}', "not subscriptable"),
        ("[]", "list indices must be"),
        ("\udcff", "can't decode byte 0xff"),
    ],
)
def test_results_to_compare_with_are_read_before_anything_is_asked(
    tmp_path: Path, content: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, cases = tmp_path / "theirs/evaluation/clinic.json", tmp_path / "cases.jsonl"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(content.encode("utf-8", "surrogateescape"))
    cases.touch()
    argv = ["checkpoint.load=x", f"data.files=[{cases}]", "suites=[clinic]", f"against={tmp_path / 'theirs'}"]
    assert main(["evaluate", *argv]) == 1
    shown = capsys.readouterr().err
    assert f"error: against: {theirs} is no result of the suite clinic (" in shown
    assert complaint in shown
    assert "); evaluate that model again" in shown


def _lowered(source: Path, target: Path, suites: list[str]) -> Path:
    (target / "evaluation").mkdir(parents=True)
    for suite in suites:
        result = json.loads((source / f"evaluation/{suite}.json").read_text(encoding="utf-8"))
        result["scores"] = [-1.0] * 4
        result["answers"] = [{"score": -1.0}] * 4
        (target / f"evaluation/{suite}.json").write_text(json.dumps(result), encoding="utf-8")
    return target


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["suites=[mica]", "limit=3"], "limit: only exam, clinic, safety, dialogue, preference, ner use it"),
        (["suites=[ner]", "data.on_bad_record=skip"], "data.on_bad_record: only exam, clinic, safety, dialogue, pref"),
        (["suites=[exam]", "data.format=alpaca"], "data.format: only preference, dialogue use it; leave it out"),
        (["suites=[clinic]", "margin=0.1"], "margin: only a comparison uses it; give against=OTHER_RUN_DIR"),
        (["suites=[clinic]", "margin=-1"], "margin: must be >= 0, got -1.0"),
        (["suites=[clinic]", "limit=-1"], "limit: must be >= 0, got -1"),
        (["suites=[clinic]", "tokenizer.special_tokens=[x]"], "tokenizer.special_tokens: has no effect without"),
    ],
)
def test_a_setting_that_no_suite_looks_at_is_refused(
    tmp_path: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.csv"
    file.touch()
    assert main(["evaluate", "checkpoint.load=x", f"data.files=[{file}]", *words]) == 1
    assert expected in capsys.readouterr().err


def test_a_checkpoint_without_a_tokenizer_takes_the_one_that_is_named_and_only_the_right_one(world: Path) -> None:
    plain, bare = world / "plain_hf", world / "bare"
    assert zj(["convert", "--from", world / "sft", "--to", plain]).code == 0
    for path in plain.glob("*token*"):
        path.unlink()
    assert zj(["convert", "--from", plain, "--to", bare]).code == 0
    found, own = newest(bare), newest(world / "sft")
    assert found is not None
    assert own is not None
    outcome = zj(["generate", *asks(world, "bare_answers", checkpoint__load=bare)])
    assert outcome.code == 1
    assert f"tokenizer.path: {found} holds no tokenizer; name the one its model was trained with" in outcome.error
    named = {"checkpoint__load": bare, "tokenizer__path": own / "tokenizer"}
    assert zj(["generate", *asks(world, "bare_answers", **named)]).code == 0
    assert zj(["generate", *asks(world, "own_answers")]).code == 0
    assert _read(world / "bare_answers/answers.jsonl") == _read(world / "own_answers/answers.jsonl")
    lines = (world / "data/tokenizer.txt").read_text(encoding="utf-8").splitlines()
    for size, complaint in ((1290, "was trained with another tokenizer"), (1310, "has 1310 ids, and the model of")):
        train_sentencepiece(lines, vocab_size=size, special_tokens=("<human>", "<bot>")).save(world / f"of_{size}")
        other = zj(["generate", *asks(world, "other", tokenizer__path=world / f"of_{size}")])
        assert other.code == 1
        assert complaint in other.error


def test_a_folder_stands_for_its_files_and_a_bad_record_is_left_out_and_told(world: Path) -> None:
    folder = world / "questions"
    folder.mkdir()
    (folder / "notes.md").write_text("not read")
    for name, text in (("b.jsonl", "二"), ("a.jsonl", "一")):
        lines = [json.dumps({"prompt": f"{text}{n}。"}, ensure_ascii=False) for n in range(2)]
        (folder / name).write_text("\n".join([*lines, '{"prompt": "\\ud83d"}']) + "\n", encoding="utf-8")
    files = f"[{folder}]"
    outcome = zj(["generate", *asks(world, "stopped", data__files=files)])
    assert f"{folder}/a.jsonl, record at line 3, field 'prompt': half of a character" in outcome.error
    outcome = zj(["generate", *asks(world, "of_folder", data__files=files, data__on_bad_record="skip")])
    assert outcome.code == 0, outcome.output
    assert [answer["prompt"] for answer in _read(world / "of_folder/answers.jsonl")] == [
        "一0。",
        "一1。",
        "二0。",
        "二1。",
    ]
    assert f"left out 1 bad records of {folder}/a.jsonl, such as: {folder}/a.jsonl, record at line 3" in outcome.output


def test_evaluate_says_which_model_a_suite_needs_and_what_is_wrong_with_a_file(world: Path) -> None:
    ranked = {"suites": "[preference]", "data__files": f"[{world / 'data/preference_validation.jsonl'}]"}
    outcome = zj(["evaluate", *asks(world, "wrong", **ranked)])
    assert "is a language model and gives no scores; load a reward model" in outcome.error
    outcome = zj(["evaluate", *asks(world, "wrong", suites="[exam]", data__files=f"[{world / 'data/sft.jsonl'}]")])
    assert (
        f"{world / 'data/sft.jsonl'}, record at line 1: no exam: columns Question and Answer are needed"
        in outcome.error
    )


def _continuations(overrides: list[str]) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and greedy answers, as ids."""
    config = compose_inference(overrides, GenerationConfig)
    rank, size = dist.get_rank(), dist.get_world_size()
    model = LoadedModel(config, Process(rank, rank, size, torch.device("cpu")))
    prompts = [render_prompt([Message("user", text)], model.template, model.tokenizer) for text in QUESTIONS]
    found = model.continuations(prompts, dataclasses.replace(config.sampling, temperature=0.0))
    return prompts, [ids for ids, _ended in found]


def _texts(overrides: list[str]) -> list[tuple[str, bool]]:
    """Answers and whether they ended by themselves."""
    config = compose_inference(overrides, GenerationConfig)
    rank, size = dist.get_rank(), dist.get_world_size()
    model = LoadedModel(config, Process(rank, rank, size, torch.device("cpu")))
    prompts = [render_prompt([Message("user", text)], model.template, model.tokenizer) for text in QUESTIONS]
    return model.answers(prompts, config.sampling)


def test_a_stop_string_ends_an_answer_and_stays_in_it_on_every_layout(world: Path) -> None:
    argv = [f"checkpoint.load={world / 'sft'}", "sampling.max_new_tokens=24", "run.seed=3"]
    whole = run_ranks(1, _texts, argv)[0]
    text = max((text for text, _ended in whole), key=len)
    stop = text[len(text) // 2]
    argv.append(f"sampling.stop_strings=['{stop}']")
    found = run_ranks(1, _texts, argv)[0]
    assert run_ranks(2, _texts, [*argv, "parallel.tp=2"])[0] == found
    for (short, ended), (full, _) in zip(found, whole, strict=True):
        assert full.startswith(short)
        assert (stop in full) == (stop in short)
        assert ended or stop not in short
    assert any(short != full for (short, _), (full, _) in zip(found, whole, strict=True))


def test_a_stop_token_ends_an_answer_on_every_layout_and_a_wrong_one_is_refused(world: Path) -> None:
    argv = [f"checkpoint.load={world / 'sft'}", "sampling.max_new_tokens=24", "run.seed=3"]
    whole = run_ranks(1, _continuations, argv)[0][1]
    tokenizer = load_tokenizer(world / "tokenizer")
    stop = next(one for one in max(whole, key=len)[3:] if tokenizer.piece(one).isalnum())
    named = [*argv, f"sampling.stop_tokens=['{tokenizer.piece(stop)}']"]
    short = [row[: row.index(stop) + 1] if stop in row else row for row in whole]
    assert short != whole
    assert run_ranks(1, _continuations, named)[0][1] == short
    assert run_ranks(2, _continuations, [*named, "parallel.tp=2"])[0][1] == short
    with pytest.raises(RankFailure, match=r"sampling\.stop_tokens: '<nobody>' is no token of the tokenizer"):
        run_ranks(1, _continuations, [*argv, "sampling.stop_tokens=['<nobody>']"])


def _greedy(folder: Path, prompt: list[int], count: int) -> list[int]:
    """Hugging Face's generate on an exported folder, one prompt."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=count)
    return [int(token) for token in ids[0, len(prompt) :]]


def test_conversion_both_ways_keeps_every_bit_and_every_greedy_token(world: Path) -> None:
    there, back = world / "hf", world / "back"
    assert zj(["convert", "--from", world / "sft", "--to", there]).code == 0
    assert zj(["convert", "--from", there, "--to", back]).code == 0
    again = zj(["convert", "--from", world / "sft", "--to", there])
    assert again.code == 1
    assert f"{there} exists already; give a new folder to --to" in again.error
    argv = ["sampling.max_new_tokens=24", f"run.dir={world / 'greedy'}"]
    prompts, ours = run_ranks(2, _continuations, [f"checkpoint.load={world / 'sft'}", "parallel.tp=2", *argv])[0]
    assert run_ranks(1, _continuations, [f"checkpoint.load={back}", *argv])[0] == (prompts, ours)
    assert [_greedy(there, prompt, 24) for prompt in prompts] == ours
    assert len({tuple(answer) for answer in ours}) > 1


@pytest.mark.slow
def test_a_sweep_of_real_runs_with_one_that_fails_gives_three_results(world: Path) -> None:
    lines = (world / "data/sft.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    record = json.loads(lines[1])
    record["messages"][1]["content"] = "头痛怎么办？" * 20
    path = world / "sweep.jsonl"
    path.write_text("\n".join([*lines, json.dumps(record, ensure_ascii=False)]) + "\n", encoding="utf-8")
    swept = {"data__files": f"[{path}]", "data__max_length": "64,384", "data__overlong": "error,truncate"}
    argv = train_argv("sft", world, "unused", run__num_steps=1, **swept)[1:]
    outcome = zj(["launch", "--multirun", "--dir", world / "sweep", *argv], timeout=200)
    assert outcome.code == 1
    states = {p.parent.name[:3]: json.loads(p.read_text())["state"] for p in (world / "sweep").glob("*/status.json")}
    assert states == {"000": "failed", "001": "done", "002": "done", "003": "done"}
    assert len(list((world / "sweep").glob("*/checkpoints/step_00000001/manifest.json"))) == 3
    assert "FAILED 000_data.max_length=64,data.overlong=error" in outcome.output
    assert f"error: {path}, record at line " in outcome.output


def test_a_key_of_training_is_refused_where_nothing_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    refused = {
        "generate": ["run.num_steps=5", "engine.recompute=full", "suites=[exam]"],
        "chat": ["run.tensorboard=true", "run.dir=x", "data.files=[x]", "limit=3"],
    }
    for command, key in ((command, key) for command, keys in refused.items() for key in keys):
        assert main([command, "checkpoint.load=x", key]) == 1
        assert f"{key.partition('=')[0]}: unknown key" in capsys.readouterr().err


@pytest.mark.parametrize("command", [evaluate, generate, chat])
def test_help_lists_every_key_with_its_default(command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "checkpoint.load=DIR" in shown
    assert "sampling.temperature=1.0" in shown
    assert ("reference.load=DIR" in shown.partition("keys and defaults:")[2]) == (command is evaluate)
    assert "reference=" not in shown
