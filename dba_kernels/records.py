"""One stored tensor of a global gradient: its parts in a file, what is recorded of it, and how it is verified."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from . import ops
from .descriptions import COUNT, NOT_NEGATIVE, NUMBER_OR_NONE, SHA256, SHAPE, Check, is_count, one_of, read, within
from .formats import (
    STORAGE_FORMATS,
    EncodedTensor,
    LowRankTensor,
    StoredTensor,
    check_integer,
    is_compressible,
    matrix_shape,
    scales_shape,
    storage_format,
)
from .tensor_files import DTYPE_NAMES, as_bytes

_CHUNK = 2**16  # elements measured at once: stays in cache, and small blocks do not fragment the heap of a full machine
_BLOCK = 2**12  # elements per partial sum
NORM_TOLERANCE = 1e-4
"""Relative, between the recorded squared norm and that of what is read: low-rank factors are multiplied in another
order on another machine."""

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Part of a stored tensor (``codes``, ``scales``, ``sigma``, ``u.codes`` …) → dtype and shape."""


@dataclass(frozen=True)
class TensorStatistics:
    """What a collector knows of one tensor beyond its mean.

    Args:
        signal, noise: unbiased estimates of ‖μ‖² and of E‖ĝ_G − μ‖², where μ is the gradient over infinitely much
            data; None where unknown (fewer than two micro-batches, or not collected).
        dropped: micro-batches left out of this tensor because their gradient was not finite.
    """

    signal: float | None = None
    noise: float | None = None
    dropped: int = 0


@dataclass(frozen=True)
class TensorRecord:
    """What the file says of one tensor.

    Args:
        shape: of the decoded tensor.
        format: name in ``STORAGE_FORMATS``; of the factors where ``rank`` is set.
        rank: r, or None for a dense tensor.
        digest: SHA-256 of what is stored, hexadecimal.
        squared_norm: ‖ĝ_G‖² of what is stored.
        relative_error: ‖stored − exact‖ / ‖exact‖.
        cosine: between stored and exact.
        energy: share of ‖exact‖² that the best rank-r matrix keeps; 1 for a dense tensor.
        signal, noise, dropped: see :class:`TensorStatistics`.
    """

    shape: tuple[int, ...]
    format: str
    rank: int | None
    digest: str
    squared_norm: float
    relative_error: float
    cosine: float
    energy: float = 1.0
    signal: float | None = None
    noise: float | None = None
    dropped: int = 0

    @classmethod
    def read(cls, what: str, entry: Any) -> TensorRecord:
        """Inverse of ``asdict``.

        Raises:
            ValueError: a field is missing, unknown, or cannot be.
        """
        checks: dict[str, Check] = {
            "shape": SHAPE,
            "format": one_of(STORAGE_FORMATS),
            "rank": ((lambda value: value is None or (is_count(value) and value > 0)), "a rank or null"),
            "digest": SHA256,
            "squared_norm": NOT_NEGATIVE,
            "relative_error": NOT_NEGATIVE,
            "cosine": within(-1.0, 1.0),
            "energy": within(0.0, 1.0),
            "signal": NUMBER_OR_NONE,
            "noise": NUMBER_OR_NONE,
            "dropped": COUNT,
        }
        record = read(cls, what, entry, checks)
        if record.rank is not None and not takes_rank(record.shape, record.rank):
            raise ValueError(f"{what}: expected a rank that saves bytes for shape {record.shape}, got {record.rank}")
        if record.rank is None and storage_format(record.format, record.shape).name != record.format:
            raise ValueError(f"{what}: expected format 'fp32' for shape {record.shape}, got {record.format!r}")
        return record

    @property
    def signal_to_noise(self) -> float | None:
        """‖μ‖² / E‖ĝ_G − μ‖², estimated; negative where the noise hides the signal."""
        if self.signal is None or self.noise is None or self.noise <= 0:
            return None
        return self.signal / self.noise

    @property
    def split_half_cosine(self) -> float | None:
        """Expected cosine between the mean gradients of two random halves of the data, see the collector."""
        if self.signal is None or self.noise is None or self.signal + 2 * self.noise <= 0:
            return None
        return self.signal / (self.signal + 2 * self.noise)


