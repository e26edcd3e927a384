"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
from safetensors import SafetensorError

WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What writing to a full disk raises: OSError, but RuntimeError in torch.save, and safetensors' own."""


class InputError(click.ClickException):
    """Something the user gave, or has not installed, cannot be used; the message says what and how to fix it."""


def prepare_folder(folder: Path, expected_bytes: int = 0) -> None:
    """Make ``folder``, and see that ``expected_bytes`` can be written to it.

    Raises:
        InputError: it cannot be made or written to, or its disk has too little room.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
    except OSError as error:
        raise InputError(f"cannot write to {str(folder)!r} ({error.strerror}); choose another --out") from error
    free = shutil.disk_usage(folder).free
    if free < expected_bytes:
        raise InputError(
            f"{str(folder)!r}: expected {expected_bytes / 2**20:,.0f} MiB of free disk space, "
            f"got {free / 2**20:,.0f}; free some or choose another --out"
        )


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in place; if it fails, the old file stays.

    Raises:
        InputError: the file cannot be written.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(scratch)
        with open(scratch, "rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except WRITE_ERRORS as error:
        raise InputError(f"cannot write {str(path)!r}: {_reason(error)}") from error
    finally:
        scratch.unlink(missing_ok=True)


def write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary folder inside ``folder``, then move its files out; ``config.json`` goes last, so
    that a folder with one is a whole model.

    Raises:
        InputError: a file cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as name:
            scratch = Path(name)
            write(scratch)
            written = (file.relative_to(scratch) for file in scratch.rglob("*") if file.is_file())
            files = sorted(written, key=lambda file: (str(file) == "config.json", file))
            for file in files:
                with open(scratch / file, "rb") as opened:
                    os.fsync(opened.fileno())
            for file in files:
                (folder / file).parent.mkdir(exist_ok=True, parents=True)
                os.replace(scratch / file, folder / file)
    except WRITE_ERRORS as error:
        raise InputError(f"cannot write to {str(folder)!r}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return f"{getattr(error, 'strerror', None) or error}; free some space, or choose another place"


def remove_partial(folder: Path) -> None:
    """Remove what a process that was killed while it wrote has left in ``folder``."""
    for leftover in (*folder.glob(".*.partial"), *folder.glob(".partial-*")):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
