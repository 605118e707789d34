"""Hugging Face folders and checkpoints hold the same bits, and the two implementations agree on what they mean."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from megatron_zj.checkpoint.errors import CheckpointError
from megatron_zj.checkpoint.hf import EXTRA, export_hf, import_hf
from megatron_zj.checkpoint.load import load
from megatron_zj.checkpoint.manifest import Manifest, ManifestInfo, RoleInfo, pick_role, read_manifest
from megatron_zj.checkpoint.save import Checkpointer
from megatron_zj.checkpoint.tree import fingerprint
from megatron_zj.cli import convert
from megatron_zj.cli.main import entry
from megatron_zj.config.checkpoint import CheckpointConfig
from megatron_zj.config.model import HeadKind, ModelConfig, RopeScalingConfig
from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.data.batch import Batch, Rows
from megatron_zj.data.vocabulary import train_sentencepiece
from megatron_zj.models.canonical import read_stage
from tests.engine.training import Case, make_engine
from tests.helpers.ranks import run_ranks

SMALL = ModelConfig(
    vocab_size=90,  # 38 rows of padding
    hidden_size=32,
    ffn_hidden_size=48,
    num_layers=2,
    num_attention_heads=4,
    num_query_groups=2,
    max_position_embeddings=64,
    init_std=0.2,
)
LLAMA3 = RopeScalingConfig(kind="llama3", factor=4.0, original_max_position_embeddings=16)
MODELS = {
    "gqa": SMALL,
    "tied llama3 rope": replace(SMALL, tie_embeddings=True, rope_scaling=LLAMA3, rope_theta=5e5),
    "wide heads linear rope": replace(
        SMALL, num_query_groups=None, head_dim=16, rope_scaling=RopeScalingConfig(kind="linear", factor=2.0)
    ),
}
ROW = torch.randint(0, 90, (40,), generator=torch.Generator().manual_seed(1))


def _hf_model(folder: Path, model: ModelConfig, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A random LlamaForCausalLM saved by transformers itself."""
    scaling = model.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if scaling is not None:
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
            rope |= {"original_max_position_embeddings": scaling.original_max_position_embeddings}
    config = transformers.LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_size,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tie_embeddings,
        rope_parameters=rope,
        initializer_range=0.2,
        eos_token_id=7,
    )
    torch.manual_seed(3)
    network = transformers.LlamaForCausalLM(config).to(dtype).eval()
    network.save_pretrained(folder, **options)
    return network


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("model*.safetensors"):
        found |= safetensors.torch.load_file(path)
    return found


def _same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(fingerprint(first[k]) == fingerprint(second[k]) for k in first)


@torch.no_grad()
def _hf_logprobs(network: Any) -> torch.Tensor:
    logits = network(ROW[None]).logits[0].double()
    return torch.log_softmax(logits, -1)[:-1].gather(1, ROW[1:, None])[:, 0]


def _our_logprobs(checkpoints: dict[str, Path]) -> dict[str, list[float]]:
    found = {}
    for name, path in checkpoints.items():
        engine = make_engine(Case(ParallelConfig(tp=2), model=read_manifest(path).roles["model"].model), optim=None)
        load(path, {"model": engine}, weights_only=True)
        answer = engine.infer(("logprobs",), Batch(Rows.of([ROW])))
        assert answer is not None
        rows = answer["logprobs"]
        assert isinstance(rows, Rows)
        found[name] = rows.values[1:].tolist()
    return found


def test_hugging_face_to_checkpoint_to_hugging_face_is_the_same_function_and_the_same_bits(tmp_path: Path) -> None:
    truth, checkpoints, backs = {}, {}, {}
    for index, (name, model) in enumerate(MODELS.items()):
        source, checkpoint, back = (tmp_path / f"{part}{index}" for part in ("hf", "zj", "back"))
        truth[name] = _hf_logprobs(_hf_model(source, model))
        assert convert.main(["--from", str(source), "--to", str(checkpoint)]) == 0
        assert convert.main(["--from", str(checkpoint), "--to", str(back)]) == 0
        checkpoints[name], backs[name] = checkpoint, back
        assert read_manifest(checkpoint).roles["model"].model == model, name
        assert _same(_tensors(source), _tensors(back)), name
        reloaded = transformers.LlamaForCausalLM.from_pretrained(back).eval()
        assert torch.equal(_hf_logprobs(reloaded), truth[name]), name
        assert reloaded.config.eos_token_id == 7
    for ours in run_ranks(2, _our_logprobs, checkpoints):
        for name, values in ours.items():
            assert (torch.tensor(values).double() - truth[name]).abs().max() <= 1e-5, name


