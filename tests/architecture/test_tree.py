"""The tree as a stranger gets it: nothing about the machine it was written on, no dead links between its own parts."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.architecture.source import ROOT

# Written in pieces, so that this file does not hold what it looks for.
FOREIGN = {
    "a path of the workplace": r"(?<![\w.])/wo" + r"rk(?:/|\b(?! ))|/opt/(?:py" + r"pi|wheels)",
    "a folder beside the checkout": r"(?<![\w-])sha" + r"red/(?!data/dev\b)",
    "a package index": r"(?:files\.pythonho"
    + r"sted|pypi\.o"
    + r"rg/simple|--(?:extra-)?index-u"
    + r"rl|--find-li"
    + r"nks)",
    "who typed it": r"(?i)\b(?:cla" + r"ude|anthro" + r"pic|co" + r"dex|copi" + r"lot)\b",
}
TEXT = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".sh", ".sbatch", ".json", ".in", ".cfg", ""}


def foreign_words(name: str, text: str) -> list[str]:
    """Lines that only make sense where this was written."""
    return [
        f"{name}:{number}: {what}: {line.strip()[:100]}"
        for number, line in enumerate(text.splitlines(), start=1)
        for what, pattern in FOREIGN.items()
        if re.search(pattern, line)
    ]


def tracked() -> dict[str, str]:
    """Name and text of every text file that git knows; all files below the root where this is no checkout."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    names = [name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]
    chosen = [name for name in names if (ROOT / name).suffix in TEXT]
    return {name: (ROOT / name).read_text(encoding="utf-8") for name in chosen}


def test_nothing_speaks_of_the_place_where_it_was_written() -> None:
    assert [finding for name, text in tracked().items() for finding in foreign_words(name, text)] == []


@pytest.mark.parametrize(
    "line",
    [
        "python /wo" + "rk/main/x.py",
        "see ../sha" + "red/design.md",
        "pip install --index-u" + "rl http://x",
        "pip install --find-li" + "nks /opt/whe" + "els",
        "written by Cla" + "ude",
    ],
)
def test_a_planted_word_is_found(line: str) -> None:
    assert foreign_words("x", f"fine\n{line}\n")


def test_ordinary_words_pass() -> None:
    fine = [
        "the work / the rest",
        "sha" + "red weights",
        "../sha" + "red/data/dev/classics",
        "frame" + "work/main",
        "a network/",
    ]
    assert foreign_words("x", "\n".join(fine)) == []


def broken_links(name: str, text: str) -> list[str]:
    """Links of a Markdown page to files of this repository that are not there."""
    folder = (ROOT / name).parent
    text = re.sub(r"`[^`\n]+`", "", text)  # `build[kind](config)` is code, no link
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)
    return [f"{name}: {target}" for target in targets if not (folder / target).exists()]


def test_links_between_our_own_pages_lead_somewhere() -> None:
    pages = {name: text for name, text in tracked().items() if name.endswith(".md")}
    assert [finding for name, text in pages.items() for finding in broken_links(name, text)] == []
    seen = broken_links("README.md", "see [this](docs/no-such-page.md), not `this[kind](code)`")
    assert seen == ["README.md: docs/no-such-page.md"]


def test_ci_runs_the_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "make test </dev/null" in script
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_every_patched_module_has_its_decision() -> None:
    decisions = (ROOT / "DECISIONS.md").read_text(encoding="utf-8")
    assert "cpu_port" in decisions
    assert "default group" in decisions or "default-group" in decisions
