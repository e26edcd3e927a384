"""The running sums of a collection: what is added to, shared between ranks, kept in snapshots, divided at last."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist

from . import ops
from .curvature import CurvatureSums
from .descriptions import COUNT, SHA256, Check, check_fields, read
from .distributed import Sharding, all_reduce_, gather, local, world_size
from .formats import SQUARED_NORM_LIMIT
from .records import TensorStatistics, squared_norm
from .tensor_files import SavedTensors, as_bytes, save_tensors

KIND = "collection snapshot"
FORMAT_VERSION = 1
PROGRESS: dict[str, Check] = dict.fromkeys(("consumed", "batches", "tokens", "dropped", "empty"), COUNT) | {
    "data_digest": ((lambda value: isinstance(value, str)), "a text")
}


@dataclass
class Progress:
    """Counts of micro-batches, fields as in ``Provenance``, and the chained digest of what was consumed."""

    consumed: int = 0
    batches: int = 0
    tokens: int = 0
    dropped: int = 0
    empty: int = 0
    data_digest: str = ""

    def counts(self) -> tuple[int, ...]:
        return astuple(self)[:-1]


def _usable(grad: torch.Tensor) -> torch.Tensor:
    """Whether :func:`ops.accumulate` would add it: finite and of no enormous norm."""
    norm_sq: torch.Tensor = torch.linalg.vector_norm(grad, dtype=torch.float64).square()
    return norm_sq <= SQUARED_NORM_LIMIT


class GradientSums:
    """Σ w_i g_i of every tensor in fp32 (fp64 for fp64 parameters), and the scalars that go with it.

    Of parameters cut by rows, each rank sums the rows that it has.

    Args:
        params: what gradients belong to, by name.
        curvature: the sums of the second order that the same pass feeds; shared, kept and loaded along.
    """

    def __init__(self, params: Mapping[str, torch.Tensor], curvature: CurvatureSums | None = None) -> None:
        self.curvature = curvature
        self.names = list(params)
        self.params = list(params.values())
        self.sharding = Sharding(params.items())
        self.totals = [
            torch.zeros(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
            for p in map(local, self.params)
        ]
        self._caches: list[dict[str, Any]] = [{} for _ in self.totals]
        # Per tensor: Σw, Σw², Σw²‖g‖² (of the rows here), and how many gradients were dropped, not being finite.
        self.scalars = torch.zeros(len(params), 4, dtype=torch.float64, device="cpu")
        self.progress = Progress()
        # ‖g‖² of the micro-batch at hand, one vector per device so that nothing synchronises before commit().
        self._squared = {t.device: self.scalars.new_zeros(len(params), device=t.device) for t in self.totals}

    def add(self, index: int, grad: torch.Tensor, weight: float) -> None:
        """Add one tensor's gradient of the micro-batch at hand; a non-finite one adds nothing."""
        total = self.totals[index]
        grad = grad.to_dense() if grad.is_sparse else grad.contiguous()
        norm = self._squared[total.device][index : index + 1]
        ops.accumulate([total], [grad], weight, norm, cache=self._caches[index])
        if self.curvature is not None:
            self.curvature.add_grad(self.names[index], grad)

    def add_rows(self, grads: list[torch.Tensor | None], weight: float) -> None:
        """Add and commit a whole micro-batch, of every gradient the rows that are here (None: zero).

        What is not finite on one rank adds nothing on any, hence nothing is added before all is known.
        """
        bad = torch.stack([self.totals[0].new_zeros(()) if g is None else (~_usable(g)).float() for g in grads])
        dropped = (self.sharding.sum_(bad) > 0).cpu()
        for index, (grad, drop) in enumerate(zip(grads, dropped.tolist(), strict=True)):
            if grad is not None and not drop:
                self.add(index, grad, weight)
        self.commit(weight, dropped)

    def commit(self, weight: float, dropped: torch.Tensor | bool = False) -> None:
        """The micro-batch is complete: count its weight, except for tensors whose gradient was not finite."""
        norms = torch.stack([squared.cpu() for squared in self._squared.values()]).sum(dim=0)
        finite = torch.isfinite(norms) & ~torch.as_tensor(dropped, device="cpu")
        norms = norms.where(finite, 0.0)
        self.scalars += torch.stack((finite * weight, finite * weight**2, norms * weight**2, ~finite), dim=1)
        for squared in self._squared.values():
            squared.zero_()

    def reduce(self, group: dist.ProcessGroup | None) -> None:
        """Sum over the ranks of ``group``; afterwards all ranks hold the same."""
        if world_size(group) == 1:
            return
        for total in self.totals:
            all_reduce_(total, group)
        device, counts = self.totals[0].device, self.progress.counts()
        shared = torch.tensor([*counts, *self._digest_numbers()], dtype=torch.int64, device=device)
        totals = all_reduce_(shared, group).tolist()
        self.progress = Progress(*totals[: len(counts)])
        self.progress.data_digest = _digest_of(totals[len(counts) :])
        self.scalars = all_reduce_(self.scalars.to(device), group).cpu()
        if self.curvature is not None:
            self.curvature.reduce(group)

    def reduce_rows(self) -> None:
        """Of parameters cut by rows: the norms of whole gradients, and one digest of what all ranks have seen.

        Weights and counts are those of whole micro-batches already.
        """
        device = self.totals[0].device
        self.scalars[:, 2] = self.sharding.sum_(self.scalars[:, 2].contiguous().to(device)).cpu()
        seen = torch.tensor(self._digest_numbers(), dtype=torch.int64, device=device)
        self.progress.data_digest = _digest_of(self.sharding.over_mesh_(seen).tolist())

    def _digest_numbers(self) -> list[int]:
        """The data's digest as numbers that ranks may add up."""
        return list(hashlib.sha256(self.progress.data_digest.encode()).digest())

    def check_complete(self) -> None:
        """Refuse a mean over nothing.

        Raises:
            ValueError: no micro-batch, or none with a finite gradient for some tensor.
        """
        progress = self.progress
        if progress.batches == 0:
            raise ValueError(
                f"batches: expected at least one with target tokens and a finite loss, got {progress.consumed}: "
                f"{progress.empty} empty, {progress.dropped} not finite; check the data and the loss function"
            )
        for name, weight in zip(self.names, self.scalars[:, 0].tolist(), strict=True):
            if weight == 0:
                raise ValueError(f"parameter {name!r}: expected a finite gradient, got none; freeze it or fix the loss")

    def warn_dropped(self) -> None:
        """Say what was left out for not being finite."""
        progress, dropped = self.progress, self.scalars[:, 3]
        if progress.dropped == 0 and not dropped.any():
            return
        worst = self.names[int(dropped.argmax())]
        where = f" (most often {worst!r}: {int(dropped.max())} times)" if dropped.any() else ""
        warnings.warn(
            f"global gradient: left out {progress.dropped} of {progress.consumed} micro-batches with a non-finite loss "
            f"and the non-finite gradients of {int((dropped > 0).sum())} tensors{where}",
            stacklevel=4,
        )

    def means(self, statistics: dict[str, TensorStatistics]) -> Iterator[tuple[str, torch.Tensor]]:
        """Divide by the weights (eq. 1), one tensor at a time, each sum given up as it is taken.

        Of parameters cut by rows one is gathered at a time: all ranks must exhaust the iterator, and the mesh's first
        alone is given the means, on the CPU.

        Args:
            statistics: receives each tensor's entry before the tensor is yielded.
        """
        for name, param, scalars in zip(self.names, self.params, self.scalars.tolist(), strict=True):
            weight, weight_sq, norms, dropped = scalars
            mean = self.totals.pop(0).div_(weight)
            if self.sharding.mesh is not None:
                mean = gather(param, mean)
                if not self.sharding.first:
                    continue
                mean = mean.cpu()
            signal, noise = signal_and_noise(squared_norm(mean), weight, weight_sq, norms)
            statistics[name] = TensorStatistics(signal, noise, int(dropped))
            yield name, mean

    # --- snapshots ----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], identity: dict[str, Any]) -> None:
        """Write everything, whole or not at all.

        Args:
            path: ends in ``.safetensors``.
            identity: what must be equal for the snapshot to be continued.

        Raises:
            OSError: it cannot be written; the older snapshot is intact.
        """
        tensors = self._tensors()
        digests = {key: _sha256(tensor) for key, tensor in tensors.items()}
        content = {"progress": asdict(self.progress), "digests": digests}
        save_tensors(path, tensors, self._header(identity) | content)

    def load(self, path: str | os.PathLike[str], identity: dict[str, Any]) -> None:
        """Inverse of :meth:`save`.

        Raises:
            ValueError: corrupt, or of another collection.
        """
        saved, own = SavedTensors(path), self._tensors()
        version = saved.content.get("format_version")
        if saved.content.get("kind") == KIND and version != FORMAT_VERSION:
            raise ValueError(
                f"{path}: expected format version {FORMAT_VERSION} of a {KIND}, got {version}; go on with the version "
                "of this library that wrote it, or delete it"
            )
        for key, want in self._header(identity).items():
            if key != "settings" and saved.content.get(key) != want:
                raise ValueError(
                    f"{path}: expected a snapshot of this collection, got another {key.replace('_', ' ')}"
                    f"{_difference(saved.content.get(key), want)}; delete it, or choose another snapshot_path"
                )
        known = saved.content.get("settings")
        for name, want in identity.get("settings", {}).items():
            got = known.get(name, want) if isinstance(known, dict) else want  # an older snapshot says nothing
            if got != want:
                raise ValueError(
                    f"{path}: expected a snapshot with {name} {want}, got {got}; go on as the collection began, or "
                    "delete the snapshot"
                )
        progress = read(Progress, f"{path}: progress", saved.content.get("progress"), PROGRESS)
        digests = check_fields(f"{path}: digests", saved.content.get("digests"), dict.fromkeys(own, SHA256))
        saved.check_layout({key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in own.items()})
        for key, tensor in own.items():
            found = saved[key]
            if _sha256(found) != digests[key]:
                raise ValueError(f"{path}: the sum {key!r} is corrupt; delete the snapshot and start again")
            tensor.copy_(found)
        self.progress = progress

    def _header(self, identity: dict[str, Any]) -> dict[str, Any]:
        return {"kind": KIND, "format_version": FORMAT_VERSION, "parameters": self.names, **identity}

    def _tensors(self) -> dict[str, torch.Tensor]:
        own = {f"{n}/total": t for n, t in zip(self.names, self.totals, strict=True)} | {"/scalars": self.scalars}
        return own | ({} if self.curvature is None else self.curvature.tensors())