def test_bf16_in_several_shards_round_trips_to_the_bit(tmp_path: Path) -> None:
    _hf_model(tmp_path / "hf", SMALL, torch.bfloat16, max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    import_hf(tmp_path / "hf", tmp_path / "zj")
    export_hf(tmp_path / "zj", tmp_path / "back", max_shard_bytes=20_000)
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 2
    assert _same(_tensors(tmp_path / "hf"), _tensors(tmp_path / "back"))
    network = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    assert network.dtype == torch.bfloat16


def _write_engine(root: Path, heads: tuple[HeadKind, ...]) -> None:
    engines = {}
    for head in heads:
        engine = make_engine(Case(ParallelConfig(pp=2), head=head, model=SMALL))
        with torch.no_grad():
            for chunk in engine.chunks:
                for name, parameter in chunk.named_parameters():
                    parameter.add_(0.01 * len(name))  # no zero biases, no unit norms
        engines[head] = engine
    Checkpointer(root, CheckpointConfig(), ManifestInfo(config={})).save(1, engines, {})


def _read_engine(path: Path, head: HeadKind, role: str) -> tuple[dict[str, str], bool]:
    engine = make_engine(Case(head=head, model=SMALL))
    load(path, {"model": engine}, roles={"model": role}, weights_only=True)
    found = read_stage(engine.chunks, engine.groups)
    padding = found["model.embed_tokens.weight"][90:]
    return {name: fingerprint(value) for name, value in found.items()}, bool(padding.any())


def _scores(path: Path, role: str) -> list[float]:
    engine = make_engine(Case(head="score", model=SMALL), optim=None)
    load(path, {"model": engine}, roles={"model": role}, weights_only=True)
    answer = engine.infer(("scores",), Batch(Rows.of([ROW, ROW[:9]])))
    assert answer is not None
    scores = answer["scores"]
    assert isinstance(scores, torch.Tensor)
    return scores.tolist()


def test_every_head_and_the_padded_rows_survive_the_way_through_hugging_face(tmp_path: Path) -> None:
    heads: tuple[HeadKind, ...] = ("lm", "value", "score")
    run_ranks(2, _write_engine, tmp_path / "run", heads)
    with pytest.raises(CheckpointError, match="no role 'actor'; choose one of lm, score, value"):
        export_hf(tmp_path / "run", tmp_path / "unsaid")
    for head in heads:
        export_hf(tmp_path / "run", tmp_path / f"hf-{head}", role=head)
        import_hf(tmp_path / f"hf-{head}", tmp_path / f"zj-{head}")
        assert read_manifest(tmp_path / f"zj-{head}").roles["model"].head == head
        (before,) = run_ranks(1, _read_engine, tmp_path / "run", head, head)
        (after,) = run_ranks(1, _read_engine, tmp_path / f"zj-{head}", head, "model")
        assert before == after, head
        assert before[1]  # the rows of padding are not zero here


def test_the_role_that_nobody_names_is_the_only_one_or_the_actor(tmp_path: Path) -> None:
    role = RoleInfo(SMALL, "lm", False, {})

    def picked(wanted: str | None, *roles: str) -> str:
        return pick_role(tmp_path, Manifest(1, dict.fromkeys(roles, role), {}, {}), wanted)

    assert picked(None, "model") == "model"
    assert picked(None, "critic", "actor") == "actor"
    assert picked("critic", "critic", "actor") == "critic"
    with pytest.raises(CheckpointError, match="no role 'actor'; choose one of critic, policy"):
        picked(None, "policy", "critic")


def test_an_exported_reward_model_scores_the_same_in_transformers(tmp_path: Path) -> None:
    run_ranks(2, _write_engine, tmp_path / "run", ("score",))
    export_hf(tmp_path / "run", tmp_path / "hf")
    network = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    bias = safetensors.torch.load_file(tmp_path / "hf" / EXTRA)["score_head.bias"]
    with torch.no_grad():
        expected = [float(network(row[None]).logits[0, 0] + bias) for row in (ROW, ROW[:9])]
    assert run_ranks(1, _scores, tmp_path / "run", "score")[0] == pytest.approx(expected, abs=1e-5)


def test_tokenizer_files_travel_unchanged_and_an_extended_vocabulary_gets_the_mean_of_its_pieces(
    tmp_path: Path,
) -> None:
    texts = ["头痛发热咳嗽，请问医生怎么办？", "建议多喝水，注意休息。", "abc abd abe"] * 20
    tokenizer = train_sentencepiece(texts, 320)
    _hf_model(tmp_path / "hf", replace(SMALL, vocab_size=320))
    tokenizer.save(tmp_path / "hf")
    original = {path.name: path.read_bytes() for path in (tmp_path / "hf").glob("*token*")}
    import_hf(tmp_path / "hf", tmp_path / "zj")
    assert read_manifest(tmp_path / "zj").tokenizer == tokenizer.fingerprint()
    export_hf(tmp_path / "zj", tmp_path / "back")
    assert {name: (tmp_path / "back" / name).read_bytes() for name in original} == original

    import_hf(tmp_path / "hf", tmp_path / "wider", special_tokens=("<bot>", "<human>"))
    export_hf(tmp_path / "wider", tmp_path / "wider-hf")
    old, new = _tensors(tmp_path / "hf"), _tensors(tmp_path / "wider-hf")
    pieces = [i for i in tokenizer.encode("<human>") if tokenizer.piece(i) != "▁"]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert new[name].shape == (322, 32)
        assert torch.equal(new[name][:320], old[name])
        assert len(pieces) == 7  # no letter of it is in the texts but h: bytes
        assert torch.allclose(new[name][321], old[name][pieces].mean(0), atol=1e-6)
    assert read_manifest(tmp_path / "wider").tokenizer != tokenizer.fingerprint()


def _spoil_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_what_is_not_a_sound_safetensors_llama_is_refused(tmp_path: Path) -> None:
    def refused(name: str, spoil: Any, words: str) -> None:
        folder = tmp_path / name
        _hf_model(folder, SMALL)
        spoil(folder)
        with pytest.raises(CheckpointError, match=words):
            import_hf(folder, tmp_path / f"{name}-zj")
        assert not (tmp_path / f"{name}-zj").exists()

    def edit(**changes: torch.Tensor | None) -> Any:
        def apply(folder: Path) -> None:
            tensors = _tensors(folder) | {name.replace("__", "."): value for name, value in changes.items()}
            kept = {name: value for name, value in tensors.items() if value is not None}
            safetensors.torch.save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

        return apply

    def to_pickle(folder: Path) -> None:
        torch.save(_tensors(folder), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    def truncate(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    refused("pickle", to_pickle, "pytorch_model.bin is a pickle")
    refused("truncated", truncate, "model.safetensors is missing or damaged")
    refused("nan", edit(model__norm__weight=torch.full((32,), float("nan"))), "model.norm.weight holds NaN")
    refused("missing", edit(model__norm__weight=None), "no tensor model.norm.weight")
    refused("bias", edit(model__layers__0__self_attn__q_proj__bias=torch.zeros(32)), "q_proj.bias that a LLaMA")
    refused("shape", edit(model__norm__weight=torch.ones(31)), r"model.norm.weight has shape \(31,\)")
    refused("other", lambda folder: _spoil_config(folder, model_type="bloom"), "only 'llama' models")
    refused("act", lambda folder: _spoil_config(folder, hidden_act="gelu"), "hidden_act is 'gelu'")
    rope = {"rope_type": "yarn", "factor": 2.0}
    refused("rope", lambda folder: _spoil_config(folder, rope_parameters=rope), "rope_type 'yarn' is not supported")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads: must be >= 1, got 0"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers: expected an integer, got 2.0; write 2"),
        ({"architectures": 5}, "architectures: expected a list, got 5"),
        ({"architectures": ["BloomModel"]}, "architectures is ['BloomModel']; known are"),
        ({"hidden_size": "32"}, "hidden_size: expected an integer, got the string '32'"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: expected a number, got the string '1e-5'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: expected true or false, got the string 'false'"),
        ({"max_position_embeddings": None}, "max_position_embeddings: expected an integer, got null"),
        ({"megatron_zj": [1]}, "megatron_zj: expected a mapping, got a list [1]"),
        ({"megatron_zj": {"kernels": "nope"}}, "megatron_zj.kernels: the string 'nope' is not one of auto, triton"),
        ({"rope_parameters": [1]}, "rope_parameters: expected a mapping, got [1]"),
        ({"rope_parameters": {"rope_type": []}}, "rope_type [] is not supported; known are default, linear, llama3"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_scaling.factor: missing"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "rope_scaling.factor: expected a number"),
    ],
)
def test_a_config_that_says_no_llama_is_refused_by_file_and_key(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    _hf_model(tmp_path, SMALL)
    _spoil_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / 'config.json'}: {words}")):
        import_hf(tmp_path, tmp_path / "zj")
    assert not (tmp_path / "zj").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", '["llama"]', "config.json must hold a JSON object, found list"),
        ("config.json", '"llama"', "config.json must hold a JSON object, found str"),
        ("model.safetensors.index.json", "[]", "index.json has no weight_map of tensor names to files"),
        (
            "model.safetensors.index.json",
            '{"weight_map": [1]}',
            "index.json has no weight_map of tensor names to files",
        ),
        ("model.safetensors.index.json", '{"weight_map": {"x": 5}}', "names 5, which is not a safetensors file"),
    ],
)
def test_json_of_another_shape_is_refused_by_its_file(tmp_path: Path, name: str, content: str, words: str) -> None:
    _hf_model(tmp_path, SMALL)
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=re.escape(words)):
        import_hf(tmp_path, tmp_path / "zj")


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(tmp_path: Path) -> None:
    tokenizer = train_sentencepiece(["头痛发热咳嗽，请问医生怎么办？", "abc abd abe"] * 20, 300)
    _hf_model(tmp_path / "hf", replace(SMALL, vocab_size=298))
    tokenizer.save(tmp_path / "hf")
    words = "hf has 300 ids and the model 298 vocabulary rows; put the tokenizer there that the model was trained with"
    with pytest.raises(CheckpointError, match=words):
        import_hf(tmp_path / "hf", tmp_path / "zj")
    assert not (tmp_path / "zj").exists()


def test_a_conversion_never_overwrites_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    _hf_model(tmp_path / "hf", SMALL)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match="exists already"):
        import_hf(tmp_path / "hf", tmp_path / "taken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "taken"]


def test_the_command_line_says_in_one_line_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry("convert", ["--from", str(tmp_path), "--to", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path} is no complete checkpoint")
    assert "it is empty; give a run that has ended, or one of its step_* folders" in said
