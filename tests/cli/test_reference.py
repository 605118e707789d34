"""``zj evaluate reference.load=DIR``: the KL to another model, on the answers that were judged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist

from megatron_zj.cli.inference import LoadedModel, compose_inference
from megatron_zj.cli.main import main
from megatron_zj.config.inference import EvaluationConfig
from megatron_zj.data.vocabulary import train_sentencepiece
from megatron_zj.evaluation.clinic.conditions import load_clinic
from megatron_zj.evaluation.clinic.files import read_cases
from megatron_zj.evaluation.model import Codec
from megatron_zj.runtime.distributed import Process
from tests.cli.commands import zj
from tests.cli.conftest import train_argv
from tests.helpers.ranks import run_ranks
from tests.helpers.reference_llama import ReferenceLlama

TEMPERATURE = 0.8


def _asks(world: Path, run: str, **changes: object) -> list[str]:
    values: dict[str, object] = {
        "checkpoint.load": world / "sft",
        "suites": "[clinic]",
        "data.files": f"[{world / 'data/cases.jsonl'}]",
        "run.dir": world / run,
        "sampling.max_new_tokens": 12,
        "sampling.temperature": TEMPERATURE,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    return [f"{name}={value}" for name, value in values.items()]


def _result(world: Path, run: str, suite: str = "clinic") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((world / run / f"evaluation/{suite}.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def perturbed(world: Path) -> Path:
    """The SFT model with noise on every weight, as a checkpoint; ``perturbed_hf`` holds its safetensors."""
    plain = world / "unperturbed_hf"
    assert zj(["convert", "--from", world / "sft", "--to", plain]).code == 0
    folder = world / "perturbed_hf"
    shutil.copytree(plain, folder)
    generator = torch.Generator().manual_seed(5)
    for path in folder.glob("*.safetensors"):
        weights = safetensors.torch.load_file(path)
        noisy = {name: value + 0.03 * torch.randn(value.shape, generator=generator) for name, value in weights.items()}
        safetensors.torch.save_file(noisy, path, {"format": "pt"})
    assert zj(["convert", "--from", folder, "--to", world / "perturbed"]).code == 0
    return world / "perturbed"


def _drawn(argv: list[str]) -> tuple[list[list[int]], list[list[int]], Any]:
    """Prompts and answers as ids, and the model's shape."""
    config = compose_inference(argv, EvaluationConfig)
    model = LoadedModel(config, Process(dist.get_rank(), dist.get_rank(), dist.get_world_size(), torch.device("cpu")))
    codec = Codec(model.tokenizer, model.template)
    prompts = [codec.prompt(case.messages) for case in read_cases(Path(config.data.files[0]), load_clinic())]
    return prompts, [ids for ids, _ended in model.continuations(prompts, config.sampling)], model.info.model


def _plain(folder: Path, shape: Any) -> ReferenceLlama:
    weights: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        weights |= safetensors.torch.load_file(path)
    own = {name: value for name, value in weights.items() if not name.startswith("padding.")}
    return ReferenceLlama(shape, dtype=torch.float64, state=own)


def test_a_model_is_no_way_from_itself(world: Path) -> None:
    outcome = zj(["evaluate", *_asks(world, "itself", reference__load=world / "sft")])
    assert outcome.code == 0, outcome.output
    found = _result(world, "itself")
    assert [found[key] for key in ("kl", "kl_standard_error", "k3", "k3_standard_error")] == [0.0] * 4
    assert found["tokens_an_answer"] > 1
    assert found["reference"].startswith(str(world / "sft"))


