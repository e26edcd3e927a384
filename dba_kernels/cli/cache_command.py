"""``dba-kernels cache``: what this program keeps in the user's cache, and how to be rid of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import click
from rich.console import Console

from .grids import Grid
from .models import cache_dir
from .output import InputError

CLEAR = "dba-kernels cache --clear"


@click.command("cache")
@click.option("--clear", is_flag=True, help="Delete all of it; what is needed again is made again.")
def command(clear: bool) -> None:
    """List what was kept in the cache (.gguf models as they were converted), or delete it.

    Models that came from a hub id lie in the Hugging Face cache, which `hf cache` lists and clears.
    """
    console, folder = Console(), cache_dir()
    console.print(f"folder: {folder}", soft_wrap=True)
    found = entries(folder)
    if not found:
        console.print("it is empty")
        return
    if clear:
        for path in found:
            try:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            except OSError as error:
                raise InputError(f"cannot delete {str(path)!r}: {error.strerror}; delete it yourself") from error
        console.print(f"deleted {len(found)} entries, {sum(found.values()) / 2**20:,.1f} MiB")
        return
    table = Grid(f"{sum(found.values()) / 2**20:,.1f} MiB; {CLEAR} deletes it", ("entry",), ("MiB",))
    for path, size in found.items():
        table.add(str(path.relative_to(folder)), f"{size / 2**20:,.1f}")
    table.show(console)


def entries(folder: Path) -> dict[Path, int]:
    """What lies in the cache, each converted model apart, with its bytes."""
    models = folder / "models"
    tops = [path for path in sorted(folder.glob("*")) if path != models]
    return {path: _size(path) for path in (*tops, *sorted(models.glob("*")))}


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file() or file.is_symlink())


def cache_note(source: str) -> str | None:
    """What reading a model from ``source`` left in a cache, and how to clear it; None where it left nothing."""
    path = Path(source)
    if path.is_relative_to(cache_dir()):
        return f"cache    the converted model stays in {path} ({_size(path) / 2**20:,.1f} MiB); {CLEAR} deletes it"
    if not path.exists():
        return "cache    the model stays in the Hugging Face cache; `hf cache` lists and clears it"
    return None
