"""The stored artifact of stage 1: the global gradient ĝ_G, compressed, described, and verified when it is read."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import curvature_records, ops
from .backends import implementation
from .base_model import Fingerprint, check_names, check_weights, fingerprint, named_once, normalize_name
from .contracts import check_tensor
from .curvature_records import CurvatureRecord
from .factors import Curvature
from .formats import (
    STORAGE_FORMATS,
    EncodedTensor,
    StoredTensor,
    check_integer,
    check_iterable,
    check_name,
    check_path,
    check_type,
)
from .gradient_file import CURVATURE_VERSION, FORMAT_VERSION, KIND, Provenance, described
from .records import TensorRecord, TensorStatistics, assemble, check_rank, compress, layout, parts, verify
from .tensor_files import SavedTensors, save_tensors, text_digest, to_json

__all__ = ["GlobalGradient", "Provenance", "TensorRecord", "TensorStatistics", "fingerprint", "normalize_name"]


def shrinkage(record: TensorRecord) -> float:
    """s of eq. 13 for one tensor; see ``reference.anchor.shrinkage``."""
    return float(implementation("reference", "anchor").shrinkage(record.signal, record.noise))


class GlobalGradient(Mapping[str, torch.Tensor]):
    """ĝ_G of every parameter, by name; ``gg[name]`` is the decoded fp32 tensor.

    Made by :meth:`from_tensors`, :meth:`load` or ``collect_global_gradient``. Names are those of the bare model
    (:func:`normalize_name`), on the way in and on look-up. Stored tensors must not be written to.

    It may also hold the curvature of the general loss (:meth:`curvature`), with or without ĝ_G, and its ``calibration``
    κ: true rise of the general loss over the predicted one, along Adam's steps; None where nobody measured it.

    Example:
        >>> gg = GlobalGradient.from_tensors({"weight": torch.ones(64, 64)})
        >>> gg["weight"].dtype, gg.records["weight"].format, gg.global_sq("weight")
        (torch.float32, 'int8', 4096.0)
    """

    def __init__(
        self,
        records: dict[str, TensorRecord],
        fingerprint: Fingerprint,
        provenance: Provenance,
        library_version: str,
        *,
        stored: dict[str, StoredTensor] | None = None,
        saved: SavedTensors | None = None,
        curvature_records: dict[str, CurvatureRecord] | None = None,
        curvatures: dict[str, Curvature] | None = None,
        calibration: float | None = None,
    ) -> None:
        self.records = records
        self.fingerprint = fingerprint
        self.provenance = provenance
        self.library_version = library_version
        self._stored = stored or {}  # verified
        self._saved = saved
        self.curvature_records = curvature_records or {}
        self._curvatures = curvatures or {}  # verified
        self.calibration = calibration

    # --- mapping ------------------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self.stored(name)
        decoded = ops.decode(stored)
        aliased = isinstance(stored, EncodedTensor) and decoded.data_ptr() == stored.codes.data_ptr()
        return decoded.clone() if aliased else decoded

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and normalize_name(name) in self.records

    def __repr__(self) -> str:
        numel = sum(math.prod(r.shape) for r in self.records.values())
        return f"GlobalGradient({len(self)} tensors, {numel} elements, {self.nbytes} bytes, path={self.path})"

    @property
    def path(self) -> Path | None:
        """The file that this was loaded from (the index of a sharded one), or None."""
        return self._saved.path if self._saved else None

    @property
    def names(self) -> list[str]:
        return list(self.records)

    # --- what is stored -----------------------------------------------------------------------------------------------

    def record(self, name: str) -> TensorRecord:
        """The record of one tensor.

        Raises:
            KeyError: no such tensor.
        """
        bare = normalize_name(name)
        if bare not in self.records:
            raise KeyError(f"global gradient: expected one of {len(self)} stored names, got {name!r}")
        return self.records[bare]

    def stored(self, name: str, rows: tuple[int, int] | None = None) -> StoredTensor:
        """The compressed tensor, on the CPU unless it was made elsewhere; its digest is verified on first access.

        Args:
            rows: (start, stop) of dimension 0, for a row shard; a view.

        Raises:
            KeyError: no such tensor.
            ValueError: the file's content is not what was written.
        """
        record, name = self.record(name), normalize_name(name)
        if name not in self._stored:
            assert self._saved is not None  # a tensor that no file holds is in memory from the start
            found = assemble(record, {part: self._saved[f"{name}/{part}"] for part in layout(record)})
            verify(name, record, found, self.path)
            self._stored[name] = found
        found = self._stored[name]
        return found if rows is None else found.row_slice(*rows)

    def global_sq(self, name: str) -> float:
        """‖ĝ_G‖² of what is stored for one tensor."""
        return self.record(name).squared_norm

    def curvature(self, name: str, rows: tuple[int, int] | None = None) -> Curvature | None:
        """H of one parameter, factors as they are stored; None where none was collected.

        Args:
            rows: (start, stop) of dimension 0, for a row shard.

        Raises:
            ValueError: the file's content is not what was written.
        """
        name = normalize_name(name)
        record = self.curvature_records.get(name)
        if record is None:
            return None
        if name not in self._curvatures:
            assert self._saved is not None  # what no file holds is in memory from the start
            found = record.assemble({part: self._saved[f"{name}/{part}"] for part in record.layout()})
            curvature_records.verify(name, record, found, self.path)
            self._curvatures[name] = found
        whole = self._curvatures[name]
        return whole if rows is None else whole.rows(*rows)

    @property
    def digest(self) -> str:
        """SHA-256 over names, formats and tensor digests: equal exactly where what is stored is."""
        content: dict[str, Any] = {n: (r.shape, r.format, r.rank, r.digest) for n, r in self.records.items()}
        content |= {f"{name}/curvature": record.digest for name, record in self.curvature_records.items()}
        return text_digest(to_json(content))

    @property
    def nbytes(self) -> int:
        """Bytes of all codes, scales and factors, of the gradient and of the curvature."""
        return self.curvature_nbytes + sum(
            dtype.itemsize * math.prod(shape)
            for record in self.records.values()
            for dtype, shape in layout(record).values()
        )

    @property
    def curvature_nbytes(self) -> int:
        """Bytes of the curvature's factors and diagonals."""
        return sum(record.nbytes for record in self.curvature_records.values())

    @property
    def signal_to_noise(self) -> float | None:
        """Σ signal / Σ noise over the tensors where both are known; None where none is, or without any noise."""
        known = [(r.signal, r.noise) for r in self.records.values() if r.signal is not None and r.noise is not None]
        noise = sum(n for _, n in known)
        return sum(s for s, _ in known) / noise if noise > 0 else None

    def verify(self) -> None:
        """Read every tensor and check its digest.

        Raises:
            ValueError: naming the first tensor whose content is not what was written.
        """
        for name in self.records:
            self.stored(name)
        for name in self.curvature_records:
            self.curvature(name)

    def check_model(
        self,
        named_params: Iterable[tuple[str, torch.Tensor]],
        weights: bool = True,
        *,
        missing: str = "error",
        extra: str = "error",
    ) -> None:
        """Refuse a model that this gradient was not collected on.

        Args:
            named_params: ``model.named_parameters()``.
            weights: also compare sampled weights. False for a resumed run, whose weights have moved.
            missing: ``"ignore"`` lets trainable parameters lack a global gradient.
            extra: ``"ignore"`` lets stored tensors lack a parameter.

        Raises:
            ValueError: a missing or extra name, a wrong shape, or different weights.
        """
        for kind, choice in (("missing", missing), ("extra", extra)):
            check_name(kind, choice, ("error", "ignore"))
        params = named_once(named_params)
        known = {name: record.shape for name, record in self.curvature_records.items()}
        check_names(known | {name: record.shape for name, record in self.records.items()}, params, missing, extra)
        if weights:
            check_weights(self.fingerprint, params)

    # --- making -------------------------------------------------------------------------------------------------------

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
        format: str = "int8",
        rank: int | None = None,
        *,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        fingerprint: Fingerprint | None = None,
        provenance: Provenance | None = None,
        statistics: Mapping[str, TensorStatistics] | None = None,
        curvatures: Mapping[str, tuple[tuple[int, ...], Curvature]] | None = None,
    ) -> GlobalGradient:
        """Compress exact mean gradients.

        1-D and tiny tensors stay fp32. With ``rank``, a matrix becomes U, σ, V of that rank (factors in ``format``)
        where this is smaller, r < m·n / (m + n); else it is stored dense.

        Args:
            tensors: fp32 (or any floating point) means, finite. Pairs may come from a generator that frees each
                tensor after it was yielded; then give ``shapes`` if ``rank`` is set.
            format: a name in ``STORAGE_FORMATS``.
            rank: r ≥ 1, or None for dense tensors.
            shapes: the tensors' shapes, where ``tensors`` is an iterator.
            fingerprint: of the base model, from :func:`fingerprint`; without one only names and shapes are checked.
            provenance: where the tensors come from.
            statistics: per tensor, signal and noise.
            curvatures: per parameter, its shape and its curvature, factors encoded already.

        Raises:
            ValueError: unknown format, NaN or Inf, a dtype that is not floating point, two tensors of one name,
                or a rank that no matrix can use.
        """
        check_name("format", format, STORAGE_FORMATS)
        check_iterable("tensors", tensors, "a mapping, or pairs, of names and tensors")
        if isinstance(tensors, Mapping):
            for name, tensor in tensors.items():
                check_type(f"tensors[{name!r}]", tensor, torch.Tensor)
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            tensors = tensors.items()
        if rank is not None:
            check_rank(rank, shapes or {})
        records: dict[str, TensorRecord] = {}
        stored: dict[str, StoredTensor] = {}
        for pair in tensors:
            full_name, tensor = _checked_pair(pair)
            name = normalize_name(full_name)
            if name in records:
                raise ValueError(f"tensor {full_name!r}: expected unique names, got a second {name!r}; rename one")
            known = (statistics or {}).get(name, TensorStatistics())
            records[name], stored[name] = compress(name, tensor.detach(), format, rank, known)
        version = importlib.import_module(__package__).__version__
        kept: dict[str, Curvature] = {}
        kept_records: dict[str, CurvatureRecord] = {}
        for full_name, (shape, curvature) in (curvatures or {}).items():
            name = normalize_name(full_name)
            curvature_records.check_finite(name, curvature)
            kept[name], kept_records[name] = curvature, CurvatureRecord.of(shape, curvature)
        return cls(
            *(records, fingerprint or {}, provenance or Provenance(), version),
            stored=stored,
            curvature_records=kept_records,
            curvatures=kept,
        )

    # --- files --------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], max_shard_bytes: int | None = None) -> Path:
        """Write a ``.safetensors`` file, or shards beside it and ``<path>.index.json``, whole or not at all.

        A save that fails or is killed leaves an older gradient in the same place as it was.

        Args:
            path: ends in ``.safetensors``.
            max_shard_bytes: start a new shard beyond this size; one tensor is never split.

        Returns:
            The file to :meth:`load`: ``path`` or its index.

        Raises:
            ValueError: the path's ending.
            OSError: it cannot be written; an older file is intact.
        """
        check_path("path", path)
        if max_shard_bytes is not None:
            check_integer("max_shard_bytes", max_shard_bytes, 1)
        tensors = {f"{name}/{part}": tensor for name in self for part, tensor in parts(self.stored(name)).items()}
        for name in self.curvature_records:
            curvature = self.curvature(name)
            assert curvature is not None
            tensors |= {f"{name}/{part}": t for part, t in curvature_records.parts(curvature).items()}
        return save_tensors(path, tensors, self._content(), max_shard_bytes)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GlobalGradient:
        """Map a saved global gradient; only headers are read, tensors when they are asked for.

        Args:
            path: a ``.safetensors`` file or a ``.safetensors.index.json``; of a sharded one also the former's name.

        Raises:
            FileNotFoundError: no such file, or a shard is missing.
            ValueError: truncated, corrupt, of another kind or of a newer version.
        """
        check_path("path", path)
        saved = SavedTensors(path)
        description = described(saved)
        expected = {
            f"{n}/{part}": meta for n, record in description.records.items() for part, meta in layout(record).items()
        }
        for name, its in description.curvature.items():
            expected |= {f"{name}/{part}": meta for part, meta in its.layout().items()}
        saved.check_layout(expected)
        gg = cls(
            *(description.records, description.fingerprint, description.provenance, description.library_version),
            saved=saved,
            curvature_records=description.curvature,
            calibration=description.calibration,
        )
        if gg.digest != description.digest:
            raise ValueError(
                f"{path}: expected digest {gg.digest[:12]}…, as its tensors have, got another; collect anew"
            )
        return gg

    def _content(self) -> dict[str, Any]:
        curvature = {name: record.to_json() for name, record in self.curvature_records.items()}
        return {
            "kind": KIND,
            "format_version": CURVATURE_VERSION if curvature else FORMAT_VERSION,
            "library_version": self.library_version,
            "digest": self.digest,
            "fingerprint": self.fingerprint,
            "provenance": asdict(self.provenance),
            "tensors": {name: asdict(record) for name, record in self.records.items()},
        } | ({"curvature": curvature, "calibration": self.calibration} if curvature else {})


def _checked_pair(pair: Any) -> tuple[str, torch.Tensor]:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str):
        raise TypeError(f"tensors: expected pairs of a name and a tensor, got {type(pair).__name__}")
    check_type(f"tensors[{pair[0]!r}]", pair[1], torch.Tensor)
    check_tensor(f"tensors[{pair[0]!r}]", pair[1], (pair[1].dtype,), contiguous=False)
    return pair[0], pair[1]


def save_or_hand_over(gg: GlobalGradient, path: str | os.PathLike[str]) -> None:
    """Save; where that fails, hours of collection are not lost with it."""
    try:
        gg.save(path)
    except OSError as error:
        error.global_gradient = gg  # type: ignore[attr-defined]
        raise
