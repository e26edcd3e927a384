"""Snapshots of a running collection: which files, when, and where to go on from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from .distributed import Sharding
from .formats import check_integer, check_path
from .sums import GradientSums
from .tensor_files import SavedTensors, check_name_of_file


class Snapshots:
    """Keeps the sums in a file, or, of a sharded model, in two files per rank by turns.

    Two, because ranks are not killed at the same instant: one may have written its newest snapshot when another has
    not. Ranks never are more than one snapshot apart (each micro-batch takes all of them), so of the newest two all
    have one in common.

    Args:
        path: the file; None to keep none. Of a sharded model, the files are named after it and the rank.
        every: micro-batches between snapshots.
        identity: what must be equal for a snapshot to continue this collection.
        sharding: of the model.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, every: int, identity: dict[str, Any], sharding: Sharding
    ) -> None:
        check_integer("snapshot_every", every, 1)
        if path is not None:
            check_path("snapshot_path", path)
            check_name_of_file(path, "snapshot_path")  # not when the first is due
        self.path = None if path is None else Path(path)
        self.every = every
        self.sharding = sharding
        self.identity = identity
        self._kept: Path | None = None  # written last, or gone on from: the next is another, where there are two
        self._consumed = 0  # micro-batches in that one
        self.files = [] if self.path is None else [self.path]
        if self.path is not None and sharding.mesh is not None:
            self.identity = identity | {"rows": [list(rows or ()) for rows in sharding.rows]}
            place = "-".join(map(str, sharding.mesh.get_coordinate()))
            stem = f"{self.path.stem}.rank{place}-of-{sharding.mesh.size()}"
            self.files = [self.path.with_name(f"{stem}.{turn}{self.path.suffix}") for turn in "ab"]

    def due(self, sums: GradientSums) -> bool:
        """Whether the count of micro-batches asks for a snapshot."""
        return bool(self.files) and sums.progress.consumed % self.every == 0

    def save(self, sums: GradientSums) -> None:
        """Write ``sums``."""
        file = next((file for file in self.files if file != self._kept), self.files[0])
        sums.save(file, self.identity)
        self._kept, self._consumed = file, sums.progress.consumed

    def save_rest(self, sums: GradientSums) -> None:
        """Write ``sums`` if they hold more than the last snapshot, whatever their count: the pass has ended."""
        if self.files and sums.progress.consumed > self._consumed:
            self.save(sums)

    def resume(self, sums: GradientSums) -> None:
        """Load the newest snapshot, of a sharded model the newest that all ranks have, if there is one.

        Raises:
            ValueError: corrupt, or of another collection.
            RuntimeError: that of another rank is; with its message.
        """
        there = [file for file in self.files if file.exists()]
        if self.sharding.mesh is None or not self.files:
            for file in there:
                sums.load(file, self.identity)
            self._consumed = sums.progress.consumed
            return
        found = self.sharding.together(lambda: {_consumed_in(file): file for file in there})
        mine = torch.tensor(max(found, default=0), device=self.sharding.mesh.device_type)
        newest = int(self.sharding.over_mesh_(mine, smallest=True))
        if newest > 0:
            self.sharding.together(lambda: self._load(sums, newest, found))

    def _load(self, sums: GradientSums, newest: int, found: dict[int, Path]) -> None:
        """The snapshot of this rank that all others have, too."""
        if newest not in found:
            raise ValueError(
                f"{self.files[0]}: expected a snapshot of {newest} micro-batches, which is the newest of another rank, "
                f"got those of {sorted(found)}; delete the snapshots of all ranks"
            )
        self._kept = found[newest]
        sums.load(self._kept, self.identity)
        self._consumed = newest


def _consumed_in(file: Path) -> int:
    """Micro-batches in a snapshot."""
    progress = SavedTensors(file).content.get("progress")
    return int(progress.get("consumed", 0)) if isinstance(progress, dict) else 0
