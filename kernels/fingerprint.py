"""A number for what a timing or a resource count was taken of: the kernel's source, all it calls, and its blocks.

A timing depends on the host code besides: ``timing_hash``.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kernels.catalogue import Entry


def source_hash(kernel: Any) -> str:
    """16 hex digits of the kernel's source and that of every jit function and constant it reaches.

    Moving a kernel within its file, or its file, does not change the number; editing it or a callee does.
    """
    digest = hashlib.sha256()
    for text in sorted(_reached(kernel, set())):
        digest.update(text.encode())
    return digest.hexdigest()[:16]


def entry_hash(entry: Entry, arch: str) -> str:
    """16 hex digits of an entry on an architecture: its source, its constants and its blocks."""
    meta = json.dumps(entry.launch_meta(arch), sort_keys=True, default=str)
    return hashlib.sha256(f"{source_hash(entry.kernel)} {meta}".encode()).hexdigest()[:16]


def timing_hash(entry: Entry, arch: str) -> str:
    """16 hex digits of what a timing of an entry depends on: ``entry_hash``, and the host code that launches it."""
    folder = Path(inspect.getfile(entry.kernel.fn)).parent
    return hashlib.sha256(f"{entry_hash(entry, arch)} {host_hash(folder)}".encode()).hexdigest()[:16]


def host_hash(folder: Path) -> str:
    """Of an op's modules but the torch forms, comments and layout aside: grids, chunks and copies are chosen there."""
    files = [file for file in sorted(folder.glob("*.py")) if file.name not in ("reference.py", "plain.py")]
    text = "".join(f"{file.name}\n{ast.unparse(ast.parse(file.read_text(encoding='utf-8')))}\n" for file in files)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _reached(kernel: Any, seen: set[str]) -> Iterator[str]:
    function = kernel.fn
    name = f"{function.__module__}.{function.__qualname__}"
    if name in seen:
        return
    seen.add(name)
    source = textwrap.dedent(inspect.getsource(function))
    yield source
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Name):
            continue
        value = function.__globals__.get(node.id)
        if hasattr(value, "fn") and getattr(value.fn, "__module__", "").startswith("kernels."):
            yield from _reached(value, seen)
        elif type(value).__name__ == "constexpr":
            yield f"{node.id} = {value.value!r}\n"
