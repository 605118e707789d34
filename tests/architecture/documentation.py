"""Rules about what is written down."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.architecture.source import Source, dotted

SELF_EVIDENT = ("forward", "backward", "setup_context", "state_dict", "load_state_dict")  # protocols of torch and ours


def public_docstrings(source: Source, said_elsewhere: frozenset[str] = frozenset()) -> list[str]:
    """Every module, and every public class, function and method, says what it does.

    A method may be silent where its name is in ``said_elsewhere``: it does what a protocol or base class documents.
    """
    findings = []
    if not ast.get_docstring(source.tree) and source.tree.body:
        findings.append(f"{source.module}: no module docstring")
    for node, owner in _public(source.tree):
        if not ast.get_docstring(node) and not (owner and node.name in said_elsewhere):
            findings.append(source.at(node, f"{owner}{node.name} has no docstring"))
    return findings


def documented_interfaces(source: Source) -> set[str]:
    """Names of documented methods of the file's protocols and abstract classes."""
    return {
        node.name
        for owner in source.tree.body
        if isinstance(owner, ast.ClassDef)
        and {dotted(base).split(".")[-1] for base in owner.bases} & {"Protocol", "ABC"}
        for node in owner.body
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node)
    }


def _public(tree: ast.Module) -> Iterator[tuple[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not _is_private(node):
            yield node, ""
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and not _is_private(inner):
                    yield inner, f"{node.name}."


def _is_private(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Underscored, a protocol of torch's, an overload, or a Triton kernel (its launcher documents it)."""
    decorators = {
        dotted(decorator.func if isinstance(decorator, ast.Call) else decorator) for decorator in node.decorator_list
    }
    kernel = {name.split(".")[-1] for name in decorators} & {"overload", "jit", "setter"}
    return node.name.startswith("_") or node.name in SELF_EVIDENT or bool(kernel)


def config_classes(source: Source) -> list[str]:
    """A configuration is a frozen, keyword-only dataclass, and every field has its unit or meaning beside it."""
    if source.room != "config":
        return []
    findings = []
    lines = source.text.splitlines()
    for node in source.tree.body:
        if not isinstance(node, ast.ClassDef) or not re.search(r"(Config|Settings)$", node.name):
            continue
        options = {
            keyword.arg
            for decorator in node.decorator_list
            if isinstance(decorator, ast.Call) and dotted(decorator.func).split(".")[-1] == "dataclass"
            for keyword in decorator.keywords
            if isinstance(keyword.value, ast.Constant) and keyword.value.value is True
        }
        if not {"frozen", "kw_only"} <= options:
            findings.append(source.at(node, f"{node.name} is not @dataclass(frozen=True, kw_only=True)"))
        findings += [
            source.at(field, f"{node.name}.{ast.unparse(field.target)} has no comment")
            for field in node.body
            if isinstance(field, ast.AnnAssign) and not _explained(field, node, lines)
        ]
    return findings


def _explained(field: ast.AnnAssign, owner: ast.ClassDef, lines: list[str]) -> bool:
    """A comment on the field's lines or just above, its name in the class docstring, or a type that explains itself."""
    name, end = ast.unparse(field.target), field.end_lineno or field.lineno
    kind = ast.unparse(field.annotation)
    if re.search(r"(Config|Settings|Kind)\b", kind) or kind.startswith(("Literal[", "ClassVar[")):
        return True
    if any("#" in line for line in lines[field.lineno - 1 : end]) or lines[field.lineno - 2].strip().startswith("#"):
        return True
    follower = next((node for node in owner.body if node.lineno > end), None)
    if isinstance(follower, ast.Expr) and isinstance(follower.value, ast.Constant):
        return True
    return f"``{name}``" in (ast.get_docstring(owner) or "")
