"""What the user's data can be wrong with: one exception for a record, one for everything else."""

from __future__ import annotations

from pathlib import Path


class DataError(ValueError):
    """Bad input; the message names the file (or key) and says what to change."""


class BadRecord(DataError):
    """One record cannot be used.  ``on_bad_record: skip`` counts these; nothing else is ever skipped."""

    def __init__(self, reason: str, *, field: str | None = None, hint: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.field = field
        self.hint = hint

    def located(self, path: Path | str, line: int) -> DataError:
        """The same complaint with its place in the file."""
        where = f"{path}, record at line {line}" + (f", field {self.field!r}" if self.field else "")
        hint = self.hint or "correct the record, or set data.on_bad_record=skip to leave such records out"
        return DataError(f"{where}: {self.reason}\n  -> {hint}")
