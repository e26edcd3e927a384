"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """``folder`` for the block, made where it is not there; a block that fails before it wrote leaves none behind.

    Raises:
        InputError: it cannot be made or written to.
    """
    made: list[Path] = []
    try:
        with suppress(OSError):  # prepare_folder says why
            made = [path for path in (folder, *folder.parents) if not path.exists()]
        prepare_folder(folder)
        yield
    except BaseException:
        for path in made:
            with suppress(OSError):  # not empty: there is something in it to keep
                path.rmdir()
        raise


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in place; if it fails, the old file stays.

    Raises:
        InputError: the file cannot be written.
    """
    replace_by(path, write, lambda _: path)


def replace_by(path: Path, write: Callable[[Path], object], name: Callable[[Path], Path]) -> Path:
    """As :func:`write_whole`, under the name that ``name`` gives the temporary file once it is filled.

    Nobody can have planted a file or a link under the temporary name: it is random and must not exist.
    """
    scratch = path.with_name(f".{path.name[:60]}.{secrets.token_hex(8)}.partial")
    try:
        os.close(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        write(scratch)
        with open(scratch, "rb") as file:
            os.fsync(file.fileno())
        target = name(scratch)
        with suppress(FileNotFoundError):
            os.chmod(scratch, stat.S_IMODE(target.stat().st_mode))
        os.replace(scratch, target)
        return target
    except WRITE_ERRORS as error:
        raise InputError(f"cannot write {str(path)!r}: {reason_of(error)}") from error
    finally:
        with suppress(OSError):
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
        raise InputError(f"cannot write to {str(folder)!r}: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """Why writing failed, and the fix."""
    number = getattr(error, "errno", None)
    full = number is None or number in (errno.ENOSPC, errno.EDQUOT)  # torch and safetensors say no number
    return f"{getattr(error, 'strerror', None) or error}; {'free some space, or ' if full else ''}choose another place"


def remove_partial(folder: Path) -> None:
    """Remove what a process that was killed while it wrote has left in ``folder``."""
    for leftover in (*folder.glob(".*.partial"), *folder.glob(".partial-*")):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
