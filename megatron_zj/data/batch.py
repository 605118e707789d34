"""Rows of tokens, ragged: what moves between data, engines, roles and algorithms.

Per-token fields are *token-aligned*: index t of a row speaks of token t.  The log-probability of a token, the
value of the state before it and its mask all stand at the token's own index; index 0, which nothing predicts,
holds 0.  Only packing shifts them (see packing.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

GROUP = "group"  # per-row field: rows with the same value (a ranked list) stay together


@dataclass(frozen=True)
class Rows:
    """Ragged values: ``values`` [sum of lengths], ``lengths`` [R] int64 on the CPU, in row order."""

    values: Tensor
    lengths: Tensor

    def __post_init__(self) -> None:
        if self.values.shape[0] != int(self.lengths.sum()):
            raise ValueError(f"{self.values.shape[0]} values for lengths that sum to {int(self.lengths.sum())}")

    @classmethod
    def of(cls, rows: Sequence[Tensor] | Sequence[Sequence[int]], dtype: torch.dtype | None = None) -> Rows:
        """Rows from one 1-D tensor (or list) a row."""
        tensors = [torch.as_tensor(row, dtype=dtype) for row in rows]
        lengths = torch.tensor([len(row) for row in tensors], dtype=torch.int64)
        empty = torch.zeros(0, dtype=dtype or torch.int64)
        return cls(torch.cat(tensors) if tensors else empty, lengths)

    @classmethod
    def concat(cls, parts: Sequence[Rows]) -> Rows:
        """All the rows of the parts, in order."""
        return cls(torch.cat([part.values for part in parts]), torch.cat([part.lengths for part in parts]))

    def __len__(self) -> int:
        return int(self.lengths.shape[0])

    @property
    def offsets(self) -> Tensor:
        """[R + 1] int64: where each row starts, and the end."""
        return torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0))

    def split(self) -> list[Tensor]:
        """One view a row."""
        return list(torch.split(self.values, self.lengths.tolist()))

    def select(self, row_ids: Sequence[int]) -> Rows:
        """The rows with these indices, in this order."""
        rows = self.split()
        picked = [rows[index] for index in row_ids]
        lengths = self.lengths[torch.as_tensor(list(row_ids), dtype=torch.int64)]
        return Rows(torch.cat(picked) if picked else self.values[:0], lengths)

    def to(self, device: torch.device | str) -> Rows:
        """Values on ``device``; lengths stay on the CPU."""
        return Rows(self.values.to(device), self.lengths)

    def replace(self, values: Tensor) -> Rows:
        """The same lengths with other values."""
        return Rows(values, self.lengths)


@dataclass(frozen=True)
class Batch:
    """Rows with named fields.

    ``tokens``: int64 ids.  ``per_token``: fields of the same lengths as ``tokens``.  ``per_row``: [R, ...] tensors.
    """

    tokens: Rows
    per_token: Mapping[str, Rows] = field(default_factory=dict)
    per_row: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, rows in self.per_token.items():
            if not torch.equal(rows.lengths, self.tokens.lengths):
                raise ValueError(f"field {name!r} has other lengths than tokens")
        for name, values in self.per_row.items():
            if values.shape[0] != self.num_rows:
                raise ValueError(f"field {name!r} has {values.shape[0]} rows, tokens have {self.num_rows}")

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.tokens)

    @property
    def num_tokens(self) -> int:
        """Number of tokens over all rows."""
        return int(self.tokens.values.shape[0])

    def select(self, row_ids: Sequence[int]) -> Batch:
        """The rows with these indices, in this order, with all their fields."""
        index = torch.as_tensor(list(row_ids), dtype=torch.int64)
        return Batch(
            self.tokens.select(row_ids),
            {name: rows.select(row_ids) for name, rows in self.per_token.items()},
            {name: values[index.to(values.device)] for name, values in self.per_row.items()},
        )

    def with_fields(
        self, per_token: Mapping[str, Rows] | None = None, per_row: Mapping[str, Tensor] | None = None
    ) -> Batch:
        """The same rows with fields added or replaced."""
        return Batch(self.tokens, {**self.per_token, **(per_token or {})}, {**self.per_row, **(per_row or {})})

    @classmethod
    def concat(cls, parts: Sequence[Batch]) -> Batch:
        """All the rows of the parts, in order; the parts have the same fields."""
        first = parts[0]
        return cls(
            Rows.concat([part.tokens for part in parts]),
            {name: Rows.concat([part.per_token[name] for part in parts]) for name in first.per_token},
            {name: torch.cat([part.per_row[name] for part in parts]) for name in first.per_row},
        )

    def to(self, device: torch.device | str) -> Batch:
        """Values on ``device``; lengths stay on the CPU."""
        return Batch(
            self.tokens.to(device),
            {name: rows.to(device) for name, rows in self.per_token.items()},
            {name: values.to(device) for name, values in self.per_row.items()},
        )

    def units(self) -> list[list[int]]:
        """Indices of rows that must stay together: one list a group, or one a row without groups."""
        if GROUP not in self.per_row:
            return [[row] for row in range(self.num_rows)]
        units: dict[int, list[int]] = {}
        for row, group in enumerate(self.per_row[GROUP].tolist()):
            units.setdefault(int(group), []).append(row)
        return list(units.values())
