"""What the rules read: one Python file with its module name, text and syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("megatron_zj", "kernels")


@dataclass(frozen=True)
class Source:
    """``module`` is dotted, e.g. ``megatron_zj.engine.build``; a package's own file ends in ``.__init__``."""

    module: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.text)

    @property
    def room(self) -> str:
        """The part of the house: ``kernels``, ``engine``, ``tools``, ``tests`` ...; "" for ``megatron_zj`` itself."""
        parts = self.module.split(".")
        return parts[0] if parts[0] != "megatron_zj" else parts[1] if parts[1] != "__init__" else ""

    @property
    def name(self) -> str:
        """The file's name without ``.py``."""
        return self.module.rsplit(".", 1)[-1]

    def at(self, node: ast.AST, message: str) -> str:
        """A finding: where, and what is wrong."""
        return f"{self.module}:{getattr(node, 'lineno', 1)}: {message}"


Rule = Callable[[Source], list[str]]


def sources(*folders: str) -> Iterator[Source]:
    """Every Python file below these folders of the repository."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield _source(path)


@cache
def _source(path: Path) -> Source:
    return Source(".".join(path.relative_to(ROOT).with_suffix("").parts), path.read_text(encoding="utf-8"))


def obey(rule: Rule, *folders: str) -> None:
    """Fail with every finding of the rule below these folders (the two packages, when none is named)."""
    findings = [finding for source in sources(*(folders or PACKAGES)) for finding in rule(source)]
    assert not findings, f"{rule.__name__}: {rule.__doc__}\n" + "\n".join(findings)


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of a name or attribute chain, "" of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function, nested ones and methods too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
