"""Published data sets, as they are: every format is recognised, every record accounted for.

The files are development data beside the checkout, no part of the project; without them these tests skip.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_zj.config.data import ChatConfig, CorpusConfig, PreferenceConfig, PromptsConfig, TokenizerConfig
from megatron_zj.data.formats.registry import choose_format
from megatron_zj.data.inputs import Conversion, load_units
from megatron_zj.data.prepare import PrepareConfig, TextConfig, prepare
from megatron_zj.data.raw import read_raw
from megatron_zj.data.stream import build_stream
from megatron_zj.data.tokenizer import Tokenizer, load_tokenizer
from megatron_zj.data.vocabulary import extend_vocabulary, pieces_of_new_ids
from tests.helpers.published import DATA, needs_data

pytestmark = needs_data


@pytest.fixture(scope="module")
def merged() -> Tokenizer:
    return load_tokenizer(DATA / "tokenizers" / "chinese_llama2_tokenizer.model", ["<human>", "<bot>"])


@pytest.mark.parametrize(
    ("name", "form", "kind", "records", "bad"),
    [
        ("pt/drug_inserts.json", "strings", "corpus", 2441, 0),
        ("pt/tcm_classics.jsonl", "tcm_classics", "corpus", 5806, 0),
        ("pt/raw_gb18030/457-伤寒论.txt", "tcm_book", "corpus", 10, 0),
        ("sft/bentsao_liver_cancer.json", "bentsao", "chat", 1000, 0),
        ("sft/cmdd_train.jsonl", "cmdd", "chat", 1241, 114),  # turns that were a picture
        ("sft/cmdd_raw_example/train_0.json", "cmdd_raw", "chat", 1, 0),
        ("sft/disc_test_examples.jsonl", "disc", "chat", 163, 0),
        ("sft/medicalgpt_medical_sft_1k.jsonl", "sharegpt", "chat", 1000, 0),
        ("sft/remedi_dev_human_annotation.txt", "remedi", "chat", 100, 0),
        ("rm/medicalgpt_reward_test.json", "medicalgpt_reward", "preference", 100, 0),
        ("rm/zhongjing_rank_format_example.tsv", "zhongjing_ranking", "preference", 1, 0),
        ("rm/disc_pairs_firstturn.jsonl", "pairs", "preference", 1929, 0),
        ("rm/disc_ranked_dialogues.jsonl", "disc_ranked", "preference", 240, 19),  # all scores equal
        ("ppo/prompts_cmedqq.jsonl", "prompts", "prompts", 4000, 0),
        ("ppo/bentsao_benchmark_questions.json", "questions", "prompts", 200, 0),
        pytest.param("sft/toyhom_neike_sample.csv", "toyhom", "chat", 7644, 0, marks=pytest.mark.slow),
        pytest.param("sft/bentsao_llama_data.json", "alpaca", "chat", 8658, 0, marks=pytest.mark.slow),
    ],
)
def test_every_record_is_read_or_counted(
    merged: Tokenizer, name: str, form: str, kind: str, records: int, bad: int
) -> None:
    path = DATA / name
    assert choose_format(path, "auto").name == form
    conversion = Conversion(kind, "auto", "ziya", 4096, "truncate", "skip")
    _, counts = load_units([str(path)], conversion, merged)
    assert (counts.records, counts.bad, counts.units) == (records, bad, records - bad)


def test_classics_and_drugs_become_samples(merged: Tokenizer, tmp_path: Path) -> None:
    files = (str(DATA / "pt" / "raw_gb18030" / "457-伤寒论.txt"), str(DATA / "pt" / "raw_gb18030" / "504-脉经.txt"))
    merged.save(tmp_path / "tokenizer")
    config = PrepareConfig(
        out=tmp_path / "out", data=TextConfig(files=files), tokenizer=TokenizerConfig(path=tmp_path / "tokenizer")
    )
    manifest = prepare(config)
    corpus = CorpusConfig(files=(str(tmp_path / "out"),), sequence_length=256, validation_fraction=0.1)
    train, held_out = build_stream(corpus, merged, 0), build_stream(corpus, merged, 0, "validation")
    assert held_out is not None
    # samples overlap by one token, so each split has at most two samples more than its tokens need
    assert 0 <= (train.num_units + held_out.num_units) - manifest.counts["tokens"] / 255 <= 2
    assert merged.decode(train.next(1, 0, 1).tokens.values.tolist())


def test_streams_of_dialogues_rankings_and_prompts(merged: Tokenizer) -> None:
    chat = build_stream(
        ChatConfig(files=(str(DATA / "sft" / "remedi_dev_human_annotation.txt"),), max_length=256), merged, 0
    )
    batch = chat.next(8, 0, 1)
    assert batch.num_rows == 8
    assert 0 < batch.per_token["loss_mask"].values.float().mean() < 1
    ranked = build_stream(
        PreferenceConfig(files=(str(DATA / "rm" / "medicalgpt_reward_test.json"),), validation_fraction=0.2), merged, 0
    )
    assert ranked.num_units == 80
    assert [len(unit) for unit in ranked.next(5, 0, 1).units()] == [2] * 5
    prompts = build_stream(PromptsConfig(files=(str(DATA / "ppo" / "bentsao_benchmark_questions.json"),)), merged, 0)
    assert prompts.next(3, 0, 1).per_row["prompt_length"].min() > 5
    assert len(read_raw([str(DATA / "ppo" / "bentsao_benchmark_questions.json")], "prompts", "auto", "error")) == 200


def test_extension_gives_the_published_vocabulary_size() -> None:
    """Chinese-LLaMA reports 49,953 pieces for LLaMA's 32,000 and these 20,000."""
    base = load_tokenizer(DATA / "tokenizers" / "llama_tokenizer.model")
    extended = extend_vocabulary(base, load_tokenizer(DATA / "tokenizers" / "chinese_sp.model"))
    assert extended.vocab_size == 49953
    assert all(pieces_of_new_ids(base, extended))
