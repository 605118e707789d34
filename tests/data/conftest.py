"""A small tokenizer for the data tests, trained once."""

from __future__ import annotations

import pytest

from megatron_zj.data.tokenizer import SentencePieceTokenizer
from megatron_zj.data.vocabulary import train_sentencepiece

TEXTS = (
    "病人发热咳嗽三天，请问需要做什么检查？建议先查血常规，多喝水，注意休息。",
    "头痛怎么办？您好，请问头痛多久了，有没有恶心呕吐？如果加重请及时去医院。",
    "高血压患者应当低盐饮食，按时服药，定期测量血压。hello world 123\n第二行",
)


@pytest.fixture(scope="session")
def tokenizer() -> SentencePieceTokenizer:
    """About 400 pieces; special tokens <human> and <bot>; bos 1, eos 2, pad 3."""
    return train_sentencepiece(TEXTS * 4, 420, special_tokens=("<human>", "<bot>"), character_coverage=1.0)
