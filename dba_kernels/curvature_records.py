"""One parameter's curvature in a file: its parts, what is recorded of it, and how it is put together again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .factors import Curvature, DiagonalFactor, Factor, KroneckerTerm, LowRankFactor
from .formats import STORAGE_FORMATS, EncodedTensor, check_integer, check_name, scales_shape
from .tensor_files import DTYPE_NAMES, as_bytes

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class FactorRecord:
    """What the file says of one factor.

    Args:
        size: n.
        rank: r, or None for a diagonal factor.
        format: name in ``STORAGE_FORMATS`` of U; "" for a diagonal factor.
        rest: a of eq. 12.
        energy: share of the trace that U keeps; 1 for a diagonal factor.
    """

    size: int
    rank: int | None = None
    format: str = ""
    rest: float = 0.0
    energy: float = 1.0

    @classmethod
    def of(cls, factor: Factor) -> FactorRecord:
        if isinstance(factor, DiagonalFactor):
            return cls(factor.size)
        kept = float(factor.sigma.double().sum()) + factor.rank * factor.rest
        trace = kept + (factor.size - factor.rank) * factor.rest
        return cls(factor.size, factor.rank, factor.u.format, factor.rest, kept / trace if trace > 0 else 1.0)

    def layout(self) -> Layout:
        if self.rank is None:
            return {"diagonal": (torch.float32, (self.size,))}
        shape, chosen = (self.size, self.rank), STORAGE_FORMATS[self.format]
        parts: Layout = {"sigma": (torch.float32, (self.rank,)), "u.codes": (chosen.dtype, chosen.codes_shape(shape))}
        return parts | ({"u.scales": (torch.float32, scales_shape(shape))} if chosen.grouped else {})

    def assemble(self, found: Mapping[str, torch.Tensor]) -> Factor:
        if self.rank is None:
            return DiagonalFactor(found["diagonal"])
        u = EncodedTensor(self.format, (self.size, self.rank), found["u.codes"], found.get("u.scales"))
        return LowRankFactor(u, found["sigma"], self.rest)


@dataclass(frozen=True)
class CurvatureRecord:
    """What the file says of one parameter's curvature.

    Args:
        shape: of the parameter.
        terms: (left, right) of every linear map.
        diagonal: shape of the diagonal where there is no map; None else.
        digest: SHA-256 of what is stored, hexadecimal.
    """

    shape: tuple[int, ...]
    terms: tuple[tuple[FactorRecord, FactorRecord], ...]
    diagonal: tuple[int, ...] | None
    digest: str

    @classmethod
    def of(cls, shape: tuple[int, ...], curvature: Curvature) -> CurvatureRecord:
        terms = tuple((FactorRecord.of(term.left), FactorRecord.of(term.right)) for term in curvature.terms)
        diagonal = None if curvature.diagonal is None else tuple(curvature.diagonal.shape)
        return cls(tuple(shape), terms, diagonal, digest(curvature))

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> CurvatureRecord:
        terms = tuple((FactorRecord(**left), FactorRecord(**right)) for left, right in entry["terms"])
        diagonal = None if entry["diagonal"] is None else tuple(entry["diagonal"])
        return cls(tuple(entry["shape"]), terms, diagonal, entry["digest"])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def energy(self) -> float:
        """The smallest share of a trace that the rank keeps, over the factors."""
        return min((factor.energy for term in self.terms for factor in term), default=1.0)

    @property
    def nbytes(self) -> int:
        total = 0
        for dtype, shape in self.layout().values():
            total += dtype.itemsize * torch.Size(shape).numel()
        return total

    def layout(self) -> Layout:
        """The parts that it is stored as."""
        found: Layout = {} if self.diagonal is None else {"curvature": (torch.float32, self.diagonal)}
        for i, (left, right) in enumerate(self.terms):
            for side, factor in (("left", left), ("right", right)):
                found |= {f"curvature.{i}.{side}.{part}": meta for part, meta in factor.layout().items()}
        return found

    def assemble(self, found: Mapping[str, torch.Tensor]) -> Curvature:
        """Inverse of :func:`parts`."""
        terms = []
        for i, (left, right) in enumerate(self.terms):
            sides = [
                factor.assemble({part: found[f"curvature.{i}.{side}.{part}"] for part in factor.layout()})
                for side, factor in (("left", left), ("right", right))
            ]
            assert isinstance(sides[1], LowRankFactor)  # only an embedding's inputs, on the left, are diagonal
            terms.append(KroneckerTerm(sides[0], sides[1]))
        return Curvature(tuple(terms), found.get("curvature"))


def parts(curvature: Curvature) -> dict[str, torch.Tensor]:
    """The stored parts, as :meth:`CurvatureRecord.layout` names them."""
    found = {} if curvature.diagonal is None else {"curvature": curvature.diagonal}
    for i, term in enumerate(curvature.terms):
        for side, factor in (("left", term.left), ("right", term.right)):
            prefix = f"curvature.{i}.{side}."
            if isinstance(factor, DiagonalFactor):
                found[prefix + "diagonal"] = factor.diagonal
                continue
            found |= {prefix + "sigma": factor.sigma, prefix + "u.codes": factor.u.codes}
            if factor.u.scales is not None:
                found[prefix + "u.scales"] = factor.u.scales
    return found


def digest(curvature: Curvature) -> str:
    """SHA-256 over names, dtypes, shapes, bytes and what the parts are added to."""
    sha = hashlib.sha256()
    for part, tensor in sorted(parts(curvature).items()):
        sha.update(f"{part} {DTYPE_NAMES[tensor.dtype]} {tuple(tensor.shape)};".encode())
        sha.update(as_bytes(tensor))
    for term in curvature.terms:
        sha.update(repr([getattr(factor, "rest", None) for factor in (term.left, term.right)]).encode())
    return sha.hexdigest()


def verify(name: str, record: CurvatureRecord, curvature: Curvature, where: object) -> None:
    """Check content that was read from a file.

    Raises:
        ValueError: the digest differs, or NaN or Inf is stored.
    """
    if digest(curvature) != record.digest:
        raise ValueError(
            f"curvature of {name!r} in {where}: expected content with digest {record.digest[:12]}…, got another; the "
            "file is corrupt: copy it again or collect it anew"
        )
    check_finite(name, curvature)


def check_finite(name: str, curvature: Curvature) -> None:
    """Refuse NaN and infinities.

    Raises:
        ValueError: naming the part.
    """
    for part, tensor in parts(curvature).items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"curvature of {name!r}: expected finite {part}, got NaN or Inf; collect it anew")


def check_kept(format: str | None, curvature: int | None) -> None:
    """Refuse an unknown format of ĝ_G, and a collection of which nothing would be kept.

    Raises:
        ValueError: as said.
    """
    if curvature is not None:
        check_integer("curvature", curvature, 1)
    if format is not None:
        check_name("format", format, STORAGE_FORMATS)
    elif curvature is None:
        raise ValueError("format: expected a name, got None and no curvature: nothing would be kept; give one of them")


def factor_format(format: str | None) -> str:
    """The format of factors beside a global gradient in ``format``: they are few, so nothing below 8 bits."""
    return format if format in ("fp32", "bf16", "fp16") else "int8"
