"""Text to ids and back: SentencePiece ``.model`` files and Hugging Face tokenizer folders behind one interface.

Special tokens (bos, eos, pad, ``<human>`` ...) enter a row by id only.  ``encode`` never produces one from text: a
patient who types ``</s>`` gets the pieces of those four characters.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from megatron_zj.config.data import TokenizerConfig
from megatron_zj.data.errors import DataError
from megatron_zj.runtime.files import write_whole

SP_FILE = "tokenizer.model"
HF_FILE = "tokenizer.json"
_HF_CONFIG = "tokenizer_config.json"
_HF_SPECIAL = "special_tokens_map.json"
_HF_ADDED = "added_tokens.json"
TOKENIZER_FILES = (  # what a folder's tokenizer may be made of
    HF_FILE,
    SP_FILE,
    _HF_CONFIG,
    _HF_SPECIAL,
    _HF_ADDED,
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_ADDED = "the added token"
_SURROGATE = re.compile("[\ud800-\udfff]")


def has_lone_surrogate(text: str) -> bool:
    """Whether the text holds half of a character, which has no encoding; scraped JSON may."""
    return _SURROGATE.search(text) is not None


class Tokenizer(ABC):
    """Ids [0, vocab_size); ``specials`` maps every special token's text to its id."""

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    specials: Mapping[str, int]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no bos, no eos, and no special token whatever the text says.

        Raises DataError where the text holds half of a character.
        """
        if has_lone_surrogate(text):
            raise DataError("the text holds half of a character\n  -> type or send it as UTF-8")
        return self._encode(text)

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Ids of text that has an encoding."""

    @abstractmethod
    def piece(self, token_id: int) -> str:
        """The vocabulary entry with this id."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Checksum (64 hex digits) of all that decides ids; a checkpoint stores it and refuses another."""

    @abstractmethod
    def _files(self) -> dict[str, bytes]:
        """What ``save`` writes, the file without which there is no tokenizer last."""

    def save(self, folder: Path) -> None:
        """Write a folder that ``load_tokenizer`` reads back with the same fingerprint.

        A folder that does so already stays as it is.  Raises DataError where another tokenizer, or a file of one, is.
        """
        files = self._files()
        found = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
        if other := sorted(name for name, content in found.items() if content != files.get(name)):
            if not _is_at(folder, self.fingerprint()):
                raise DataError(
                    f"{folder / other[0]} is there already, and of another tokenizer\n"
                    "  -> choose another folder, or move that tokenizer away"
                )
            return
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_whole(folder / name, content)

    @abstractmethod
    def _decode_plain(self, ids: Sequence[int]) -> str:
        """Text of ids without a special token among them."""

    def special_id(self, token: str) -> int:
        """The id of one special token.  Raises DataError when the tokenizer has none."""
        if token not in self.specials:
            known = ", ".join(self.specials) or "none"
            raise DataError(
                f"the tokenizer has no special token {token!r} (it has: {known})\n"
                f"  -> add it, after those already listed: tokenizer.special_tokens=['{token}']"
            )
        return self.specials[token]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids.  ``skip_special`` leaves special tokens out; otherwise they appear as their names."""
        names = {token_id: token for token, token_id in self.specials.items()}
        parts: list[str] = []
        run: list[int] = []
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise DataError(f"token id {token_id} is outside the vocabulary of {self.vocab_size} ids")
            if token_id not in names:
                run.append(int(token_id))
            elif not skip_special:
                parts += [self._decode_plain(run), names[token_id]]
                run = []
        return "".join([*parts, self._decode_plain(run)])


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, plus tokens added after (or between) its pieces."""

    def __init__(self, model: bytes, added: Mapping[str, int], special_tokens: Sequence[str] = ()) -> None:
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        size = self._processor.vocab_size()
        specials = {self._processor.id_to_piece(i): i for i in range(size) if self._is_control(i)}
        self._check_added(added)
        specials |= added
        vocab_size = max([size - 1, *specials.values()]) + 1
        for token in special_tokens:
            if token in specials:
                continue
            known = self._processor.piece_to_id(token)
            if known != self._processor.unk_id():
                raise DataError(
                    f"special token {token!r} is already an ordinary piece (id {known}) of the tokenizer: text could "
                    "produce it\n  -> choose another name, or train the tokenizer with it as a special token"
                )
            specials[token] = vocab_size
            vocab_size += 1
        self._added = {token: token_id for token, token_id in specials.items() if token_id >= size}
        self.specials = specials
        self.vocab_size = vocab_size
        self.bos_id, self.eos_id = self._processor.bos_id(), self._processor.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise DataError("the SentencePiece model has no bos or no eos piece\n  -> train it with both")
        own_pad = self._processor.pad_id()
        self.pad_id = own_pad if own_pad >= 0 else specials.get("<pad>", self._processor.unk_id())

    def _check_added(self, added: Mapping[str, int]) -> None:
        """DataError unless the added tokens follow the pieces without a gap, or name a piece at its own id."""
        size = self._processor.vocab_size()
        pieces = {self._processor.id_to_piece(i): i for i in (self._processor.piece_to_id(t) for t in added)}
        for token, token_id in added.items():
            if pieces.get(token, token_id) != token_id:
                raise DataError(f"{_ADDED} {token!r} has id {token_id}, and is the model's piece {pieces[token]} too")
            if 0 <= token_id < size and token not in pieces:
                taken = self._processor.id_to_piece(token_id)
                raise DataError(f"{_ADDED} {token!r} has id {token_id}, which is the piece {taken!r} of the model")
        beyond = sorted((i, token) for token, i in added.items() if not 0 <= i < size)
        for expected, (token_id, token) in enumerate(beyond, start=size):
            if token_id != expected:
                raise DataError(
                    f"{_ADDED} {token!r} has id {token_id}; after the model's {size} pieces each next one has the next "
                    f"id, which is {expected}"
                )

    def _is_control(self, token_id: int) -> bool:
        return bool(self._processor.is_control(token_id))

    def _encode(self, text: str) -> list[int]:
        return list(self._processor.encode(text))

    def piece(self, token_id: int) -> str:
        names = {added_id: token for token, added_id in self._added.items()}
        return names[token_id] if token_id in names else str(self._processor.id_to_piece(token_id))

    def _decode_plain(self, ids: Sequence[int]) -> str:
        size = self._processor.vocab_size()
        return str(self._processor.decode([i for i in ids if i < size])) if ids else ""

    def fingerprint(self) -> str:
        return _digest(b"sentencepiece", self._model, json.dumps(sorted(self._added.items())).encode())

    @property
    def added(self) -> dict[str, int]:
        """Tokens after the model's pieces, with their ids."""
        return dict(self._added)

    @property
    def model(self) -> bytes:
        """The serialised SentencePiece model."""
        return self._model

    def _files(self) -> dict[str, bytes]:
        names = {"bos_token": self.piece(self.bos_id), "eos_token": self.piece(self.eos_id)}
        names |= {"unk_token": self.piece(self._processor.unk_id()), "pad_token": self.piece(self.pad_id)}
        config = {
            "tokenizer_class": "LlamaTokenizer",
            **names,
            "added_tokens_decoder": {
                str(token_id): {"content": token, "special": True, "normalized": False}
                for token, token_id in sorted(self._added.items(), key=lambda item: item[1])
            },
        }
        return {_HF_CONFIG: _json(config), SP_FILE: self._model}


