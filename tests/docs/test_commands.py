"""What the pages tell a reader to type is taken by the program; keys, links and examples they show are real."""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from pathlib import Path

import pytest
import yaml

from megatron_zj.config.inference import EvaluationConfig, InferenceConfig
from megatron_zj.config.run import RunConfig
from megatron_zj.data.formats.registry import FORMATS
from tests.docs.commands import FENCE, ROOT, inline_commands, refuse, shell_lines

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BASES = (".", "megatron_zj", "conf/experiment")  # what a page's path may start from
_NO_KEY = {"json", "model", "py", "md", "yaml", "jsonl", "safetensors"}  # ends of file names that look like keys


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_command_of_the_page_would_run(page: Path) -> None:
    lines = shell_lines(page.read_text(encoding="utf-8"))
    assert [problem for line in lines for problem in refuse(line)] == []


def test_commands_named_in_running_text_exist() -> None:
    found = {command for page in PAGES for command in inline_commands(page.read_text(encoding="utf-8"))}
    assert len(found) > 10
    assert [problem for command in sorted(found) for problem in refuse(command)] == []


def test_the_readme_and_the_tutorial_are_read_at_all() -> None:
    commands = {page.name: shell_lines(page.read_text(encoding="utf-8")) for page in PAGES}
    assert {"make demo", "make test"} <= {line.partition("#")[0].strip() for line in commands["README.md"]}
    assert any("experiment=zhongjing/ppo" in line for line in commands["README.md"])
    assert len([line for line in commands["tutorial.md"] if line.startswith("zj ")]) >= 10


@pytest.mark.parametrize(
    "line",
    [
        "make no-such-target",
        "make demo DEVIZE=cuda",
        "zj trian experiment=demo/sft",
        "zj check experiment=demo/sfft",
        "zj check experiment=demo/sft optim.lrr=1",
        "zj check experiment=demo/sft --fast",
        "zj launch experiment=demo/sft parallel.tp=3",
        "zj launch --multirun experiment=demo/sft optim.lr=1e-4,high",
        "zj convert --from a --into b",
        "zj prepare tokenizer.path=t data.file=[a] out=b",
        "zj tokenizer train data.files=[a] vocab_size=many out=b",
        "zj evaluate checkpoint.load=a suites=[exams] data.files=[b]",
        "zj generate checkpoint.load=a sampling.max_tokens=3",
        "torchrun --nproc-per-node 3 -m megatron_zj.cli.train experiment=demo/sft",
        "launch/local.sh 3 experiment=demo/pretrain",
        "launch/remote.sh 2 experiment=demo/pretrain",
        "sbatch --nodes 3 launch/slurm.sbatch experiment=zhongjing/pretrain layout=64gpu",
        "python tools/no_such_tool.py",
        "python tools/prepare_demo.py --into x",
        "zj-train experiment=demo/sft",
    ],
)
def test_a_wrong_command_is_found(line: str) -> None:
    assert refuse(line)


def test_a_wrong_command_in_a_page_is_found() -> None:
    page = "text\n```bash\nzj check \\\n  experiment=demo/sft \\\n  optim.lrr=1   # note\n```\nand `make nothing`\n"
    assert [refuse(line) for line in shell_lines(page)] != [[]]
    assert refuse(*inline_commands(page))


def _members(annotation: object) -> list[object]:
    """The dataclasses (or ``dict`` values) that a field may hold."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(annotation) for member in _members(part)]
    if origin is dict:
        return [_Anything(typing.get_args(annotation)[1])]
    return [annotation]


@dataclasses.dataclass(frozen=True)
class _Anything:
    """A dict with names of the user's own; ``value``: what each holds."""

    value: object


def key_exists(key: str, tree: object) -> bool:
    """Whether ``a.b.c`` is a field of this tree of dataclasses, under any of its kinds."""
    name, _, rest = key.partition(".")
    for member in _members(tree):
        if isinstance(member, _Anything):
            inside: object = member.value
        elif dataclasses.is_dataclass(member):
            hints = typing.get_type_hints(member)
            if name not in {field.name for field in dataclasses.fields(member)}:
                continue
            inside = hints[name]
        else:
            continue
        if not rest or rest == "*" or key_exists(rest, inside):
            return True
    return False