def test_it_equals_plain_torch_on_the_same_answers_and_is_the_same_on_every_layout(
    world: Path, perturbed: Path
) -> None:
    argv = _asks(world, "moved", reference__load=perturbed)
    assert zj(["evaluate", *argv]).code == 0
    assert zj(["evaluate", *_asks(world, "without")]).code == 0
    found, without = _result(world, "moved"), _result(world, "without")
    assert {name: found[name] for name in without} == without  # the answers are those that are judged anyway
    prompts, answers, shape = run_ranks(1, _drawn, argv)[0]
    model, reference = (_plain(world / name, shape) for name in ("unperturbed_hf", "perturbed_hf"))
    k1, k3 = [], []
    with torch.no_grad():
        for prompt, answer in zip(prompts, answers, strict=True):
            row = torch.tensor([*prompt, *answer])
            both = [one.logprobs(row, TEMPERATURE)[len(prompt) :] for one in (model, reference)]
            k1.append(float((both[0] - both[1]).sum()))
            ratios = (both[1] - both[0]).exp()
            k3.append(float((ratios - 1 - ratios.log()).sum()))
    mean = sum(k1) / len(k1)
    assert abs(mean) > 0.05
    assert found["kl"] == pytest.approx(mean, rel=2e-5)
    assert found["k3"] == pytest.approx(sum(k3) / len(k3), rel=2e-5)
    spread = sum((value - mean) ** 2 for value in k1) / (len(k1) - 1)
    assert found["kl_standard_error"] == pytest.approx((spread / len(k1)) ** 0.5, rel=2e-5)
    for run, layout in (("tp2", {"parallel__tp": 2}), ("dp2", {}), ("pp2", {"parallel__pp": 2})):
        two = zj(["evaluate", *_asks(world, run, reference__load=perturbed, **layout)], ranks=2)
        assert two.codes == (0, 0), two.output
        other = _result(world, run)
        assert [one["answer"] for one in other["answers"]] == [one["answer"] for one in found["answers"]]
        for key in ("kl", "kl_standard_error", "k3", "k3_standard_error"):
            assert other[key] == pytest.approx(found[key], rel=2e-5), (run, key)


def test_every_suite_of_answers_has_it_and_others_have_not(world: Path) -> None:
    files = {"dialogue": "sft_validation.jsonl", "safety": "safety.jsonl", "exam": "exam.csv"}
    lists = {
        "suites": f"[{','.join(files)}]",
        "data__files": f"[{','.join(str(world / 'data' / file) for file in files.values())}]",
    }
    argv = _asks(world, "several", reference__load=world / "pretrain", limit=2, **lists)
    outcome = zj(["evaluate", *argv])
    assert outcome.code == 0, outcome.output
    assert {suite: "kl" in _result(world, "several", suite) for suite in files} == {
        "dialogue": True,
        "safety": True,
        "exam": False,
    }


def test_a_reference_that_cannot_be_compared_with_is_refused(world: Path) -> None:
    lines = (world / "data/tokenizer.txt").read_text(encoding="utf-8").splitlines()
    train_sentencepiece(lines, vocab_size=1290, special_tokens=("<human>", "<bot>")).save(world / "other_tokenizer")
    one_step = {"run__num_steps": 1}
    for run, change in (
        ("wider", {"model__vocab_size": 1310}),
        ("foreign", {"tokenizer__path": world / "other_tokenizer"}),
    ):
        outcome = zj(train_argv("sft", world, run, **one_step, checkpoint__load="null", **change))
        assert outcome.code == 0, outcome.output
    for reference, complaint in {
        "nowhere": "reference.load: ",
        "reward": "is a reward model and gives no log-probabilities; load a language model, or set reference.role",
        "wider": "has another tokenizer or vocabulary (1310 ids) than",
        "foreign": "has another tokenizer or vocabulary (1300 ids) than",
    }.items():
        outcome = zj(["evaluate", *_asks(world, "refused", reference__load=world / reference)])
        assert outcome.code == 1
        assert complaint in outcome.error
        assert str(world / reference) in outcome.error
    outcome = zj(["evaluate", *_asks(world, "refused", reference__load=world / "sft", reference__role="critic")])
    assert "reference.role: " in outcome.error
    assert not (world / "refused/evaluation").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["suites=[clinic]", "sampling.temperature=0"], "reference: KL is estimated from draws of the model itself"),
        (["suites=[clinic]", "sampling.top_k=5"], "reference: KL is estimated from draws of the model itself"),
        (["suites=[clinic]", "sampling.top_p=0.9"], "reference: KL is estimated from draws of the model itself"),
        (["suites=[clinic]", "sampling.repetition_penalty=1.1"], "reference: KL is estimated from draws"),
        (["suites=[clinic]", "sampling.min_new_tokens=2"], "reference: KL is estimated from draws"),
        (["suites=[exam]"], "reference: only clinic, safety, dialogue, ner use it; leave it out"),
    ],
)
def test_answers_that_are_not_the_models_own_draws_give_no_kl(
    tmp_path: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.csv"
    file.touch()
    assert main(["evaluate", "checkpoint.load=x", "reference.load=y", f"data.files=[{file}]", *words]) == 1
    assert expected in capsys.readouterr().err