class HFTokenizer(Tokenizer):
    """A ``tokenizer.json`` of the ``tokenizers`` library, with the names of bos, eos and pad from its folder."""

    def __init__(self, text: str, names: Mapping[str, str], special_tokens: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        self._tokenizer.add_special_tokens(list(special_tokens))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # special tokens in text are text
        self._names = dict(names)
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        self.specials = {token.content: token_id for token_id, token in sorted(added.items()) if token.special}
        self.bos_id, self.eos_id = self._named("bos_token"), self._named("eos_token")
        pad = names.get("pad_token", names.get("unk_token", names["eos_token"]))
        pad_id = self._tokenizer.token_to_id(pad)
        if pad_id is None:
            raise DataError(f"the tokenizer folder names pad token {pad!r}, which the vocabulary does not have")
        self.pad_id = int(pad_id)

    def _named(self, key: str) -> int:
        token = self._names.get(key)
        token_id = None if token is None else self._tokenizer.token_to_id(token)
        if token_id is None:
            raise DataError(
                f"the tokenizer folder gives no usable {key} (found {token!r})\n  -> name it in {_HF_CONFIG}"
            )
        return int(token_id)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def piece(self, token_id: int) -> str:
        return str(self._tokenizer.id_to_token(token_id))

    def _decode_plain(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False)) if ids else ""

    def fingerprint(self) -> str:
        content = json.dumps(json.loads(self._tokenizer.to_str()), sort_keys=True, ensure_ascii=False)
        return _digest(b"tokenizers", content.encode(), json.dumps(sorted(self._names.items())).encode())

    def _files(self) -> dict[str, bytes]:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._names}
        return {_HF_CONFIG: _json(config), HF_FILE: self._tokenizer.to_str().encode()}


