"""Plain data (from YAML) into frozen dataclasses, strictly; and back.

Nothing is converted or guessed: an unknown key, a missing key, a wrong type or a value that a dataclass refuses is a
problem with a dotted path.  All problems of a configuration are reported at once, as one ``ConfigError``.

Understood annotations: bool, int, float, str, Path, ``Literal``, ``X | None``, ``tuple[X, ...]``, ``tuple[X, Y]``,
``dict[str, X]``, dataclasses, and unions of dataclasses told apart by their ``kind``.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")

_INVALID = object()  # stands for a value that could not be loaded; the problem is in the list
_TOO_LARGE = 2**63
_MAX_SHOWN = 12  # problems printed, so that an error stays on one screen
_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    Path: "a path (a string)",
}


class ConfigError(ValueError):
    """A configuration that cannot be used.  ``problems``: one sentence each, naming the key and what to change."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        shown = list(self.problems[:_MAX_SHOWN])
        if len(self.problems) > _MAX_SHOWN:
            shown.append(f"... and {len(self.problems) - _MAX_SHOWN} more")
        super().__init__("\n".join(shown))


def load(schema: type[T], data: Mapping[str, Any], path: str = "") -> T:
    """An instance of the dataclass ``schema`` from nested dicts, lists and scalars.

    ``path``: dotted prefix for the messages.  Raises ``ConfigError`` with every problem found.
    """
    problems: list[str] = []
    value = _load(schema, data, path, problems)
    if problems:
        raise ConfigError(problems)
    return cast(T, value)


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of ``load``: nested dicts, lists and scalars that JSON and YAML can hold.  Every field is written."""
    plain = _plain(config)
    if not isinstance(plain, dict):
        raise TypeError(f"to_dict takes a dataclass, got {type(config).__name__}")
    return plain


def suggestion(word: str, known: Sequence[str]) -> str:
    """``; did you mean 'x'?`` for the nearest known word, or ``; known: ...`` when none is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known)) or 'none'}"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _load(annotation: Any, value: Any, path: str, problems: list[str]) -> Any:
    """The value as the annotation wants it, or ``_INVALID`` with a problem added."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _load_union(args, value, path, problems)
    if origin is Literal:
        return _load_literal(args, value, path, problems)
    if origin is tuple:
        return _load_tuple(args, value, path, problems)
    if origin is dict:
        return _load_dict(args[1], value, path, problems)
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return _load_dataclass(annotation, value, path, problems)
    return _load_scalar(annotation, value, path, problems)


def _load_scalar(annotation: Any, value: Any, path: str, problems: list[str]) -> Any:
    if annotation not in _NAMES:
        raise TypeError(f"{path}: the loader does not know the annotation {annotation!r}")
    if isinstance(value, int) and abs(value) >= _TOO_LARGE:
        problems.append(f"{path}: {_show(value)} does not fit in 64 bits; write a smaller number")
        return _INVALID
    if annotation is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isnan(value):
            problems.append(f"{path}: nan is not a number to configure with")
            return _INVALID
        return float(value)
    if annotation is Path and isinstance(value, str | Path) and str(value):
        return Path(value).expanduser()
    if type(value) is annotation:
        return value
    problems.append(f"{path}: expected {_NAMES[annotation]}, got {_show(value)}{_type_hint(annotation, value, path)}")
    return _INVALID


def _type_hint(annotation: Any, value: Any, path: str) -> str:
    """What to write instead, where one can tell."""
    key = path.rsplit(".", 1)[-1]
    if annotation in (str, Path) and isinstance(value, int | float):
        return f"; quote it in YAML ({key}: '{value}'), or on the command line \"{path}='{value}'\""
    if annotation in (int, float) and isinstance(value, str):
        return "; write it without quotes" if _is_number(value) else ""
    if annotation is int and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _show(value: Any) -> str:
    if value is None:
        return "null"
    kinds: dict[type[Any], str] = {dict: "a mapping", list: "a list", str: "the string"}
    kind = kinds.get(type(value), "")
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"{kind} {text}".strip()


def _load_literal(args: tuple[Any, ...], value: Any, path: str, problems: list[str]) -> Any:
    for choice in args:
        if type(choice) is type(value) and choice == value:
            return value
    choices = ", ".join(str(choice) for choice in args)
    near = difflib.get_close_matches(str(value), [str(choice) for choice in args], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    problems.append(f"{path}: {_show(value)} is not one of {choices}{hint}")
    return _INVALID


def _load_tuple(args: tuple[Any, ...], value: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(value, list | tuple):
        hint = f"; write {path}=[{value}]" if isinstance(value, str | int | float) else ""
        problems.append(f"{path}: expected a list, got {_show(value)}{hint}")
        return _INVALID
    variadic = len(args) == 2 and args[1] is Ellipsis
    if not variadic and len(value) != len(args):
        problems.append(f"{path}: expected {len(args)} items, got {len(value)}")
        return _INVALID
    wanted = [args[0]] * len(value) if variadic else args
    items = [_load(a, v, f"{path}[{i}]", problems) for i, (a, v) in enumerate(zip(wanted, value, strict=True))]
    return _INVALID if _INVALID in items else tuple(items)


def _load_dict(annotation: Any, value: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(value, Mapping):
        problems.append(f"{path}: expected a mapping, got {_show(value)}")
        return _INVALID
    loaded = {}
    for key, item in value.items():
        if not isinstance(key, str):
            problems.append(f"{path}: the key {key!r} is not a string; quote it")
            continue
        loaded[key] = _load(annotation, item, _join(path, key), problems)
    return _INVALID if any(item is _INVALID for item in loaded.values()) else loaded


def _load_union(args: tuple[Any, ...], value: Any, path: str, problems: list[str]) -> Any:
    """``X | None``, or dataclasses told apart by ``kind``."""
    if value is None and type(None) in args:
        return None
    options = [arg for arg in args if arg is not type(None)]
    if len(options) == 1:
        return _load(options[0], value, path, problems)
    if not all(dataclasses.is_dataclass(option) for option in options):
        raise TypeError(f"{path}: a union may hold None and dataclasses only, got {options}")
    by_kind = {kind: option for option in options for kind in get_args(get_type_hints(option)["kind"])}
    if not isinstance(value, Mapping):
        problems.append(f"{path}: expected a mapping with a kind ({', '.join(by_kind)}), got {_show(value)}")
    elif "kind" not in value:
        problems.append(f"{path}.kind: missing; one of {', '.join(by_kind)}")
    elif not isinstance(value["kind"], str) or value["kind"] not in by_kind:
        hint = suggestion(str(value["kind"]), list(by_kind))
        problems.append(f"{path}.kind: unknown kind {value['kind']!r}{hint}")
    else:
        return _load_dataclass(by_kind[value["kind"]], value, path, problems)
    return _INVALID


def _load_dataclass(schema: type[Any], value: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(value, Mapping):
        problems.append(f"{path or schema.__name__}: expected a mapping, got {_show(value)}")
        return _INVALID
    hints = get_type_hints(schema)
    fields = {field.name: field for field in dataclasses.fields(schema) if field.init}
    of_kind = f" for kind {value['kind']!r}" if "kind" in fields and "kind" in value else ""
    found = len(problems)
    loaded = {}
    for key, item in value.items():
        if key not in fields:
            problems.append(f"{_join(path, key)}: unknown key{of_kind}{suggestion(str(key), list(fields))}")
        else:
            loaded[key] = _load(hints[key], item, _join(path, key), problems)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in value and dataclasses.is_dataclass(hints[name]):
            _load(hints[name], {}, _join(path, name), problems)  # names what is missing inside
        elif required and name not in value:
            problems.append(f"{_join(path, name)}: missing")
    if len(problems) > found:
        return _INVALID
    try:
        return schema(**loaded)
    except ConfigError as error:  # names the field
        problems += [_join(path, problem) for problem in error.problems]
    except ValueError as error:
        problems.append(f"{path}: {error}" if path else str(error))
        return _INVALID
