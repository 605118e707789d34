"""What a user installs: the lock covers every declared dependency, the wheel is whole, make explains itself."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.architecture.imports import imports
from tests.architecture.source import ROOT, Source, sources

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKED_EXTRAS = ("gpu", "hf", "dev")  # te needs CUDA to build; docs are made elsewhere


DISTRIBUTIONS = {"yaml": "PyYAML", "hydra": "hydra-core", "megatron": "megatron-core"}


def uncovered(requirements: list[str], lock: str) -> list[str]:
    """Declared requirements that the lock does not pin inside their range, and lock lines that pin nothing."""
    lines = [line for line in lock.splitlines() if line and not line.startswith("#")]
    findings = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)]
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    for text in requirements:
        requirement = Requirement(text)
        version = pins.get(canonicalize_name(requirement.name))
        if version is None or not requirement.specifier.contains(version):
            findings.append(f"{text}: locked {version}")
    return findings


def declared() -> list[str]:
    """The dependencies, and those of the locked extras."""
    extras = PROJECT["optional-dependencies"]
    return [*PROJECT["dependencies"], *(text for name in LOCKED_EXTRAS for text in extras[name])]


def test_the_lock_pins_everything_that_is_declared() -> None:
    lock = (ROOT / "requirements" / "cpu.txt").read_text()
    assert uncovered(declared(), lock) == []
    assert {"torch==2.13.0", "triton==3.7.1", "megatron-core==0.16.1"} <= set(lock.splitlines())


def test_a_gap_in_the_lock_is_found() -> None:
    assert uncovered(["torch>=2.11"], "torch==2.13.0") == []
    assert uncovered(["torch>=2.14"], "torch==2.13.0") == ["torch>=2.14: locked 2.13.0"]
    assert uncovered(["einops"], "torch==2.13.0\n") == ["einops: locked None"]
    assert uncovered([], "torch>=2.13\n") == ["torch>=2.13"]


def undeclared(files: Iterable[Source]) -> set[str]:
    """Top-level packages that the files import and pyproject.toml does not name."""
    extras = [text for group in PROJECT["optional-dependencies"].values() for text in group]
    names = {canonicalize_name(Requirement(text).name) for text in [*PROJECT["dependencies"], *extras]}
    known = sys.stdlib_module_names | {"megatron_zj", "kernels"}
    imported = {item.names[0].split(".")[0] for source in files for item in imports(source)}
    return {name for name in imported - known if canonicalize_name(DISTRIBUTIONS.get(name, name)) not in names}


def test_every_import_is_declared() -> None:
    assert undeclared(sources("megatron_zj", "kernels")) == set()
    assert undeclared([Source("megatron_zj.data.x", "def f():\n    import pandas, yaml, json")]) == {"pandas"}


def test_the_supported_pythons_agree() -> None:
    assert PROJECT["requires-python"] == ">=3.11,<3.13"
    assert PROJECT["name"] == "megatron-zj"
    assert PROJECT["version"].startswith("0.1.")  # other numbers could satisfy transformers' range for its own kernels


def test_the_wheel_holds_both_packages_the_configurations_and_the_command(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("conf", "megatron_zj", "kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=tree, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("megatron_zj-0.1.*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        (points,) = (name for name in held if name.endswith("entry_points.txt"))
        assert "zj = megatron_zj.cli.main:main" in archive.read(points).decode()
    expected = {
        path.relative_to(ROOT).as_posix()
        for folder in ("megatron_zj", "kernels")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    expected |= {f"megatron_zj/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert expected - held == set()
    assert {name.split("/")[0] for name in held - expected} == {wheel.name.split("-py3")[0] + ".dist-info"}


def test_make_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony is not None
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^  make (\S+)", shown, re.MULTILINE) == phony[1].split()
