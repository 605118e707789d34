"""Stand-ins for a model: callables whose answers are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_zj.data.chat import chat_template
from megatron_zj.data.tokenizer import Tokenizer
from megatron_zj.evaluation.model import Codec, Ids

SPECIALS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<human>": 3, "<bot>": 4}


class CharacterTokenizer(Tokenizer):
    """One id a character."""

    def __init__(self) -> None:
        self.specials, self.bos_id, self.eos_id, self.pad_id, self.vocab_size = SPECIALS, 1, 2, 0, 0x110000

    def _encode(self, text: str) -> list[int]:
        return [ord(character) + 10 for character in text]

    def piece(self, token_id: int) -> str:
        return chr(token_id - 10)

    def fingerprint(self) -> str:
        return "characters"

    def _files(self) -> dict[str, bytes]:
        raise NotImplementedError

    def _decode_plain(self, ids: Sequence[int]) -> str:
        return "".join(chr(token_id - 10) for token_id in ids)


def codec() -> Codec:
    """The ziya template on characters."""
    return Codec(CharacterTokenizer(), chat_template("ziya"))


def text_of(ids: Ids) -> str:
    """What a prompt says, special tokens left out."""
    return CharacterTokenizer().decode(list(ids))


def answering(answer: Callable[[str], str]) -> Callable[[Sequence[Ids]], list[tuple[str, bool]]]:
    """A model that answers by a function of the prompt's text."""
    return lambda prompts: [(answer(text_of(prompt)), True) for prompt in prompts]
