"""Hydra composes ``conf/`` and the command line; the strict loader makes a ``RunConfig`` of the result.

Nothing downstream sees a DictConfig.  Every value override is handed to Hydra as a forced one (``++key=value``), so
that YAML need not repeat the dataclasses' defaults and a mistyped key is refused by the loader, with a suggestion.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_zj.config.loader import ConfigError, load, suggestion, to_dict
from megatron_zj.config.run import RunConfig
from megatron_zj.runtime.files import write_whole

PRIMARY = "train"  # conf/train.yaml
POLYMORPHIC = ("algorithm", "data")  # groups whose options are of different kinds
INHERITED = ("engine", "optim")  # what a role sets of these is laid over the run's own
_MAX_OPTIONS = 8  # of a group, in a message

_QUOTED = re.compile(r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""")  # splits into bare, quoted, bare, ...
_WORD = re.compile(r"[^\s\[\]{}(),'\"]+")


def conf_folder() -> Path:
    """The Hydra tree: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / f"{PRIMARY}.yaml").is_file():
            return folder
    raise ConfigError([f"no conf/{PRIMARY}.yaml in {package} or {package.parent}; reinstall megatron-zj"])


def compose_run(overrides: Sequence[str]) -> RunConfig:
    """The run that these command-line overrides describe.

    Raises ``ConfigError``: bad override grammar, an unknown group option, an unknown key, a wrong type.
    """
    tree = compose_plain(overrides)
    known = [field.name for field in fields(RunConfig)]
    groups = [folder.name for folder in conf_folder().iterdir() if folder.is_dir()]  # experiment and layout are no keys
    words = sorted({*known, *groups})
    slips = [f"{key}: unknown key{suggestion(key, words)}" for key in tree if key not in known]
    try:
        config = load(RunConfig, {key: value for key, value in tree.items() if key in known})
    except ConfigError as error:
        raise ConfigError([*slips, *error.problems]) from None
    if slips:
        raise ConfigError(slips)
    return config


def load_frozen(path: Path) -> RunConfig:
    """A resolved configuration, as ``save_frozen`` writes it.  Raises ``ConfigError`` and ``OSError``."""
    try:
        data = _StrictYaml(path.read_text(encoding="utf-8")).get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: not a YAML file: {_first_line(error)}"]) from error
    except RecursionError:
        raise ConfigError([f"{path}: not a configuration: brackets or blocks are nested too deeply"]) from None
    if not isinstance(data, Mapping):
        raise ConfigError([f"{path}: expected a mapping of settings, got {type(data).__name__}"])
    try:
        return load(RunConfig, data)
    except ConfigError as error:
        raise ConfigError([f"{path}: {problem}" for problem in error.problems]) from None


class _StrictYaml(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which the last would win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of ``node``; yaml.YAMLError with the line of a second key."""
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: {key.value} is set twice; remove one of the two")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def frozen_text(config: RunConfig) -> str:
    """The resolved configuration as YAML; every field is written."""
    return str(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120))


def save_frozen(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration, so that ``load_frozen`` gives an equal one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, frozen_text(config).encode())


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Hydra's own grammar, sweeps included.  Raises ``ConfigError``."""
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            override = parser.parse_override(_quote_foreign(text))
        except HydraException as error:
            raise ConfigError(
                [
                    f"{text!r} is no override: {_first_line(error)}; write key=value, and quote a value that holds "
                    "spaces, brackets, commas or '=': \"key='some value'\""
                ]
            ) from None
        if not override.key_or_group:
            raise ConfigError([f"{text!r} is no override: it has no key; write key=value"])
        parsed.append(override)
    return parsed


def _quote_foreign(text: str) -> str:
    """The override with words that Hydra's grammar cannot read bare (Chinese, ``~``, ``<human>``) put in quotes."""
    key, equals, value = text.partition("=")
    pieces = _QUOTED.split(value)
    pieces[::2] = [_WORD.sub(_quote_word, piece) for piece in pieces[::2]]
    return f"{key}{equals}{''.join(pieces)}"


def _quote_word(word: re.Match[str]) -> str:
    return f"'{word[0]}'" if not word[0].isascii() or set("~<>") & set(word[0]) else word[0]


