"""Raw files to units: reading, converting, encoding, and counting what was left out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_zj.config.data import ChatConfig, OnBadRecord, Overlong, PreferenceConfig, PromptsConfig
from megatron_zj.data.chat import chat_template
from megatron_zj.data.errors import BadRecord, DataError
from megatron_zj.data.formats.reading import Item
from megatron_zj.data.formats.registry import Format, choose_format, convert_any, convert_item, raw_items
from megatron_zj.data.raw import raw_files
from megatron_zj.data.records import DERIVED, Kind
from megatron_zj.data.rows import Counts, Encoder, TooLong, Unit
from megatron_zj.data.store import MemoryStore
from megatron_zj.data.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
RowsConfig = ChatConfig | PreferenceConfig | PromptsConfig
MAX_TOKENS_IN_MEMORY = 1 << 28  # 1 GiB of ids a rank; above that the data must be prepared


@dataclass(frozen=True)
class Conversion:
    """All that decides how a file's records become units."""

    kind: Kind
    format: str
    template: str
    max_length: int
    overlong: Overlong
    on_bad_record: OnBadRecord

    @classmethod
    def of(cls, config: RowsConfig) -> Conversion:
        """From a configuration of rows."""
        return cls(
            config.kind, config.format, config.template, config.max_length, config.overlong, config.on_bad_record
        )

    def encoder(self, tokenizer: Tokenizer) -> Encoder:
        """The encoder of these settings; an unknown template or a missing special token is an error here."""
        return Encoder(tokenizer, chat_template(self.template), self.max_length, self.overlong)


def encode_items(
    path: Path,
    items: Iterable[tuple[int, Item]],
    form: Format,
    conversion: Conversion,
    encoder: Encoder,
    counts: Counts,
) -> Iterator[tuple[Unit, int, str]]:
    """Units of numbered raw records, each with its record's number and place.

    A record that cannot be used raises DataError with file, line and field, or is counted, as the policy says.
    """
    for number, item in items:
        counts.records += 1
        where = f"{path}, record at line {item.line}"
        try:
            units = encoder(convert_item(item, form, conversion.kind), counts)
        except TooLong as error:
            raise DataError(f"{where}: {error}") from error
        except BadRecord as error:
            complaint = error.located(path, item.line)
            if conversion.on_bad_record == "error":
                raise complaint from error
            counts.bad += 1
            counts.first_bad = [*counts.first_bad, str(complaint).splitlines()[0]][:5]
            continue
        for unit in units:
            yield unit, number, where


def load_units(
    files: Sequence[str], conversion: Conversion, tokenizer: Tokenizer, *, progress: bool = False
) -> tuple[MemoryStore, Counts]:
    """All units of raw files, in memory.  Raises DataError above MAX_TOKENS_IN_MEMORY tokens."""
    counts = Counts()
    return MemoryStore(_limited(_encoded(files, conversion, tokenizer, counts, progress), counts)), counts


def _encoded(
    files: Sequence[str], conversion: Conversion, tokenizer: Tokenizer, counts: Counts, progress: bool
) -> Iterator[tuple[Unit, int, str]]:
    encoder = conversion.encoder(tokenizer)
    number = 0
    with tqdm(desc="tokenizing", unit=" records", disable=not progress) as bar:
        for path in map(Path, raw_files(files)):
            form = choose_format(path, conversion.format)
            told = False
            for item in raw_items(path, form):
                told = told or _tell_derived(path, item, form, conversion.kind)
                yield from encode_items(path, [(number, item)], form, conversion, encoder, counts)
                number += 1
                bar.update()


def _tell_derived(path: Path, item: Item, form: Format, kind: Kind) -> bool:
    """One line where a file's records are of another kind than the stream's; False: this record says nothing."""
    try:
        record = convert_any(item, form)
    except BadRecord:
        return False
    if (made := DERIVED.get((type(record), kind))) is not None:
        _log.info("%s (%s) for data.kind=%s: %s", path, form.name, kind, made)
    return True


def _limited(units: Iterable[tuple[Unit, int, str]], counts: Counts) -> Iterator[tuple[Unit, int, str]]:
    for unit in units:
        if counts.tokens > MAX_TOKENS_IN_MEMORY:
            raise DataError(
                f"the files have more than {MAX_TOKENS_IN_MEMORY} tokens, too many to hold in memory\n"
                "  -> run zj prepare with the same data settings, and give its folder as data.files"
            )
        yield unit
