"""README and docs keep their promises: snippets run; commands, options, links and the functions they name exist."""

import ast
import importlib
import itertools
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

import cli
from sample import NoiseSchedule
from training.config import read_config

ROOT = Path(cli.ROOT)
PAGES = {path.name: path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}

each_page = pytest.mark.parametrize("page", PAGES)


@each_page
def test_snippets_run(page, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / "weights", tmp_path / "weights", copy_function=os.symlink)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(NoiseSchedule, "sampling_timesteps", lambda *_: [999, 500])  # enough to see it run
    snippets = re.findall(r"(<!-- not run: [^\n]+ -->\n)?^```python\n(.*?)^```$", TEXTS[page], re.MULTILINE | re.DOTALL)
    assert len(snippets) == TEXTS[page].count("```python")
    for skipped, code in snippets:
        if not skipped:
            exec(compile(code, page, "exec"), {"__name__": "snippet"})


def commands(text: str) -> list[list[str]]:
    """Words of each python and torchrun command, indented or in backticks."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    code = re.findall(r"^    (.+)", re.sub(r"\\\n +", "", prose), re.MULTILINE)
    code += [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose)]
    lines = itertools.chain(*(line.removeprefix("/usr/bin/time -v ").split(" && ") for line in code))
    return [shlex.split(line, comments=True) for line in lines if line.startswith(("python ", "torchrun "))]


def check_command(words: list[str]):
    """Raise on a file or module that is not there, and on arguments that it does not take."""
    rest = list(itertools.dropwhile(lambda word: word.startswith("--"), words[1:]))  # options of torchrun's own
    name, *arguments = rest[rest[0] == "-m" :]
    if name == "pytest":
        check_pytest(arguments)
    elif name.startswith("tests/"):
        assert (ROOT / name).is_file()
    elif name == "train.py":
        read_config([word for word in arguments if word != "--help"] or ["configs/tiny.py"])
    else:
        if name == "lab.bench":
            name, arguments = ".".join([name, *arguments[:1]]), arguments[1:]
        module = importlib.import_module(name if rest[0] == "-m" else re.fullmatch(r"(\w+)\.py", name)[1])
        module = importlib.import_module(f"{name}.__main__") if hasattr(module, "__path__") else module
        if arguments and arguments != ["--help"]:
            cli.parse(module.Options, "", arguments)


def check_pytest(arguments: list[str]):
    files = [ROOT / word for word in arguments if word.startswith("tests")]
    tests = [path for file in files for path in (file.rglob("test_*.py") if file.is_dir() else [file])]
    names = " ".join(re.findall(r"def (test_\w+)", "".join(path.read_text(encoding="utf-8") for path in tests)))
    for word in arguments[arguments.index("-k") + 1].split() if "-k" in arguments else ():
        assert word in ("and", "or", "not") or word.lower() in names.lower(), f"no test has {word} in its name"


@each_page
def test_commands_exist(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert commands(TEXTS[page])
    for words in commands(TEXTS[page]):
        try:
            check_command(words)
        except Exception as error:
            pytest.fail(f"{shlex.join(words)}: {error}")


def anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r'\]\(([^)\s]+)\)|src="([^"]+)"', TEXTS[page]):
        path, _, anchor = "".join(target).partition("#")
        there = PAGES[page].parent / path if path else PAGES[page]
        assert there.exists() and (not anchor or anchor in anchors(there)), target


def defined(path: Path) -> set[str]:
    """Functions, classes and methods of a file."""
    kinds, names = (ast.ClassDef, ast.FunctionDef), set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, kinds):
            names |= {node.name} | {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, kinds)}
    return names


def test_every_part_of_the_paper_is_where_the_table_says():
    section = TEXTS["README.md"].partition("## Where each part")[2].partition("\n## ")[0]
    rows = [row for row in section.splitlines() if row.startswith("| ")][1:]
    assert len(rows) > 15
    for row in rows:
        file = None
        for shown, target, name in re.findall(r"\[`([^`]+)`\]\(([^)]+)\)|`([^`]+)`", row):
            assert shown == target, row
            file = ROOT / target if target else file
            assert target or name in defined(file), f"{name} is not in {file}"
        assert file, row


def test_the_readme_has_at_most_200_lines():
    assert len(TEXTS["README.md"].splitlines()) <= 200
