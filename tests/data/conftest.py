"""A small tokenizer for the data tests, trained once."""

from __future__ import annotations

import json
from pathlib import Path

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


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tokenizer: SentencePieceTokenizer) -> Path:
    """Raw files: a.jsonl and b.jsonl of 40 texts, chat.jsonl, rm.jsonl; and the folder of the tokenizer."""
    folder = tmp_path_factory.mktemp("raw")
    tokenizer.save(folder / "tokenizer")
    texts = [json.dumps({"text": f"头痛{i}，" + "发热咳嗽。" * (i % 5)}, ensure_ascii=False) for i in range(40)]
    (folder / "a.jsonl").write_text("\n".join(texts[:30]), encoding="utf-8")
    (folder / "b.jsonl").write_text("\n".join(texts[30:]), encoding="gb18030")
    chats = [{"instruction": f"头痛{i}", "output": "休息" * (1 + i % 9)} for i in range(20)]
    (folder / "chat.jsonl").write_text("\n".join(json.dumps(c, ensure_ascii=False) for c in chats), encoding="utf-8")
    ranked = [{"prompt": f"头痛{i}", "responses": ["甲", "乙", "丙"], "ranks": [1, 0, 1]} for i in range(9)]
    (folder / "rm.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in ranked), encoding="utf-8")
    return folder
