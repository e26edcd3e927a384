"""What is left behind: the cache is named and can be cleared, kept sums are named, a build leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from dba_kernels.cli import cache_command, models

from .support.cli_inputs import SMALL, run, write_inputs

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model as a ``.gguf`` would have left it in a cache of its own; the folder that holds the inputs too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_inputs(tmp_path)
    target = models.cache_dir() / "models" / "tiny-1-2"
    target.parent.mkdir(parents=True)
    (tmp_path / "model").rename(target)
    return tmp_path


def test_commands_name_what_they_leave_in_the_cache(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the user's disk: plan, collect and finetune say which folder stays, its size and what clears it."""
    target = models.cache_dir() / "models" / "tiny-1-2"
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) / 2**20
    text = ("--data", cached / "general.jsonl")
    for arguments in (
        ("plan", "--model", target),
        ("collect", "--model", target, *text, "--batches", 2, "--out", cached / "g.safetensors", *SMALL),
        ("finetune", "--model", target, *text, "--steps", 1, "--out", cached / "tuned", *SMALL),
    ):
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        assert f"the converted model stays in {target} ({size:,.1f} MiB); dba-kernels cache --clear" in result.output
    assert cache_command.cache_note(str(cached)) is None  # a user's own folder is none of the cache's
    assert "Hugging Face cache" in (cache_command.cache_note("org/name") or "")


def test_collect_names_the_sums_it_keeps(cached: Path) -> None:
    """Protects the user's disk: the snapshot that stays beside the file is named, with how to be rid of it."""
    target, text = models.cache_dir() / "models" / "tiny-1-2", ("--data", cached / "general.jsonl", "--batches", 2)
    kept = run("collect", "--model", target, *text, "--out", cached / "g.safetensors", *SMALL)
    assert f"kept: {cached / 'g.snapshot.safetensors'}" in kept.output and "--drop-snapshot deletes it" in kept.output
    dropped = run("collect", "--model", target, *text, "--out", cached / "g.safetensors", "--drop-snapshot", *SMALL)
    assert "kept:" not in dropped.output and not (cached / "g.snapshot.safetensors").exists()


def test_the_cache_is_listed_and_cleared(cached: Path) -> None:
    """Protects ``cache``: it lists and deletes what lies in the cache and nothing beside it."""
    (cached / "cache" / "other").mkdir()
    assert "tiny-1-2" in run("cache").output
    assert "deleted 1 entries" in run("cache", "--clear").output
    assert "it is empty" in run("cache").output
    assert (cached / "cache" / "other").is_dir() and (cached / "general.jsonl").exists()


def test_a_link_in_the_cache_is_removed_and_not_followed(cached: Path) -> None:
    """Protects other folders: a link in the cache goes, what it points to stays."""
    (models.cache_dir() / "models" / "link").symlink_to(cached / "held-out.txt")
    (models.cache_dir() / "folder").symlink_to(cached, target_is_directory=True)
    assert run("cache", "--clear").exit_code == 0
    assert (cached / "held-out.txt").exists() and not (models.cache_dir() / "folder").is_symlink()


def test_a_build_leaves_nothing_and_the_package_says_what_it_is() -> None:
    """Protects a checkout that is installed from: no build folder in it; and type checkers see the types."""
    project = (ROOT / "pyproject.toml").read_text()
    assert "build-dir" not in project  # scikit-build-core then takes a temporary folder
    assert '"Typing :: Typed"' in project and (ROOT / "dba_kernels" / "py.typed").is_file()
    assert all(f'"Programming Language :: Python :: 3.{minor}"' in project for minor in (10, 11, 12, 13))