def compress(
    name: str, tensor: torch.Tensor, format: str, rank: int | None, known: TensorStatistics
) -> tuple[TensorRecord, StoredTensor]:
    """Store one exact mean gradient and measure what that cost.

    Raises:
        ValueError: NaN, Inf, or a dtype that is not real floating point.
    """
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"tensor {name!r}: expected a floating-point dtype, got {tensor.dtype}")
    energy = 1.0
    stored: StoredTensor
    exact_sq = squared_norm(tensor)
    if not math.isfinite(exact_sq):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ValueError(
            f"tensor {name!r}: expected finite values, got {bad} of {tensor.numel()} NaN or infinite; "
            "leave out the batch that made them"
        )
    if rank is not None and takes_rank(tuple(tensor.shape), rank):
        stored = ops.factorize(tensor, rank, format)
        energy = min(1.0, float(stored.sigma.double().square().sum()) / exact_sq) if exact_sq > 0 else 1.0
        stored_format, stored_rank = format, rank
    else:
        stored = ops.encode(tensor, format)
        stored_format, stored_rank = stored.format, None
    stored_sq, error_sq, dot = _compare(tensor, stored)
    if not math.isfinite(stored_sq):
        raise ValueError(f"tensor {name!r}: values beyond the range of format {format!r}; choose 'int8' or 'bf16'")
    record = TensorRecord(
        shape=tuple(tensor.shape),
        format=stored_format,
        rank=stored_rank,
        digest=digest(stored),
        squared_norm=stored_sq,
        relative_error=math.sqrt(error_sq / exact_sq) if exact_sq > 0 else 0.0,
        cosine=dot / math.sqrt(exact_sq * stored_sq) if exact_sq * stored_sq > 0 else float(exact_sq == stored_sq),
        energy=energy,
        signal=known.signal,
        noise=known.noise,
        dropped=known.dropped,
    )
    return record, stored


def takes_rank(shape: tuple[int, ...], rank: int) -> bool:
    """Whether rank-r factors of this tensor are smaller than the tensor: r < m·n / (m + n)."""
    rows, cols = matrix_shape(shape)
    return is_compressible(shape) and rank * (rows + cols) < rows * cols


