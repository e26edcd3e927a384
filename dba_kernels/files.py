"""Files that exist whole or not at all, however many processes write them and whenever one is killed."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import secrets
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

LONGEST_NAME = 100
"""Bytes of a file's name that its temporary one repeats; beyond, file systems might have no room for the rest."""


@contextmanager
def atomic_writer(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file that replaces ``path`` when the block ends without an exception, and leaves no trace otherwise.

    Written beside ``path`` (a rename is atomic only within a file system), fsynced, renamed, the folder fsynced. A file
    that is replaced hands on its mode. A link at ``path`` is replaced itself; what it points to is not touched.

    Raises:
        OSError: naming ``path``, the cause and the fix; the old file is intact.
    """
    path = Path(path)
    with writing(path):
        with beside(path) as (temporary, file):
            yield file
        put_in_place(temporary, path)
        sync_folder(path.parent)


def try_to_write(path: str | os.PathLike[str]) -> None:
    """Find out, before the long part, whether :func:`atomic_writer` could begin; leaves nothing.

    Raises:
        OSError: it could not.
    """
    path = Path(path)
    with writing(path):
        if path.is_dir():
            raise OSError(errno.EISDIR, "a folder has that name")
        with beside(path) as (temporary, _):
            pass
        remove([temporary])


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name ``path`` in every error of the system."""
    try:
        yield
    except OSError as error:
        reason, fix = error.strerror or str(error), "choose a folder that exists, is writable and has room"
        raise OSError(error.errno, f"cannot write {path}: {reason}; an older file is untouched; {fix}") from error


@contextmanager
def beside(path: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """A new file for what is to replace ``path``: (its name, itself); synced at the end, removed after an exception.

    Nobody can have planted a file or a link under its name: it is random and must not exist. It also carries host and
    process: what a killed process left behind is removed by the next write to ``path``.
    """
    _remove_stale(path)
    temporary = path.with_name(f"{_prefix(path)}{os.getpid()}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        with open(descriptor, "wb") as file:
            _hand_on_mode(path, file)
            yield temporary, file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        remove([temporary])
        raise


def put_in_place(temporary: Path, path: Path) -> None:
    """The rename that makes it count."""
    try:
        os.replace(temporary, path)
    except BaseException:
        remove([temporary])
        raise


def _hand_on_mode(path: Path, file: IO[bytes]) -> None:
    """Give ``file`` owner and mode of the regular file that it will replace, as far as the system lets us."""
    with suppress(FileNotFoundError):
        old = os.lstat(path)
        if stat.S_ISREG(old.st_mode) and hasattr(os, "fchmod"):
            with suppress(OSError):
                os.fchown(file.fileno(), old.st_uid, old.st_gid)
            os.fchmod(file.fileno(), stat.S_IMODE(old.st_mode) & 0o777)


def _prefix(path: Path) -> str:
    """What the names of this host's temporary files for ``path`` begin with."""
    name = path.name
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return f".{name}.{socket.gethostname()}."


def _remove_stale(path: Path) -> None:
    """Remove temporary files of ``path`` whose process, on this host, is gone."""
    prefix = _prefix(path)
    rest = re.compile(r"(\d+)(\.[0-9a-f]{16})?\.tmp")  # without the random part: an older version's
    for leftover in path.parent.glob(f"{glob.escape(prefix)}*.tmp"):
        match = rest.fullmatch(leftover.name[len(prefix) :])
        if match and not _alive(int(match[1])):
            remove([leftover])


def _alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # elsewhere, os.kill(pid, 0) does not merely ask
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system lets a folder be opened."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(files: list[Path]) -> None:
    for file in files:
        with suppress(OSError):
            file.unlink()


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """One writer at a time: sets of several files are exchanged under it. It is short, and a dead process lets go.

    The folder itself is locked, so nothing is left in it. Where a system has no such locks, nobody waits.
    """
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        with suppress(OSError):  # a network file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked child may hold the descriptor still
        os.close(descriptor)


def no_such_file(path: Path) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "no such file", str(path.absolute()))