def load_tokenizer(path: Path, special_tokens: Sequence[str] = ()) -> Tokenizer:
    """A ``.model`` file, or a folder with ``tokenizer.json`` or ``tokenizer.model``.

    ``special_tokens`` the tokenizer does not have yet get the ids after its last, in this order.
    """
    if not path.exists():
        raise DataError(f"tokenizer {path} does not exist\n  -> set tokenizer.path to a .model file or a folder")
    if "" in special_tokens:
        raise DataError("tokenizer.special_tokens: the text of a token is empty\n  -> give it one, or leave it out")
    if path.is_file():
        return SentencePieceTokenizer(_read_model(path), {}, special_tokens)
    settings = _hf_settings(path)
    if (path / HF_FILE).is_file():
        try:
            text = (path / HF_FILE).read_text(encoding="utf-8")
            return HFTokenizer(text, _names(settings), special_tokens)
        except (DataError, OSError):
            raise
        except Exception as error:  # the library raises bare Exception on a damaged file
            raise DataError(f"{path / HF_FILE} is not a usable tokenizer: {error}") from error
    if (path / SP_FILE).is_file():
        model, added = _read_model(path / SP_FILE), _added_tokens(path, settings)
        try:
            return SentencePieceTokenizer(model, added, special_tokens)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
    raise DataError(f"folder {path} holds neither {HF_FILE} nor {SP_FILE}\n  -> point tokenizer.path at one that does")


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of a run's configuration."""
    if config.path is None:
        raise DataError("no tokenizer\n  -> set tokenizer.path to a SentencePiece .model file or a tokenizer folder")
    return load_tokenizer(config.path, config.special_tokens)


def _read_model(path: Path) -> bytes:
    content = path.read_bytes()
    if not content:  # the library takes it for a model without a piece
        raise DataError(f"{path} is empty\n  -> fetch or copy the tokenizer again")
    try:
        sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise DataError(
            f"{path} is not a SentencePiece model, or a damaged one\n"
            "  -> fetch or copy it again; tokenizer.path takes a .model file, or a folder with one or a tokenizer.json"
        ) from error
    return content


def _hf_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, over special_tokens_map.json."""
    settings: dict[str, Any] = {}
    for name in (_HF_SPECIAL, _HF_CONFIG):
        if (folder / name).is_file():
            found = _read_json(folder / name)
            settings |= {key: value for key, value in found.items() if value is not None}
    return settings


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} must hold a JSON object, found {type(found).__name__}")
    return found


def _names(settings: Mapping[str, Any]) -> dict[str, str]:
    """The text of bos, eos, unk and pad; each stands in the file as text or as an added token's description."""
    names = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = settings.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            names[key] = value
    return names


def _added_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, int]:
    """Tokens and ids of added_tokens.json and of tokenizer_config.json; one that is in both must have one id."""
    listed = _read_json(folder / _HF_ADDED) if (folder / _HF_ADDED).is_file() else {}
    found: list[tuple[Path, Any, Any]] = [(folder / _HF_ADDED, token, token_id) for token, token_id in listed.items()]
    where, decoder = folder / _HF_CONFIG, settings.get("added_tokens_decoder", {})
    if not isinstance(decoder, dict):
        raise DataError(f"{where}: added_tokens_decoder must be an object, found {type(decoder).__name__}")
    for key, value in decoder.items():
        content = value.get("content") if isinstance(value, dict) else None
        found.append((where, content, int(key) if key.isdecimal() else key))
    added: dict[str, int] = {}
    for path, token, token_id in found:
        if not isinstance(token, str) or not token or type(token_id) is not int or token_id < 0:
            raise DataError(
                f"{path}: an added token must have a text and an id from 0 on, found {token!r}: {token_id!r}"
            )
        if added.setdefault(token, token_id) != token_id:
            raise DataError(f"{path}: the added token {token!r} has id {token_id}, and {added[token]} before")
    return added


def _is_at(folder: Path, fingerprint: str) -> bool:
    """Whether the folder holds the tokenizer with this fingerprint."""
    try:
        return load_tokenizer(folder).fingerprint() == fingerprint
    except DataError:
        return False


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
