"""Rules about size, names, state and what no code may do."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.architecture.source import Source, dotted, functions

FILE_LINES, FUNCTION_LINES = 400, 60
KERNEL_FILE_LINES, KERNEL_FUNCTION_LINES = 800, 150
BANNED_NAMES = ("utils", "util", "helpers", "helper", "common", "misc", "manager", "base")
READS_ENVIRONMENT = ("megatron_zj.runtime.distributed",)
REGISTRIES = {  # the module state that may change, each filled at import only
    "algorithms": ("megatron_zj.algorithms.registry",),
    "model presets": ("megatron_zj.models.presets",),
    "kernel dispatch": ("kernels.dispatch",),
    "rule rewards": ("megatron_zj.algorithms.rules",),
    "data formats": ("megatron_zj.data.formats.registry",),
}
_CHANGES = ("append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "clear", "remove", "discard")
_CONTAINERS = ("list", "dict", "set", "defaultdict", "deque", "Counter", "OrderedDict", "WeakKeyDictionary")


def file_size(source: Source) -> list[str]:
    """A file has at most 400 lines, in kernels/ 800."""
    limit = KERNEL_FILE_LINES if _about_kernels(source) else FILE_LINES
    lines = source.text.count("\n")
    return [f"{source.module}: {lines} lines, at most {limit}"] if lines > limit else []


def function_size(source: Source) -> list[str]:
    """A function has at most 60 lines, in kernels/ 150."""
    limit = KERNEL_FUNCTION_LINES if _about_kernels(source) else FUNCTION_LINES
    return [
        source.at(function, f"{function.name}() has {length} lines, at most {limit}")
        for function in functions(source.tree)
        if (length := (function.end_lineno or 0) - function.lineno + 1) > limit
    ]


def _about_kernels(source: Source) -> bool:
    return source.module.removeprefix("tests.").startswith("kernels.")


def names(source: Source) -> list[str]:
    """No utils, helpers, common, misc, manager, base: a name says what a thing is."""
    findings = [
        f"{source.module}: {part!r} says nothing" for part in source.module.split(".")[1:] if part in BANNED_NAMES
    ]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ClassDef):
            last_word = re.findall(r"[A-Z][a-z]*", node.name)[-1:]
            if last_word and last_word[0].lower() in BANNED_NAMES:
                findings.append(source.at(node, f"class {node.name}"))
    return findings


def no_print(source: Source) -> list[str]:
    """Packages log; only commands write to the screen, through sys.stdout."""
    return [source.at(node, "print()") for node in _calls(source) if dotted(node.func) == "print"]


def environment(source: Source) -> list[str]:
    """Environment variables are read in runtime/distributed.py alone."""
    if source.module in READS_ENVIRONMENT:
        return []
    found = [node for node in ast.walk(source.tree) if isinstance(node, ast.Attribute | ast.ImportFrom)]
    taboo = ("os.environ", "os.getenv", "os.putenv", "os.environb")
    findings = [source.at(node, dotted(node)) for node in found if dotted(node) in taboo]
    for node in found:
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            findings += [source.at(node, f"os.{alias.name}") for alias in node.names if f"os.{alias.name}" in taboo]
    return findings


def no_module_state(source: Source) -> list[str]:
    """No ``global``, and no module-level object that code changes, but for the named registries."""
    findings = [source.at(node, "global") for node in ast.walk(source.tree) if isinstance(node, ast.Global)]
    if any(source.module in places for places in REGISTRIES.values()):
        return findings
    state = dict(_module_level_names(source.tree))
    for function in functions(source.tree):
        local = {argument.arg for argument in ast.walk(function) if isinstance(argument, ast.arg)}
        local |= {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        for node, name in _changed(function):
            if name in state and name not in local:
                findings.append(source.at(node, f"changes {name} of line {state[name].lineno}"))
    for name, node in state.items():
        if _is_container(node.value) and not name.isupper() and name != "__all__":
            findings.append(source.at(node, f"{name} is a module-level container: a constant is UPPER_CASE"))
    return findings


def _module_level_names(tree: ast.Module) -> Iterator[tuple[str, ast.Assign | ast.AnnAssign]]:
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            if isinstance(target, ast.Name) and isinstance(node, ast.Assign | ast.AnnAssign):
                yield target.id, node


def _is_container(value: ast.expr | None) -> bool:
    shown = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    called = isinstance(value, ast.Call) and dotted(value.func).split(".")[-1] in _CONTAINERS
    return isinstance(value, shown) or called


def _changed(function: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Names whose object the function changes: ``x[...] = ``, ``x.y = ``, ``x.append()``, ``del x[...]``."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign | ast.Delete):
            targets: list[ast.expr] = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _CHANGES:
            targets = [ast.Attribute(node.func.value, node.func.attr)]
        else:
            continue
        for target in targets:
            if isinstance(target, ast.Subscript | ast.Attribute) and isinstance(target.value, ast.Name):
                yield node, target.value.id


def group_timeouts(source: Source) -> list[str]:
    """Every process group is made with an explicit timeout."""
    makers = ("init_process_group", "new_group", "new_subgroups", "new_subgroups_by_enumeration", "split_group")
    return [
        source.at(node, f"{dotted(node.func)} without timeout=")
        for node in _calls(source)
        if dotted(node.func).split(".")[-1] in makers and "timeout" not in {keyword.arg for keyword in node.keywords}
    ]


def no_code_from_files(source: Source) -> list[str]:
    """No unpickling, eval or exec, no torch.load without weights_only, no unsafe yaml or numpy loading."""
    findings = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            origins = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            taboo = {"dill", "cloudpickle", "marshal", "shelve", "joblib"}
            taboo |= {"pickle"} if isinstance(node, ast.ImportFrom) else set()  # ``import pickle`` may write, or catch
            findings += [source.at(node, f"imports {o}") for o in origins if o.split(".")[0] in taboo]
    for node in _calls(source):
        name = dotted(node.func)
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        true = {key for key, value in given.items() if isinstance(value, ast.Constant) and value.value is True}
        if name in ("eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler"):
            findings.append(source.at(node, f"{name}()"))
        elif name == "torch.load" and "weights_only" not in true:
            findings.append(source.at(node, "torch.load without weights_only=True"))
        elif name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            findings.append(source.at(node, f"{name}: use yaml.safe_load"))
        elif "allow_pickle" in true:
            findings.append(source.at(node, "allow_pickle=True"))
    return findings


def one_loop(source: Source) -> list[str]:
    """train/loop.py alone steps an algorithm."""
    if source.module == "megatron_zj.train.loop":
        return []
    return [
        source.at(node, f"{dotted(node.func)}() outside train/loop.py")
        for node in _calls(source)
        if re.search(r"(^|[._])algorithm\.step$", dotted(node.func))
    ]


def todo_with_reason(source: Source) -> list[str]:
    """A TODO says what is missing and why: ``# TODO: ... because ...``."""
    findings = []
    for number, line in enumerate(source.text.splitlines(), start=1):
        if re.search(r"#.*\b(TODO|FIXME|XXX|HACK)\b(?!: .{20,})", line):
            findings.append(f"{source.module}:{number}: {line.strip()}")
    return findings


def _calls(source: Source) -> Iterator[ast.Call]:
    return (node for node in ast.walk(source.tree) if isinstance(node, ast.Call))
