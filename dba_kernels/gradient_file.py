"""What the file of a global gradient says of itself, every field checked before anything is believed."""

from __future__ import annotations

from dataclasses import dataclass

from .base_model import Fingerprint, check_fingerprint, normalize_name
from .curvature_records import CurvatureRecord
from .descriptions import COUNT, NUMBER_OR_NONE, SHA256, TEXTS, Check, check_fields, one_of, read
from .records import TensorRecord
from .tensor_files import SavedTensors

FORMAT_VERSION = 1
CURVATURE_VERSION = 2
"""Of a file that holds curvature; one that does not is written as ever."""
CURVATURE_FIELDS = ("curvature", "calibration")
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
    "curvature": OBJECT,
    "calibration": NUMBER_OR_NONE,
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


@dataclass(frozen=True)
class Description:
    """Everything that a description holds; fields as in :class:`.global_gradient.GlobalGradient`."""

    records: dict[str, TensorRecord]
    fingerprint: Fingerprint
    provenance: Provenance
    library_version: str
    digest: str
    curvature: dict[str, CurvatureRecord]
    calibration: float | None


def described(saved: SavedTensors) -> Description:
    """What the description says.

    Raises:
        ValueError: of another kind or version, or a description that no version of this library writes.
    """
    path, content = saved.path, saved.content
    if content.get("kind") != KIND:
        raise ValueError(f"{path}: expected a {KIND}, got a {content.get('kind')}; load the file that save() wrote")
    version = content.get("format_version")
    if type(version) is not int or version not in (FORMAT_VERSION, CURVATURE_VERSION):
        raise ValueError(
            f"{path}: expected format version {FORMAT_VERSION} or {CURVATURE_VERSION}, got {version}, written by "
            f"dba_kernels {content.get('library_version')}; install that version, or collect again"
        )
    check_fields(f"{path}: description", content, CONTENT, () if version == CURVATURE_VERSION else CURVATURE_FIELDS)
    records = {}
    for name, entry in content["tensors"].items():
        if normalize_name(name) != name:
            raise ValueError(f"{path}: tensor {name!r}: expected the bare name {normalize_name(name)!r}")
        records[name] = TensorRecord.read(f"{path}: tensor {name!r}", entry)
    provenance = read(Provenance, f"{path}: provenance", content["provenance"], PROVENANCE)
    shapes = {name: record.shape for name, record in records.items()}
    check_fingerprint(f"{path}: fingerprint", content["fingerprint"], shapes)
    try:
        curvature = {name: CurvatureRecord.from_json(entry) for name, entry in content.get("curvature", {}).items()}
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: curvature: expected records as this version writes them, got {error!r}") from error
    own = content["fingerprint"], provenance, content["library_version"], content["digest"]
    return Description(records, *own, curvature, content.get("calibration"))
