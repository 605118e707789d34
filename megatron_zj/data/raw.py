"""Records of raw files as they are, for who needs their texts rather than ids: generation and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import megatron_zj.data.formats  # noqa: F401  (registers the formats)
from megatron_zj.config.data import OnBadRecord
from megatron_zj.data.chat import check_order
from megatron_zj.data.errors import BadRecord
from megatron_zj.data.formats.registry import choose_format, convert_item, raw_items
from megatron_zj.data.records import DialogueRecord, Kind, PromptRecord, Record


def read_raw(files: Sequence[str], kind: Kind, form: str, on_bad_record: OnBadRecord) -> list[Record]:
    """The records of ``files`` in order, as ``kind`` (a dialogue read as a prompt loses its last answer).

    ``form``: a name of data/formats, or auto.  Raises DataError at a record that cannot be used, or leaves it out, as
    ``on_bad_record`` says.
    """
    found: list[Record] = []
    for name in files:
        path = Path(name)
        chosen = choose_format(path, form)
        for item in raw_items(path, chosen):
            try:
                record = convert_item(item, chosen, kind)
                if isinstance(record, PromptRecord | DialogueRecord):
                    check_order(record.messages)
                found.append(record)
            except BadRecord as error:
                if on_bad_record == "error":
                    raise error.located(path, item.line) from error
    return found
