"""Names of stop tokens: which ids they mean, where they are read, and what is said of those that are no token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_zj.cli.build import build_parts, checked_tokenizer
from megatron_zj.cli.compose import compose_run
from megatron_zj.config.algorithm import PPOConfig
from megatron_zj.config.loader import ConfigError
from megatron_zj.config.run import RunConfig
from megatron_zj.config.sampling import SamplingConfig
from megatron_zj.data.tokenizer import HF_FILE, Tokenizer, load_tokenizer
from megatron_zj.rollout.stop_tokens import stop_ids
from megatron_zj.runtime.timers import Timers
from tests.algorithms.ppo_world import Prompts
from tests.helpers.ranks import run_ranks
from tests.rollout.test_stop_text import BYTES, PIECES


def _ids(tokenizer: Tokenizer, *names: str) -> set[int]:
    found = stop_ids(SamplingConfig(stop_tokens=names), tokenizer)
    assert tokenizer.eos_id in found  # eos always ends a row
    return set(found - {tokenizer.eos_id})


def test_special_tokens_and_entries_of_the_vocabulary_are_stop_tokens() -> None:
    assert _ids(PIECES) == set()
    assert _ids(PIECES, "</s>") == set()
    assert _ids(PIECES, "<human>", "。") == {PIECES.special_id("<human>"), PIECES.encode("。")[-1]}
    assert [PIECES.piece(one) for one in _ids(PIECES, "<0x0A>")] == ["<0x0A>"]  # a line feed, as the vocabulary has it


def test_a_text_that_is_one_token_is_a_stop_token_however_the_vocabulary_spells_it(tmp_path: Path) -> None:
    BYTES.add_special_tokens(["<s>", "</s>"])
    BYTES.save(str(tmp_path / HF_FILE))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}', encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path, ())
    [line_feed] = tokenizer.encode("\n")
    assert tokenizer.piece(line_feed) != "\n"
    assert _ids(tokenizer, "\n") == {line_feed}


def test_what_is_no_token_is_listed_with_its_pieces() -> None:
    with pytest.raises(ConfigError) as caught:
        stop_ids(SamplingConfig(stop_tokens=("<human>", "<nobody>", "头痛吗")), PIECES, "algorithm.sampling")
    said = str(caught.value)
    assert "algorithm.sampling.stop_tokens: '<nobody>' is no token of the tokenizer, it is" in said
    assert "'头痛吗' is no token" in said
    assert "algorithm.sampling.stop_strings, or name a special token (" in said
    assert "'<human>' is" not in said
    with pytest.raises(ValueError, match="stop_tokens must be names of tokens"):
        SamplingConfig(stop_tokens=("",))


def _config(folder: Path, names: str) -> RunConfig:
    path = f"tokenizer.path={folder}"
    return compose_run(["experiment=demo/ppo", "world_size=null", path, f"algorithm.sampling.stop_tokens={names}"])


def _of_a_run(config: RunConfig) -> frozenset[int]:
    tokenizer, timers = checked_tokenizer(config), Timers(torch.device("cpu"))
    parts = build_parts(config, {}, tokenizer, timers, None, Prompts(), None)  # type: ignore[arg-type]
    assert isinstance(config.algorithm, PPOConfig)
    return parts.rollout(config.algorithm.sampling).stop_ids


def test_a_training_run_reads_them_and_refuses_a_wrong_one_before_a_model_is_built(tmp_path: Path) -> None:
    PIECES.save(tmp_path)
    [found] = run_ranks(1, _of_a_run, _config(tmp_path, "['<human>']"))
    assert found == {PIECES.eos_id, PIECES.special_id("<human>")}
    with pytest.raises(ConfigError, match=r"algorithm\.sampling\.stop_tokens: '<nobody>' is no token"):
        checked_tokenizer(_config(tmp_path, "['<nobody>']"))