def _difference(got: Any, want: Any) -> str:
    """What differs between two lists of names, of data and how they were read."""
    if not isinstance(got, list) or not isinstance(want, list):
        return ""
    ours, theirs = ([str(name) for name in a if name not in b] for a, b in ((want, got), (got, want)))
    if len(ours) + len(theirs) not in range(1, 20):  # their order, or thousands of parameters
        return ""
    return f" ({', '.join(theirs) or 'nothing'} in place of {', '.join(ours) or 'nothing'})"


def _digest_of(numbers: list[int]) -> str:
    return hashlib.sha256(repr(numbers).encode()).hexdigest()


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(as_bytes(tensor)).hexdigest()


def signal_and_noise(
    mean_sq: float, weight: float, weight_sq: float, weighted_norms: float
) -> tuple[float | None, float | None]:
    """Unbiased estimates of ‖μ‖² and of E‖ĝ_G − μ‖², from one scalar per micro-batch.

    Micro-batch i has the gradient g_i = μ + ε_i, with independent ε_i of mean 0 and any E‖ε_i‖² = v_i, and
    ĝ = Σ w_i g_i / W. With W = Σ w_i, W₂ = Σ w_i² and Q = Σ w_i² ‖g_i‖²::

        W² ‖ĝ‖² − Q = Σ_{i≠j} w_i w_j ⟨g_i, g_j⟩,   whose expectation is (W² − W₂) ‖μ‖²

    so ``signal`` = (W² ‖ĝ‖² − Q) / (W² − W₂) is unbiased whatever the v_i, and so is ``noise`` = ‖ĝ‖² − ``signal``,
    because E‖ĝ‖² = ‖μ‖² + E‖ĝ − μ‖². Either may come out negative where it is small.

    Two random halves of the data have mean gradients of inner product ‖μ‖² and, with half the data each, of squared
    norm ‖μ‖² + 2·noise: their expected cosine is signal / (signal + 2·noise), to first order.

    Args:
        mean_sq: ‖ĝ‖².
        weight, weight_sq, weighted_norms: W, W₂, Q.

    Returns:
        signal and noise; None for both with fewer than two micro-batches.
    """
    pairs = weight**2 - weight_sq
    if pairs <= 1e-12 * weight**2:
        return None, None
    noise = (weighted_norms - weight_sq * mean_sq) / pairs
    return mean_sq - noise, noise
