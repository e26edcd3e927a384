"""Checkpoints of a fine-tuning run: all it takes to go on to the same bits, whole or not at all."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from .output import InputError, remove_partial, write_whole
from .packing import Batch

KEPT = 2


class Checkpoints:
    """The newest two of a run, as ``step-00000100.pt`` in one folder.

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
        self.folder.mkdir(exist_ok=True)
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
        write_whole(self.folder / f"step-{step:08}.pt", lambda path: torch.save(content, path))
        for file in self.files()[:-KEPT]:
            file.unlink()

    def load(self) -> dict[str, Any] | None:
        """The newest checkpoint that can be read; None where there is none.

        Raises:
            InputError: it belongs to a run with other settings, or none of those there can be read.
        """
        if not self.folder.is_dir():
            return None
        remove_partial(self.folder)
        problem: Exception | None = None
        for file in reversed(self.files()):
            try:
                found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:  # whatever a damaged file makes the unpickler throw
                problem = problem or error
                continue
            check_settings(found["settings"], self.settings, file)
            return found
        if problem is not None:
            raise InputError(
                f"{self.folder}: expected a checkpoint, none can be read ({problem}); start anew elsewhere"
            )
        return None

    def remove(self) -> None:
        """The run is finished."""
        for file in self.files():
            file.unlink()
        if self.folder.is_dir():
            remove_partial(self.folder)
            self.folder.rmdir()


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
