"""The configured linters pass: what a reader's editor would underline is fixed before it is committed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import clang_format
import pytest

ROOT = Path(__file__).resolve().parent.parent


COMMANDS = [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_linter(command: list[str], tmp_path: Path) -> None:
    """Protects the style: the configured linters and formatter find nothing to change."""
    cache = ["--cache-dir", str(tmp_path)]
    result = subprocess.run([sys.executable, "-m", *command, *cache], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_formatter_of_the_native_code_changes_nothing() -> None:
    """Protects csrc/ the same way; a second space is noticed."""
    formatter = [clang_format.get_executable("clang-format"), "--dry-run", "--Werror", "--style=file"]
    sources = [str(path) for pattern in ("*.h", "*.cpp") for path in sorted((ROOT / "csrc").glob(pattern))]
    assert len(sources) > 20
    result = subprocess.run([*formatter, *sources], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    odd = subprocess.run(formatter, cwd=ROOT / "csrc", input="int  x;\n", capture_output=True, text=True)
    assert odd.returncode != 0 and "should be clang-formatted" in odd.stderr
