"""Randomness keyed by what it is for, never by the rank or by what was drawn before.

A key is the run's seed and a path such as ``("shuffle", epoch)`` or ``("weights", parameter_name)``.  Each key has its
own stream, the same on every rank, layout and platform, so that a result cannot depend on who draws first.
"""

from __future__ import annotations

import hashlib

import torch

_SEED_BITS = 63  # the largest seed that fits both torch.Generator and a signed 64-bit integer


def keyed_seed(seed: int, *keys: int | str) -> int:
    """A seed in [0, 2**63) from the whole key: BLAKE2b (RFC 7693) over the type and length of every part.

    ``1`` and ``"1"`` are different keys, and so are ``("ab", "c")`` and ``("a", "bc")``.  Raises TypeError for any
    other type, a bool or a float included: their text differs between versions.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in (seed, *keys):
        digest.update(_encoded(part))
    return int.from_bytes(digest.digest(), "big") >> (64 - _SEED_BITS)


def keyed_generator(seed: int, *keys: int | str) -> torch.Generator:
    """A fresh CPU generator at the start of this key's stream."""
    return torch.Generator(device="cpu").manual_seed(keyed_seed(seed, *keys))


def _encoded(part: int | str) -> bytes:
    if isinstance(part, bool) or not isinstance(part, int | str):
        raise TypeError(f"a random key is made of int and str, got {type(part).__name__}: {part!r}")
    kind = "s" if isinstance(part, str) else "i"
    text = str(part).encode()
    return f"{kind}{len(text)}:".encode() + text
