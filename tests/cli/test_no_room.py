"""What a model cannot be asked: items longer than its positions, a template whose tokens it does not know."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_zj.cli import evaluate
from megatron_zj.cli.inference import compose_inference
from megatron_zj.config.inference import EvaluationConfig
from megatron_zj.data.vocabulary import train_sentencepiece
from tests.cli.commands import zj
from tests.cli.test_answers import asks


def test_an_item_without_room_is_told_with_its_place_or_left_out(world: Path) -> None:
    exam, safety = world / "long.csv", world / "long.jsonl"
    exam.write_text(f"Question,A,B,Answer\n咳嗽,休息,就医,B\n{'头痛' * 600},休息,就医,A\n", encoding="utf-8")
    probes = [json.dumps({"instruct": text}, ensure_ascii=False) for text in ("头痛" * 600, "咳嗽")]
    safety.write_text("\n".join(probes), encoding="utf-8")
    outcome = zj(["evaluate", *asks(world, "long", suites="[exam]", data__files=f"[{exam}]")])
    assert outcome.code == 1
    assert f"error: {exam}, item 2: a row of " in outcome.error
    assert "tokens (':头痛头痛头痛" in outcome.error
    assert "is longer than the model's 512 positions; shorten it, or leave it out" in outcome.error
    outcome = zj(["evaluate", *asks(world, "long", suites="[safety]", data__files=f"[{safety}]")])
    assert outcome.code == 1
    assert f"error: {safety}, item 1: the prompt (':头痛头痛" in outcome.error
    both = {"suites": "[exam,safety]", "data__files": f"[{exam},{safety}]", "data__on_bad_record": "skip"}
    outcome = zj(["evaluate", *asks(world, "long", **both)], ranks=2)
    assert outcome.code == 0, outcome.output
    assert f"exam: left out 1 items, such as: {exam}, item 2: a row of " in outcome.output
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (world / "long").rglob("*.json")}
    assert (found["exam"]["num_items"], found["safety"]["num_probes"]) == (1, 1)


def test_a_template_that_the_tokenizer_has_no_tokens_for_is_told_with_one_that_fits(world: Path) -> None:
    plain = world / "no_human_hf"
    assert zj(["convert", "--from", world / "sft", "--to", plain]).code == 0
    for path in plain.glob("*token*"):
        path.unlink()
    lines = (world / "data/tokenizer.txt").read_text(encoding="utf-8").splitlines()
    train_sentencepiece(lines, vocab_size=1290).save(plain)
    assert zj(["convert", "--from", plain, "--to", world / "no_human"]).code == 0
    source = {"checkpoint__load": world / "no_human"}
    outcome = zj(["generate", *asks(world, "no_human_answers", **source)])
    assert outcome.code == 1
    assert "data.template: ziya needs the special token '<human>', which the tokenizer of" in outcome.error
    assert "set data.template=chimed_gpt, or import the model with zj convert --special-tokens" in outcome.error
    assert zj(["generate", *asks(world, "no_human_answers", data__template="chimed_gpt", **source)]).code == 0


def test_a_folder_of_exams_stands_for_its_files(tmp_path: Path) -> None:
    exams, cases = tmp_path / "exams", tmp_path / "cases.jsonl"
    exams.mkdir()
    for path in (exams / "b.csv", exams / "a.csv", exams / "notes.md", cases):
        path.touch()
    config = compose_inference(
        ["checkpoint.load=x", "suites=[exam,clinic]", f"data.files=[{exams},{cases}]"], EvaluationConfig
    )
    assert evaluate.plan_suites(config) == {"exam": [exams / "a.csv", exams / "b.csv"], "clinic": [cases]}
