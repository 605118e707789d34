"""A row that ends where its text holds one of some strings.

Strings do not end at token boundaries, and a byte-fallback token may hold part of a character, so the newest tokens
are decoded together with those before them whose text is already known: a handful of tokens a step, whatever the
length of the row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]  # token ids to text
_HALF = "�"  # what a decoder says for bytes that are no whole character (yet)
_MOST_HELD = 8  # tokens without whole text that are waited for: a character has at most 4 bytes


class StopText:
    """Watches one row.  A string that is complete before the row has ``min_tokens`` tokens does not end it."""

    def __init__(self, strings: Sequence[str], decode: Decode, min_tokens: int = 0) -> None:
        self._strings, self._decode, self._min_tokens = tuple(strings), decode, min_tokens
        self._keep = max(len(string) for string in strings) - 1
        self._tail = ""  # the end of the text so far, too short to hold a string
        self._shown: list[int] = []  # tokens whose text is in the tail: what stands before the new ones
        self._new: list[int] = []  # tokens whose text is not in the tail yet
        self._known = 0  # characters of the tail, and of the new tokens, that earlier calls have seen
        self._count = 0

    def ends(self, token: int) -> bool:
        """Whether this next token of the row completes one of the strings."""
        self._count += 1
        self._new.append(token)
        before = self._decode(self._shown)
        text = self._tail + self._decode([*self._shown, *self._new])[len(before) :]
        # what was complete before was too early: a string must end in what this token adds
        completes = any(string in text[max(0, self._known - len(string) + 1) :] for string in self._strings)
        whole = len(text) > len(self._tail) and not text.endswith(_HALF)
        if whole or len(self._new) >= _MOST_HELD:
            text = text[-self._keep :] if self._keep else ""
            self._tail, self._shown, self._new = text, self._new, []
        self._known = len(text.rstrip(_HALF))
        return completes and self._count >= self._min_tokens
