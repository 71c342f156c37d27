"""Imports are declared, in the lowest version that CI tests. (.ci/run also tries that we install no module.)"""

import ast
import re
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from conftest import ROOT

OURS = {path.stem for path in (*Path(ROOT).iterdir(), *Path(ROOT, "tests").rglob("*.py"))}  # files and folders
ASKED_FOR = {"wandb", "deepspeed", "decord", "torchcodec", "gradio"}  # whoever wants it is told what to install


def requirements(extra: str | None) -> dict[str, str]:
    """Normalised name -> version specifier."""
    found = {}
    for line in requires("etc-video"):
        requirement, _, marker = line.partition(";")
        if ("extra ==" in marker) == bool(extra) and (not extra or extra in marker):
            name, specifier = re.fullmatch(r"([\w.-]+)\s*(.*)", requirement.strip()).groups()
            found[normal(name)] = specifier.strip("()")
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def third_party(path: Path) -> set[str]:
    """Top-level modules of others that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names - OURS - ASKED_FOR


@pytest.mark.parametrize("folder, extras", [
    ("*.py", ()), ("layers/*.py", ()), ("beyond/*.py", ()), ("sd/*.py", ()), ("clips/*.py", ()), ("training/*.py", ()),
    ("lab/**/*.py", ("dev",)), ("tests/**/*.py", ("dev",)),
])
def test_what_is_imported_is_declared(folder, extras):
    declared = requirements(None)
    for extra in extras:
        declared |= requirements(extra)
    homes = packages_distributions()
    for path in Path(ROOT).glob(folder):
        for module in third_party(path):
            assert any(normal(home) in declared for home in homes.get(module, [module])), f"{path.name}: {module}"


def test_every_lower_bound_is_the_version_that_ci_tests():
    text = Path(ROOT, ".ci", "lowest.txt").read_text()
    pins = {normal(name): version for name, version in re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE)}
    for name, specifier in requirements(None).items():
        assert specifier == f">={pins[name]}", f"{name} {specifier}, CI tests {pins[name]}"
