"""Presets have the published numbers of parameters, and conf/model says the same as the code."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

from megatron_zj.algorithms.supervised import row_sizes
from megatron_zj.config.model import ModelConfig
from megatron_zj.config.optim import EngineConfig
from megatron_zj.config.parallel import ParallelConfig
from megatron_zj.models.flops import (
    forward_flops_per_token,
    memory_estimate,
    parameters,
    training_flops_per_token,
)
from megatron_zj.models.presets import PRESETS, preset

# As counted from the released checkpoints (the sum of model.safetensors.index.json, rotary tables left out).
PUBLISHED = {
    "llama_7b": 6_738_415_616,
    "llama_13b": 13_015_864_320,
    "llama_65b": 65_285_660_672,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "ziya_13b": 13_091_886_080,
    "ziya2_13b": 13_091_886_080,
}
CONF = Path(__file__).parents[2] / "conf" / "model"


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name: str) -> None:
    assert parameters(PRESETS[name]) == PUBLISHED[name]


def test_small_presets_are_as_small_as_they_say() -> None:
    assert 1.5e6 < parameters(PRESETS["tiny"]) < 2.5e6
    assert 9e6 < parameters(PRESETS["small"]) < 11e6


def test_ziya_vocabulary_needs_no_padding() -> None:
    assert preset("ziya-13b").padded_vocab_size == preset("ziya-13b").vocab_size == 39424


def test_a_name_may_be_written_with_hyphens() -> None:
    assert preset("llama-2-7b") is PRESETS["llama2_7b"]
    with pytest.raises(ValueError, match=r"unknown model preset 'llama-4'.*llama3_8b"):
        preset("llama-4")


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_conf_model_equals_the_preset(path: Path) -> None:
    values = yaml.safe_load(path.read_text())
    if values.get("preset") is None:
        pytest.skip("no preset")
    model = PRESETS[values["preset"]]
    written = ModelConfig(**values)
    for field in fields(ModelConfig):
        ours, theirs = getattr(model, field.name), getattr(written, field.name)
        if field.name == "num_query_groups":
            ours, theirs = model.kv_heads, written.kv_heads
        assert ours == theirs, field.name


def test_scalar_head_replaces_the_vocabulary_matrix() -> None:
    model = PRESETS["llama_7b"]
    assert parameters(model) - parameters(model, "value") == (32000 - 1) * 4096
    assert parameters(model, "score") - parameters(model, "value") == 1
    assert parameters(replace(model, tie_embeddings=True)) == parameters(model) - 32000 * 4096


def test_flops_count_a_worked_example_by_hand() -> None:
    model = ModelConfig(
        vocab_size=100, hidden_size=8, ffn_hidden_size=12, num_layers=2, num_attention_heads=2, num_query_groups=1
    )
    # A layer: q 8x8, k and v 8x4 each, o 8x8, three of 8x12 -> 480 weights; attention 4 * 8 * (5 + 1) / 2 = 96.
    assert forward_flops_per_token(model, 5) == 2 * (2 * 480 + 96) + 2 * 100 * 8
    assert training_flops_per_token(model, 5) == 3 * forward_flops_per_token(model, 5)


def test_flops_of_ragged_rows_follow_from_the_length_that_a_step_reports() -> None:
    model, lengths = PRESETS["tiny"], [3, 50, 200]
    each = sum(length * training_flops_per_token(model, length) for length in lengths)
    sizes = row_sizes(lengths)
    assert sizes["tokens"] * training_flops_per_token(model, sizes["sequence_length"]) == pytest.approx(each)


def test_flops_of_a_large_model_are_about_six_a_parameter() -> None:
    model = PRESETS["llama_7b"]
    assert training_flops_per_token(model, 1) == pytest.approx(6 * parameters(model), rel=0.03)


def estimate(**engine: object):  # type: ignore[no-untyped-def]
    parallel = ParallelConfig(tp=4, pp=2, sequence_parallel=True)
    return memory_estimate(PRESETS["ziya_13b"], "lm", parallel, EngineConfig(precision="bf16", **engine), 8)  # type: ignore[arg-type]


def test_memory_of_weights_and_states_is_bytes_times_the_rank_s_parameters() -> None:
    model = PRESETS["ziya_13b"]
    one = memory_estimate(model, "lm", ParallelConfig(), EngineConfig(precision="bf16"), 1)
    assert (one.weights, one.gradients, one.optimizer) == tuple(parameters(model) * size for size in (2, 4, 12))
    assert estimate().weights == pytest.approx(one.weights / 8, rel=0.01)
    assert estimate(distributed_optimizer=True).optimizer == pytest.approx(estimate().optimizer / 8, rel=1e-6)
    frozen = memory_estimate(model, "lm", ParallelConfig(), EngineConfig(precision="bf16"), 1, trainable=False)
    assert frozen.gradients == frozen.optimizer == 0


def test_recompute_and_parallelism_save_activations() -> None:
    none, full = estimate().activations, estimate(recompute="full").activations
    selective = estimate(recompute="selective", recompute_modules=("mlp", "layernorm")).activations
    assert full < selective < none
    assert estimate(micro_batch_tokens=8192).activations > 1.5 * none


def test_estimate_says_itself_in_gib() -> None:
    assert estimate().describe().startswith(f"{estimate().total / 2**30:.2f} GiB = weights ")
