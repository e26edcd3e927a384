"""The stored artifact of stage 1: the global gradient ĝ_G, compressed, described, and verified when it is read."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import ops
from .base_model import (
    Fingerprint,
    check_fingerprint,
    check_names,
    check_weights,
    fingerprint,
    named_once,
    normalize_name,
)
from .descriptions import COUNT, SHA256, TEXTS, Check, check_fields, one_of
from .descriptions import read as read_fields
from .formats import STORAGE_FORMATS, EncodedTensor, StoredTensor, check_name
from .records import TensorRecord, TensorStatistics, assemble, check_rank, compress, layout, parts, verify
from .tensor_files import SavedTensors, save_tensors, text_digest, to_json

__all__ = ["GlobalGradient", "Provenance", "TensorRecord", "TensorStatistics", "fingerprint", "normalize_name"]

FORMAT_VERSION = 1
KIND = "global gradient"
OBJECT: Check = (lambda value: isinstance(value, dict)), "an object"
TEXT: Check = (lambda value: isinstance(value, str)), "a text"
CONTENT: dict[str, Check] = {
    "kind": TEXT,
    "format_version": COUNT,
    "library_version": TEXT,
    "digest": SHA256,
    "fingerprint": OBJECT,
    "provenance": OBJECT,
    "tensors": OBJECT,
}
PROVENANCE: dict[str, Check] = {
    "batches": COUNT,
    "tokens": COUNT,
    "weighting": one_of(("tokens", "batch")),
    "data": TEXTS,
    "data_digest": TEXT,
    "dropped_batches": COUNT,
    "empty_batches": COUNT,
}


@dataclass(frozen=True)
class Provenance:
    """Where a global gradient comes from. No timestamps: the same collection gives the same file.

    Args:
        batches: micro-batches in the mean.
        tokens: target tokens in them; 0 where the loss function did not say.
        weighting: ``"tokens"`` or ``"batch"``, see the collector.
        data: the user's names of the data.
        data_digest: SHA-256 chained over the micro-batches in their order.
        dropped_batches: micro-batches left out because their loss was not finite.
        empty_batches: micro-batches without target tokens.
    """

    batches: int = 0
    tokens: int = 0
    weighting: str = "tokens"
    data: tuple[str, ...] = ()
    data_digest: str = ""
    dropped_batches: int = 0
    empty_batches: int = 0


class GlobalGradient(Mapping[str, torch.Tensor]):
    """ĝ_G of every parameter, by name; ``gg[name]`` is the decoded fp32 tensor.

    Made by :meth:`from_tensors`, :meth:`load` or ``collect_global_gradient``. Names are those of the bare model
    (:func:`normalize_name`), on the way in and on look-up. Stored tensors must not be written to.

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
    ) -> None:
        self.records = records
        self.fingerprint = fingerprint
        self.provenance = provenance
        self.library_version = library_version
        self._stored = stored or {}  # verified
        self._saved = saved

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

    @property
    def digest(self) -> str:
        """SHA-256 over names, formats and tensor digests: equal exactly where the stored gradients are."""
        content = {name: (r.shape, r.format, r.rank, r.digest) for name, r in self.records.items()}
        return text_digest(to_json(content))

    @property
    def nbytes(self) -> int:
        """Bytes of all codes, scales and factors."""
        return sum(
            dtype.itemsize * math.prod(shape)
            for record in self.records.values()
            for dtype, shape in layout(record).values()
        )

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
        check_names({name: r.shape for name, r in self.records.items()}, params, missing, extra)
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

        Raises:
            ValueError: unknown format, NaN or Inf, a dtype that is not floating point, two tensors of one name,
                or a rank that no matrix can use.
        """
        check_name("format", format, STORAGE_FORMATS)
        if isinstance(tensors, Mapping):
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            tensors = tensors.items()
        if rank is not None:
            check_rank(rank, shapes or {})
        records: dict[str, TensorRecord] = {}
        stored: dict[str, StoredTensor] = {}
        for full_name, tensor in tensors:
            name = normalize_name(full_name)
            if name in records:
                raise ValueError(f"tensor {full_name!r}: expected unique names, got a second {name!r}; rename one")
            known = (statistics or {}).get(name, TensorStatistics())
            records[name], stored[name] = compress(name, tensor.detach(), format, rank, known)
        version = importlib.import_module(__package__).__version__
        return cls(records, fingerprint or {}, provenance or Provenance(), version, stored=stored)

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
        tensors = {f"{name}/{part}": tensor for name in self for part, tensor in parts(self.stored(name)).items()}
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
        saved = SavedTensors(path)
        gg = cls._described(saved)
        saved.check_layout(
            {f"{name}/{part}": meta for name, record in gg.records.items() for part, meta in layout(record).items()}
        )
        return gg

    @classmethod
    def _described(cls, saved: SavedTensors) -> GlobalGradient:
        """What the description says, every field checked.

        Raises:
            ValueError: of another kind or version, or a description that no version of this library writes.
        """
        path, content = saved.path, saved.content
        if content.get("kind") != KIND:
            raise ValueError(f"{path}: expected a {KIND}, got a {content.get('kind')}; load the file that save() wrote")
        version = content.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise ValueError(
                f"{path}: expected format version {FORMAT_VERSION}, got {version}, written by "
                f"dba_kernels {content.get('library_version')}; install that version, or collect again"
            )
        check_fields(f"{path}: description", content, CONTENT)
        records = {}
        for name, entry in content["tensors"].items():
            if normalize_name(name) != name:
                raise ValueError(f"{path}: tensor {name!r}: expected the bare name {normalize_name(name)!r}")
            records[name] = TensorRecord.read(f"{path}: tensor {name!r}", entry)
        provenance = read_fields(Provenance, f"{path}: provenance", content["provenance"], PROVENANCE)
        shapes = {name: record.shape for name, record in records.items()}
        check_fingerprint(f"{path}: fingerprint", content["fingerprint"], shapes)
        gg = cls(records, content["fingerprint"], provenance, content["library_version"], saved=saved)
        if gg.digest != content["digest"]:
            raise ValueError(
                f"{path}: expected digest {gg.digest[:12]}…, as its tensors have, got another; collect anew"
            )
        return gg

    def _content(self) -> dict[str, Any]:
        return {
            "kind": KIND,
            "format_version": FORMAT_VERSION,
            "library_version": self.library_version,
            "digest": self.digest,
            "fingerprint": self.fingerprint,
            "provenance": asdict(self.provenance),
            "tensors": {name: asdict(record) for name, record in self.records.items()},
        }


def save_or_hand_over(gg: GlobalGradient, path: str | os.PathLike[str]) -> None:
    """Save; where that fails, hours of collection are not lost with it."""
    try:
        gg.save(path)
    except OSError as error:
        error.global_gradient = gg  # type: ignore[attr-defined]
        raise
