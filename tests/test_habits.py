"""The habits of this repository that no linter checks: tests that say what they protect, names that mean one thing."""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest

import dba_kernels

ROOT = Path(__file__).resolve().parent.parent
TESTS = sorted((ROOT / "tests").glob("test_*.py"))
SHARED = sorted([*(ROOT / "tests" / "support").glob("*.py"), *(ROOT / "bench").rglob("*.py")])
PACKAGE = sorted((ROOT / "dba_kernels").rglob("*.py"))
COMMAND_LINE = sorted((ROOT / "dba_kernels" / "cli").rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# --- tests ------------------------------------------------------------------------------------------------------------


def unexplained(source: str) -> list[str]:
    """Tests without a docstring that says in its first line which behaviour they protect."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    tests = [function for function in functions if function.name.startswith("test_")]
    return [test.name for test in tests if len((ast.get_docstring(test) or "").split("\n")[0].split()) < 3]


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_every_test_says_what_it_protects(path: Path) -> None:
    """Protects whoever sees a test fail: its first line says which behaviour is broken."""
    assert unexplained(path.read_text(encoding="utf-8")) == []


def test_a_silent_test_is_noticed() -> None:
    """Negative control: no docstring, and one that says nothing, are found."""
    assert unexplained('def test_a():\n    pass\n\n\ndef test_b():\n    """Sizes."""\n') == ["test_a", "test_b"]


def imported_tests(source: str) -> list[str]:
    """Test modules that ``source`` imports."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module or ''}.{alias.name}" for alias in node.names]
    return [name for name in found if any(part.startswith("test_") for part in name.split("."))]


@pytest.mark.parametrize("path", [*TESTS, *SHARED], ids=name_of)
def test_nothing_imports_a_test(path: Path) -> None:
    """Protects tests from each other: what two of them need stands in tests/support."""
    assert imported_tests(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("line", ["from .test_step import x", "from tests import test_step", "import tests.test_step"])
def test_an_imported_test_is_noticed(line: str) -> None:
    """Negative control: each way to import a test is found."""
    assert imported_tests(line)


# --- names ------------------------------------------------------------------------------------------------------------


def test_modules_of_the_command_line_have_names_of_their_own() -> None:
    """Protects the reader: no module of cli/ is called like one of Python's, or like another of the package."""
    names = Counter(path.stem for path in PACKAGE)
    stems = [path.stem for path in COMMAND_LINE if path.stem != "__init__"]
    assert "signal" in sys.stdlib_module_names  # the list is what it is taken for
    assert [stem for stem in stems if stem in sys.stdlib_module_names or names[stem] > 1] == []


# --- the documents of contributors ------------------------------------------------------------------------------------


def test_the_files_that_contributors_are_sent_to_exist() -> None:
    """Protects who adds a format, a correction or a backend: each file of the lists is there."""
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    files = [name for cell in cells for name in re.findall(r"`([^`<]+)`", cell)]
    assert len(files) > 15  # the lists were found
    assert [name for name in files if not (ROOT / name).is_file()] == []


# --- the package ------------------------------------------------------------------------------------------------------


def test_the_version_stands_in_one_place() -> None:
    """Protects bug reports: the installed package, the library and pyproject.toml cannot name different versions."""
    assert metadata.version("dba-kernels") == dba_kernels.__version__
    assert dba_kernels.__version__ not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_types_are_shipped() -> None:
    """Protects typed users: the marker that makes type checkers read the annotations stands in the package."""
    assert (ROOT / "dba_kernels" / "py.typed").is_file()
