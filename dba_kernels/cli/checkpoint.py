"""Checkpoints of a fine-tuning run: all it takes to go on to the same bits, whole or not at all."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .output import InputError, reason_of, remove_partial, replace_by
from .packing import Batch

KEPT = 2
FOLDER = "checkpoints"
PARTS = frozenset(("settings", "step", "model", "optimizer", "scheduler", "random", "random_cuda", "data_digest"))


def has_checkpoints(out: Path) -> bool:
    """Whether a run in this folder can be gone on with."""
    return any((out / FOLDER).glob("step-*.pt"))


class Checkpoints:
    """The newest two of a run, as ``step-00000100-DIGEST.pt`` in one folder, DIGEST the start of the file's SHA-256.

    Args:
        folder: made when the first is saved.
        settings: what must be equal for a run to go on; compared on the way in.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings

    def files(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob("step-*.pt"))

    def save(
        self,
        step: int,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        data_digest: str,
    ) -> None:
        """Write the state after ``step`` steps on the batches of ``data_digest``; then drop all but the newest two.

        Raises:
            InputError: it cannot be written; older ones are intact.
        """
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write {str(self.folder)!r}: {reason_of(error)}") from error
        content = {
            "settings": self.settings,
            "step": step,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "data_digest": data_digest,
        }
        stem = f"step-{step:08}"
        written = replace_by(
            self.folder / f"{stem}.pt",
            lambda path: torch.save(content, path),
            lambda path: self.folder / f"{stem}-{_digest_of(path)}.pt",
        )
        older = [file for file in self.files() if file.name < stem]
        # Later ones are damaged: it was gone back behind them.
        remove([file for file in self.files() if file not in (written, *older[1 - KEPT :])])

    def load(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest checkpoint that is whole, None where there is none; and what was passed over, for the user.

        Raises:
            InputError: it belongs to a run with other settings, or none of those there can be read.
        """
        if not self.folder.is_dir():
            return None, []
        remove_partial(self.folder)
        damaged: list[str] = []
        for file in reversed(self.files()):
            found = _read(file)
            if isinstance(found, str):
                damaged.append(f"{file}: expected a whole checkpoint, {found}")
                continue
            check_settings(found["settings"], self.settings, file)
            return found, damaged
        if damaged:
            raise InputError(f"{'; '.join(damaged)}; no other is left: start anew with another --out")
        return None, []

    def remove(self) -> None:
        """The run is finished."""
        remove(self.files())
        if self.folder.is_dir():
            remove_partial(self.folder)
            with suppress(OSError):  # what is not ours stays
                self.folder.rmdir()


def _read(file: Path) -> dict[str, Any] | str:
    """A checkpoint, or why it is none."""
    if not file.is_file():
        return "it is no regular file"
    try:
        digest = _digest_of(file)
        if not file.stem.endswith(f"-{digest}"):
            return f"it is damaged: its digest is {digest}, not that of its name"
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file of another kind makes the unpickler throw
        return f"it cannot be read ({error})"
    return found if isinstance(found, dict) and found.keys() == PARTS else "it is of another kind"


def _digest_of(file: Path) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a file's bytes."""
    sha = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()[:16]


def remove(files: list[Path]) -> None:
    """Remove those that can be."""
    for file in files:
        with suppress(OSError):
            file.unlink()


def check_settings(saved: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """Refuse to go on with other settings.

    Raises:
        InputError: naming each that differs.
    """
    changed = [f"--{k.replace('_', '-')} {saved.get(k)!r}, got {now[k]!r}" for k in now if saved.get(k) != now[k]]
    if changed:
        raise InputError(
            f"{where}: expected {'; '.join(changed)}; give the settings that the run was started with, or another --out"
        )


def extend_digest(digest: str, batch: Batch) -> str:
    """SHA-256 over the digest of the batches before, and what the model sees of this one."""
    sha = hashlib.sha256(digest.encode())
    for key in sorted(batch):
        sha.update(batch[key].contiguous().numpy().data)
    return sha.hexdigest()
