"""The configured linters pass: what a reader's editor would underline is fixed before it is committed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


COMMANDS = [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_linter(command: list[str], tmp_path: Path) -> None:
    """Protects the style: the configured linters and formatter find nothing to change."""
    cache = ["--cache-dir", str(tmp_path)]
    result = subprocess.run([sys.executable, "-m", *command, *cache], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
