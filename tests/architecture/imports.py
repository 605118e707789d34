"""Rules about who knows whom."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from tests.architecture.source import Source, dotted, functions

ORDER = (
    "kernels", "config", "runtime", "parallel", "models", "data", "checkpoint", "engine", "rollout", "roles",
    "algorithms", "evaluation", "train", "cli",
)  # fmt: skip
ONLY_IN = {
    "megatron.core": ("parallel", "models", "data", "checkpoint", "engine"),
    "torch.distributed": ("runtime", "parallel", "checkpoint", "engine", "roles"),
    "transformers": ("megatron_zj.checkpoint.hf",),
    "triton": ("kernels",),
}
OTHER_BANS = {  # room -> prefixes of modules it does not know, beyond the order
    "algorithms": ("megatron_zj.checkpoint",),
    "train": ("megatron_zj.algorithms.ppo",),
    "kernels": ("megatron_zj", "megatron", "transformers", "numpy"),
}
TYPE_MODELS_MAY_SEE = "megatron_zj.data.packing.PackedBatch"
OPTIONAL = (  # found at run time
    "transformer_engine",
    "apex",
    "megatron.core.extensions.transformer_engine",
    "megatron.core.extensions.transformer_engine_spec_provider",
)
MAY_IMPORT_IN_FUNCTIONS = ("megatron_zj.checkpoint.hf", "kernels.dispatch")
MAY_PATCH = ("megatron_zj.parallel.cpu_port", "megatron_zj.parallel.groups")
SETTINGS = ("torch.backends.", "torch.utils.deterministic.")  # documented switches, no patches


@dataclass(frozen=True)
class Import:
    """One imported module (``from a import b`` counts as ``a`` and as ``a.b``)."""

    node: ast.AST
    names: tuple[str, ...]
    typing_only: bool


def imports(source: Source) -> Iterator[Import]:
    """Every import, those in functions and ``importlib.import_module("literal")`` included."""
    typing_only = {
        id(inner)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.If) and dotted(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(source.tree):
        quiet = id(node) in typing_only
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node, (alias.name,), quiet)
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(source, node)
            for alias in node.names:
                yield Import(node, (module, f"{module}.{alias.name}"), quiet)
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in ("import_module", "__import__"):
            literals = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
            yield from (Import(node, (name,), quiet) for name in literals if isinstance(name, str))


def _absolute(source: Source, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parent = source.module.split(".")[: -node.level]
    return ".".join([*parent, *([node.module] if node.module else [])])


def _below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def import_order(source: Source) -> list[str]:
    """A package imports only what stands to its left; models and data do not import one another."""
    findings = []
    for item in imports(source):
        if source.room == "models" and item.typing_only and item.names[-1] == TYPE_MODELS_MAY_SEE:
            continue
        for room in ({_room(name) for name in item.names} & set(ORDER)) - {source.room}:
            if {source.room, room} == {"data", "models"}:
                findings.append(source.at(item.node, f"imports {item.names[-1]}: models and data are apart"))
            elif source.room not in ORDER or ORDER.index(room) > ORDER.index(source.room):
                findings.append(source.at(item.node, f"imports {item.names[-1]}: {room} stands to the right"))
    return findings


def _room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if parts[0] == "megatron_zj" and len(parts) > 1 else parts[0]


def restricted_imports(source: Source) -> list[str]:
    """megatron.core, torch.distributed, transformers and triton are known in few places."""
    findings = []
    used = [(item.node, name) for item in imports(source) for name in item.names]
    used += [(node, dotted(node)) for node in ast.walk(source.tree) if isinstance(node, ast.Attribute)]
    for node, name in used:
        for package, places in ONLY_IN.items():
            if _below(name, package) and source.room not in places and source.module not in places:
                findings.append(source.at(node, f"{name}: {package} is for {', '.join(places)} only"))
        for banned in OTHER_BANS.get(source.room, ()):
            if _below(name, banned) and isinstance(node, ast.Import | ast.ImportFrom | ast.Call):
                findings.append(source.at(node, f"{name}: {source.room} does not know {banned}"))
    return sorted(set(findings))


def config_is_stdlib_only(source: Source) -> list[str]:
    """Configurations load without torch: the standard library and config itself."""
    import_names = {name.split(".")[0]: item.node for item in imports(source) for name in item.names[:1]}
    foreign = set(import_names) - sys.stdlib_module_names - {"megatron_zj"}
    return (
        [source.at(import_names[name], f"imports {name}") for name in sorted(foreign)]
        if source.room == "config"
        else []
    )


def no_function_level_imports(source: Source) -> list[str]:
    """Imports stand at the top of the file, but for optional packages and the two modules around them."""
    if source.module in MAY_IMPORT_IN_FUNCTIONS:
        return []
    inside = {id(node): function for function in functions(source.tree) for node in ast.walk(function)}
    return [
        source.at(item.node, f"import inside {inside[id(item.node)].name}()")
        for item in imports(source)
        if isinstance(item.node, ast.Import | ast.ImportFrom)
        and id(item.node) in inside
        and not any(_below(item.names[0], optional) for optional in OPTIONAL)
    ]


def no_patching(source: Source) -> list[str]:
    """Nothing of a third party is changed outside the two modules that say why."""
    if source.module in MAY_PATCH:
        return []
    foreign = {}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                full = f"{origin}.{alias.name}" if origin else alias.name
                own = full.split(".")[0] in ("megatron_zj", "kernels", "tests") or getattr(node, "level", 0)
                name = alias.asname or alias.name.split(".")[0] if not origin else alias.asname or alias.name
                if not own:
                    foreign[name] = full
    findings = []
    for node in ast.walk(source.tree):
        targets = (
            node.targets
            if isinstance(node, ast.Assign | ast.Delete)
            else [node.target]
            if isinstance(node, ast.AugAssign | ast.AnnAssign)
            else []
        )
        changed = [target for target in targets if isinstance(target, ast.Attribute)]
        if isinstance(node, ast.Call) and dotted(node.func) in ("setattr", "delattr") and node.args:
            changed = [ast.Attribute(node.args[0], "?")]
        for target in changed:
            path = dotted(target)
            if path.split(".")[0] in foreign and not path.startswith(SETTINGS):
                findings.append(source.at(node, f"changes {path}, which belongs to {foreign[path.split('.')[0]]}"))
    return findings