def keys_of(page: Path) -> set[str]:
    """Keys of a configuration that a page names in backticks; in comparisons, those of our column."""
    text = page.read_text(encoding="utf-8")
    if page.name == "coming-from.md":
        text = "\n".join(line.rstrip("| ").rpartition(" | ")[2] for line in text.splitlines() if line.startswith("|"))
    groups = {field.name for field in dataclasses.fields(RunConfig)}
    words = {word.partition("=")[0] for code in re.findall(r"`([^`\n]+)`", text) for word in code.split()}
    return {
        word
        for word in words
        if re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)*\.([a-z_0-9]+|\*)", word)
        and word.partition(".")[0] in groups
        and word.rpartition(".")[2] not in _NO_KEY
    }


OPS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/reference.py"))


def missing_paths(text: str) -> list[str]:
    """Paths in backticks that are not in the tree.  ``<op>`` stands for every op of kernels/, another ``<x>`` or ``*``
    for anything there is, ``{a,b}`` for both; a run's own files are not looked for."""
    spans = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    words = {word for span in spans for word in span.split() if "/" in word and not re.search(r"[=:]|^runs/", word)}
    named = [word.replace("<op>", op) for word in words for op in (OPS if "<op>" in word else [""])]
    return sorted(
        word
        for word in named
        for pattern in _expanded(re.sub(r"<\w+>", "*", word).rstrip("/"))
        if not any(any((ROOT / base).glob(f"{pattern}{end}")) for base in BASES for end in ("", ".yaml"))
    )


def _expanded(pattern: str) -> list[str]:
    before, brace, after = pattern.partition("{")
    inside, _, rest = after.partition("}")
    return [f"{before}{word}{rest}" for word in inside.split(",")] if brace else [pattern]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_paths_that_the_page_names_exist(name: str) -> None:
    assert missing_paths((ROOT / name).read_text(encoding="utf-8")) == []


def test_a_path_that_is_not_there_is_found() -> None:
    planted = "`algorithms/gone.py` `tests/kernels/test_<op>.py` `data/{chat,gone}.py` `algorithms/<name>.py` `real/*`"
    assert {"algorithms/gone.py", "tests/kernels/test_rope.py", "data/{chat,gone}.py"} <= set(missing_paths(planted))
    assert len(missing_paths(planted)) == 2 + len(OPS)


def test_keys_that_pages_name_exist() -> None:
    found = {key: _name(page) for page in PAGES for key in keys_of(page)}
    assert len(found) > 60
    unknown = {
        key: page
        for key, page in found.items()
        if not key_exists(key, RunConfig) and not key_exists(key, EvaluationConfig)
    }
    assert unknown == {}


def test_a_key_that_does_not_exist_is_found() -> None:
    assert key_exists("algorithm.critic.optim.lr", RunConfig)
    assert key_exists("placements.policy.parallel.tp", RunConfig)
    assert not key_exists("algorithm.critic.optim.lrr", RunConfig)
    assert not key_exists("placements.policy.tp", RunConfig)
    assert not key_exists("optim", InferenceConfig)


def test_example_records_are_of_the_format_they_stand_beside() -> None:
    rows = [
        line
        for line in (ROOT / "docs" / "data.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("|") and re.findall(r"`(\w+)`", line.split("|")[1])
    ]
    seen = set()
    for row in rows:
        _, names, _, example, _ = row.split("|", 4)
        listed = [name for name in re.findall(r"`(\w+)`", names) if name in FORMATS]
        seen.update(listed)
        for code in re.findall(r"`([\[{][^`]*)`", example):
            if "[...]" in code or "...," in code:
                continue
            value = json.loads(code)
            record = value[0] if isinstance(value, list) else value
            chosen = next(name for name, form in FORMATS.items() if form.items is None and form.matches(record))
            assert chosen in listed, code
            FORMATS[chosen].convert(record)
    assert seen == set(FORMATS)


def test_the_site_lists_every_page_once() -> None:
    """``mkdocs.yml``, which the extra ``docs`` is for."""
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    entries = [entry for section in site["nav"] for entry in next(iter(section.values()))]
    listed = sorted(page for entry in entries for page in entry.values())
    pages = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    assert listed == sorted([*pages, "upstream/README.md"])