def check_rank(rank: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a rank that no tensor can use.

    Raises:
        ValueError: naming the largest useful rank.
    """
    if check_integer("rank", rank, 0) >= 1 and any(takes_rank(shape, rank) for shape in shapes.values()):
        return
    best, name = 0, ""
    for candidate, shape in shapes.items():
        rows, cols = matrix_shape(shape)
        useful = (rows * cols - 1) // (rows + cols) if is_compressible(shape) else 0
        if useful > best:
            best, name = useful, candidate
    advice = f"the largest rank that saves bytes is {best}, for {name!r}" if best else "no tensor is a large matrix"
    raise ValueError(f"rank: expected 1 <= rank < m·n / (m + n) for some matrix, got {rank}; {advice}")


# --- parts ------------------------------------------------------------------------------------------------------------


def layout(record: TensorRecord) -> Layout:
    """The parts that a tensor of this record is stored as."""
    if record.rank is None:
        return _dense_layout(record.format, record.shape)
    rows, cols = matrix_shape(record.shape)
    parts: Layout = {"sigma": (torch.float32, (record.rank,))}
    for factor, length in (("u", rows), ("v", cols)):
        shape = (length, record.rank)
        for part, meta in _dense_layout(storage_format(record.format, shape).name, shape).items():
            parts[f"{factor}.{part}"] = meta
    return parts


def _dense_layout(format: str, shape: tuple[int, ...]) -> Layout:
    chosen = STORAGE_FORMATS[format]
    parts: Layout = {"codes": (chosen.dtype, chosen.codes_shape(shape))}
    if chosen.grouped:
        parts["scales"] = (torch.float32, scales_shape(shape))
    return parts


def parts(stored: StoredTensor) -> dict[str, torch.Tensor]:
    """The stored tensor's parts, as :func:`layout` names them."""
    if isinstance(stored, LowRankTensor):
        factors = {"u": parts(stored.u), "v": parts(stored.v)}
        nested = {f"{factor}.{part}": t for factor, inner in factors.items() for part, t in inner.items()}
        return {"sigma": stored.sigma, **nested}
    return {"codes": stored.codes} | ({} if stored.scales is None else {"scales": stored.scales})


def assemble(record: TensorRecord, found: Mapping[str, torch.Tensor]) -> StoredTensor:
    """Inverse of :func:`parts`."""

    def dense(prefix: str, shape: tuple[int, ...]) -> EncodedTensor:
        format = storage_format(record.format, shape).name
        return EncodedTensor(format, shape, found[f"{prefix}codes"], found.get(f"{prefix}scales"))

    if record.rank is None:
        return dense("", record.shape)
    rows, cols = matrix_shape(record.shape)
    return LowRankTensor(
        record.shape, dense("u.", (rows, record.rank)), found["sigma"], dense("v.", (cols, record.rank))
    )


def digest(stored: StoredTensor) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the parts."""
    sha = hashlib.sha256()
    for part, tensor in sorted(parts(stored).items()):
        sha.update(f"{part} {DTYPE_NAMES[tensor.dtype]} {tuple(tensor.shape)};".encode())
        sha.update(as_bytes(tensor))
    return sha.hexdigest()


def verify(name: str, record: TensorRecord, stored: StoredTensor, where: object) -> None:
    """Check content that was read from a file.

    Raises:
        ValueError: the digest differs, NaN or Inf is stored, or the norm is not what the record says.
    """
    if digest(stored) != record.digest:
        raise ValueError(
            f"tensor {name!r} in {where}: expected content with digest {record.digest[:12]}…, got another; the file is "
            "corrupt: copy it again or collect it anew"
        )
    for part, tensor in parts(stored).items():
        finite = torch.isfinite(tensor).all() if tensor.is_floating_point() else True
        if not finite:
            raise ValueError(f"tensor {name!r} in {where}: expected finite {part}, got NaN or Inf; collect it anew")
    found = _stored_squared_norm(stored)
    if not math.isclose(found, record.squared_norm, rel_tol=NORM_TOLERANCE, abs_tol=1e-40):
        raise ValueError(
            f"tensor {name!r} in {where}: expected a squared norm of {found:.9g}, as its content has, got "
            f"{record.squared_norm:.9g} in the description; collect it anew"
        )


# --- measures ---------------------------------------------------------------------------------------------------------


def _ordered_sum(values: torch.Tensor) -> float:
    """Sum in an order that depends on the size alone: torch splits a single sum by the number of threads."""
    blocks = F.pad(values.reshape(-1), (0, -values.numel() % _BLOCK)).view(-1, _BLOCK)
    return float(blocks.sum(dim=1).sum())


def _chunks(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Ranges of dimension 0 of at most about ``_CHUNK`` elements."""
    rows, cols = matrix_shape(shape)
    step = max(1, _CHUNK // max(cols, 1))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def squared_norm(tensor: torch.Tensor) -> float:
    """‖tensor‖² in float64, the same bits with any number of threads."""
    rows = tensor.detach().reshape(1) if tensor.dim() == 0 else tensor.detach()
    return math.fsum(_ordered_sum(rows[a:b].double().square()) for a, b in _chunks(tuple(rows.shape)))


def _stored_squared_norm(stored: StoredTensor) -> float:
    """‖stored‖² in float64, a range of rows at a time."""
    if not stored.shape:
        return squared_norm(ops.decode(stored))
    return math.fsum(
        _ordered_sum(ops.decode(stored.row_slice(start, stop)).double().square())
        for start, stop in _chunks(stored.shape)
    )


def _compare(exact: torch.Tensor, stored: StoredTensor) -> tuple[float, float, float]:
    """‖stored‖², ‖stored − exact‖² and ⟨stored, exact⟩ in float64, a range of rows at a time."""
    sums = []
    for start, stop in _chunks(tuple(exact.shape)):
        whole = exact.dim() == 0
        want = (exact if whole else exact[start:stop]).double()
        got = ops.decode(stored if whole else stored.row_slice(start, stop)).double().reshape(want.shape)
        sums.append([_ordered_sum(x) for x in (got.square(), (got - want).square(), got * want)])
    stored_sq, error_sq, dot = (math.fsum(column) for column in zip(*sums, strict=True)) if sums else (0.0, 0.0, 0.0)
    return stored_sq, error_sq, dot