def compose_plain(overrides: Sequence[str]) -> dict[str, Any]:
    """The composed tree as plain dicts and lists, before the loader sees it.

    A group that the command line switches to another kind than the experiment's (``data=corpus`` on an experiment
    over dialogues) takes its option file and the command line alone: the experiment's values were for another kind.
    """
    parsed = parse_overrides(overrides)
    for override in parsed:
        if override.is_sweep_override():
            raise ConfigError([f"{override.input_line!r} is a sweep; use zj launch --multirun, or quote the value"])
        if override.key_or_group == "model.preset" and (name := override.value()) is not None:
            raise ConfigError([f"model.preset: a name for the log, it chooses no shape; write model={name} for that"])
    with initialize_config_dir(str(conf_folder()), version_base="1.3", job_name="zj"):
        groups = [override for override in parsed if _is_group(override)]
        tree = _compose([_as_hydra(override) for override in parsed])
        for group in POLYMORPHIC:
            switches = [o for o in groups if o.key_or_group == group and not o.is_delete()]
            if not switches:
                continue
            before = _compose([str(o.input_line) for o in groups if o not in switches])
            if _kind(before, group) != _kind(tree, group):
                alone = [o for o in parsed if o.key_or_group != "experiment"]
                tree[group] = _compose([_as_hydra(override) for override in alone])[group]
    return _inherit(tree)


def _inherit(tree: dict[str, Any]) -> dict[str, Any]:
    """A role's ``engine`` or ``optim`` changes what it names; the rest is the run's, not the dataclass default."""
    algorithm = tree.get("algorithm")
    for role in algorithm.values() if isinstance(algorithm, dict) else ():
        for name in INHERITED:
            if isinstance(role, dict) and isinstance(role.get(name), dict):
                role[name] = _merged(tree.get(name) or {}, role[name])
    return tree


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _compose(overrides: list[str]) -> dict[str, Any]:
    try:
        container = OmegaConf.to_container(compose(PRIMARY, overrides=overrides), resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: a group's option is no string
        raise ConfigError([_explain(error, overrides)]) from error
    if not isinstance(container, dict):
        raise TypeError(f"conf/{PRIMARY}.yaml is no mapping")
    return {str(key): value for key, value in container.items()}


def _kind(tree: Mapping[str, Any], group: str) -> object:
    value = tree.get(group)
    return value.get("kind") if isinstance(value, Mapping) else None


def _is_group(override: Override) -> bool:
    """True where the key is a folder of conf/ and the value names one of its files."""
    folder = conf_folder() / override.key_or_group.replace("@", "/")
    return folder.is_dir() and not isinstance(override.value(), dict)


def _as_hydra(override: Override) -> str:
    """The override as Hydra gets it: values are forced, group choices and hydra.* stay as they are."""
    line = str(override.input_line)
    hydra_own = override.key_or_group.split(".")[0] == "hydra"
    if _is_group(override) or hydra_own or override.is_delete():
        return line
    return f"++{line.lstrip('+')}"


def options_of(group: str) -> list[str]:
    """The options of a group of conf/, subfolders included: ``demo/ppo``."""
    folder = conf_folder() / group
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def experiments() -> str:
    """Every experiment in a few words, for ``--help``: ``debug/{ppo,sft}, demo/{...}``."""
    families: dict[str, list[str]] = {}
    for option in options_of("experiment"):
        family, _, name = option.partition("/")
        families.setdefault(family, []).append(name)
    return "experiments: " + "; ".join(f"{family}/{{{', '.join(names)}}}" for family, names in families.items())


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    """One sentence; an option that does not exist gets the nearest one."""
    for text in overrides:
        key, _, value = text.partition("=")
        group = key.lstrip("+~")
        if (conf_folder() / group).is_dir() and not text.startswith("~"):
            options = options_of(group)
            if value in ("", "null"):
                shown = ", ".join(options[:_MAX_OPTIONS]) + (", ..." if len(options) > _MAX_OPTIONS else "")
                return f"{group}: {value or 'empty'}; leave it out, or name one of {shown}"
            if value not in options and not value.startswith("{"):
                return f"{group}: no option {value!r}{suggestion(value, options)}"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[:2])
