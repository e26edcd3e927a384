"""The safetensors format on top of :mod:`.files`: tensors with a description, in one file, or shards and an index."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from .files import atomic_writer, beside, folder_lock, no_such_file, put_in_place, remove, sync_folder, writing

METADATA_KEY = "dba_kernels"
DIGEST_KEY = "dba_kernels.digest"
SHARD_KEY = "dba_kernels.shard_of"
ATTEMPTS = 100
"""To open what another process replaces again and again."""
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
}


def _write(file: IO[bytes], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """A ``.safetensors`` file, one tensor at a time, the same bytes every time.

    The safetensors package's own writer neither syncs nor renames. Wide dtypes come first, so that every tensor is
    aligned to its own element.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in order:
        tensor = tensors[name]
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little"))
    file.write(encoded)
    for name in order:
        file.write(as_bytes(tensors[name]))


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's elements as bytes in row-major order, without a copy where it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def to_json(content: Any) -> str:
    """The one spelling of ``content`` that digests are taken of."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False)


def text_digest(text: str) -> str:
    """SHA-256, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    content: dict[str, Any],
    max_shard_bytes: int | None = None,
) -> Path:
    """Write tensors and a JSON description: one file, or shards and ``<path>.index.json`` as the Hugging Face hub does.

    All files are written under temporary names. Then, one writer at a time, they take their places, the index last,
    which is what makes shards count: a write that fails or is killed leaves the older set as it was, and of several
    processes that write to one place the last to finish wins. Shards carry in their names a digest of ``content`` and
    of the cut, so no two sets share a name.

    Args:
        path: ends in ``.safetensors``.
        content: describes the tensors well enough (digests) that equal content means equal tensors.
        max_shard_bytes: start a new shard beyond this size; one tensor is never split. None for a single file.

    Returns:
        ``path``, or its index.

    Raises:
        ValueError: the path's ending, or a size below 1.
        OSError: see :func:`.files.atomic_writer`.
    """
    path = Path(path)
    check_name_of_file(path)
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: expected at least 1 or None, got {max_shard_bytes}")
    text = to_json(content)
    metadata = {METADATA_KEY: text, DIGEST_KEY: text_digest(text)}
    shards = _fill_shards(tensors, max_shard_bytes)
    index_path, sharded = index_of(path), len(shards) > 1
    stem = f"{path.stem}-{text_digest(text + to_json(shards))[:8]}"
    names = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    files = [path.with_name(name) for name in names] if sharded else [path]
    weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total, **metadata}, "weight_map": weight_map}
    with ExitStack() as stack:
        stack.enter_context(writing(path))
        written = []
        for file, keys in zip(files, shards, strict=True):
            with beside(file) as (temporary, out):
                _write(out, {key: tensors[key] for key in keys}, {SHARD_KEY: index_path.name} if sharded else metadata)
            stack.callback(remove, [temporary])  # nothing is there any more once it took its place
            written.append((temporary, file))
        with folder_lock(path.parent):
            try:
                for temporary, file in written:
                    put_in_place(temporary, file)
                if sharded:
                    with atomic_writer(index_path) as writer:
                        writer.write(json.dumps(index, indent=1, allow_nan=False).encode())
            except BaseException:
                _remove_unused_shards(path)
                raise
            remove([path if sharded else index_path])
            _remove_unused_shards(path)
        sync_folder(path.parent)
    return index_path if sharded else path


def check_name_of_file(path: str | os.PathLike[str], argument: str = "path") -> None:
    """Refuse a name that :func:`save_tensors` would refuse.

    Raises:
        ValueError: its ending.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{argument}: expected a name that ends in '.safetensors', got {str(path)!r}")


def index_of(path: Path) -> Path:
    return path.with_name(path.name + ".index.json")


def _fill_shards(tensors: Mapping[str, torch.Tensor], max_shard_bytes: int | None) -> list[list[str]]:
    """Names per shard, in order, each shard as full as it may be."""
    shards: list[list[str]] = [[]]
    room = math.inf if max_shard_bytes is None else max_shard_bytes
    left = room
    for name, tensor in tensors.items():
        if tensor.nbytes > left and shards[-1]:
            shards.append([])
            left = room
        shards[-1].append(name)
        left -= tensor.nbytes
    return shards


def _remove_unused_shards(path: Path) -> None:
    """Remove shards beside ``path`` that no index names: of a replaced set, or of a writer that was killed.

    Shards get their names under the lock that this is called under, so none belongs to a writer still at work.
    """
    pattern = re.compile(re.escape(path.stem) + r"-[0-9a-f]{8}-\d{5}-of-\d{5}\.safetensors")
    try:
        used = set(json.loads(index_of(path).read_bytes())["weight_map"].values())
    except FileNotFoundError:
        used = set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # an index that cannot be read may need them
    shards = [file for file in path.parent.glob("*.safetensors") if pattern.fullmatch(file.name)]
    remove([file for file in shards if file.name not in used])


class SavedTensors:
    """What :func:`save_tensors` wrote, mapped: opening reads headers, a tensor's pages are read when they are touched.

    ``content`` is the description, verified against its own digest; ``saved[key]`` a tensor.

    Args:
        path: the file or the index; of a sharded set also the name that was given to :func:`save_tensors`.

    Raises:
        FileNotFoundError: no such file, or a shard is missing.
        ValueError: truncated, corrupt or of another kind.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        for _ in range(ATTEMPTS):  # another process may replace the set while it is being opened
            self.path = _written_at(Path(path))
            self._opened: dict[Path, tuple[int, ...]] = {}
            before = _identity(self.path)
            try:
                metadata = self._open_shards() if self.path.suffix == ".json" else self._open_single()
            except FileNotFoundError:
                if before == _identity(self.path) and self.path == _written_at(Path(path)):
                    raise
                continue
            if before == _identity(self.path):
                break
        else:
            raise corrupt(self.path, "it is being written all the time")
        self.content = self._verified(metadata)

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return type(self), (self.path,)  # a copy maps the same file anew

    def _map(self, path: Path) -> tuple[Any, dict[str, str]]:
        """Map the file and note which one it is: another may take its place in between, under the same inode even."""
        while True:
            before = _identity(path)
            mapped = _map(path)
            self._opened[path] = _identity(path)
            if self._opened[path] == before:
                return mapped

    def _open_single(self) -> dict[str, Any]:
        file, metadata = self._map(self.path)
        if SHARD_KEY in metadata:
            raise ValueError(f"{self.path}: expected a whole set, got one shard; load {metadata[SHARD_KEY]} beside it")
        self._files = dict.fromkeys(file.keys(), file)
        self._where = dict.fromkeys(file.keys(), self.path)
        return metadata

    def _open_shards(self) -> dict[str, Any]:
        try:
            text = self.path.read_bytes()
        except FileNotFoundError as error:
            raise no_such_file(self.path) from error
        weight_map, metadata = _parsed_index(self.path, text)
        try:
            shards = {name: self._map(self.path.with_name(name))[0] for name in sorted(set(weight_map.values()))}
        except FileNotFoundError as error:
            missing = error.filename or error
            raise FileNotFoundError(error.errno, f"{self.path}: {missing}; copy all shards beside the index") from error
        self._files = {key: shards[name] for key, name in weight_map.items()}
        self._where = {key: self.path.with_name(name) for key, name in weight_map.items()}
        for key, file in self._files.items():
            if key not in file.keys():  # noqa: SIM118 - not a dict
                raise corrupt(self.path, f"{key!r} is not in its shard")
        return metadata

    def _verified(self, metadata: dict[str, Any]) -> dict[str, Any]:
        text, digest = metadata.get(METADATA_KEY), metadata.get(DIGEST_KEY)
        if not isinstance(text, str):
            raise corrupt(self.path, "no description by this library")
        if text_digest(text) != digest:
            raise corrupt(self.path, "its description does not match its digest")
        content = parse_json(self.path, text)
        if not isinstance(content, dict):
            raise corrupt(self.path, "its description is no JSON object")
        return content

    def check_layout(self, expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Compare every tensor's dtype and shape, from the headers alone.

        Raises:
            ValueError: naming the tensor.
        """
        for key in expected.keys() ^ self._files.keys():
            raise corrupt(self.path, f"tensor {key!r} is {'missing' if key in expected else 'not described'}")
        for key, (dtype, shape) in expected.items():
            view = self._files[key].get_slice(key)
            want, got = (DTYPE_NAMES[dtype], shape), (view.get_dtype(), tuple(view.get_shape()))
            if got != want:
                raise corrupt(self.path, f"tensor {key!r}: expected {want}, got {got}")

    def __getitem__(self, key: str) -> torch.Tensor:
        path = self._where[key]
        now = _identity(path)
        if now and now[:2] == self._opened[path][:2] and now != self._opened[path]:
            # Written to in place: what is mapped has changed too, and beyond a new end reading would kill the process.
            raise corrupt(path, "it was written to since it was opened")
        tensor: torch.Tensor = self._files[key].get_tensor(key)
        return tensor


def _written_at(path: Path) -> Path:
    """The index, where ``path`` is the name that a sharded set was saved under."""
    return index_of(path) if path.suffix == ".safetensors" and not path.exists() and index_of(path).exists() else path


def _identity(path: Path) -> tuple[int, ...]:
    """Device and inode, then what changes where the file is written to in place; empty where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _parsed_index(path: Path, text: bytes) -> tuple[dict[str, str], dict[str, Any]]:
    """``weight_map`` and ``metadata`` of an index; its shards lie beside it, under plain names.

    Raises:
        ValueError: it is no such index.
    """
    index = parse_json(path, text)
    weight_map, metadata = (index.get("weight_map"), index.get("metadata")) if isinstance(index, dict) else (None, None)
    if not isinstance(weight_map, dict) or not isinstance(metadata, dict):
        raise corrupt(path, "not an index")
    for name in weight_map.values():
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
            raise corrupt(path, f"{name!r} is not the name of a shard")
    return weight_map, metadata


def parse_json(path: Path, text: str | bytes) -> Any:
    """JSON without names that occur twice and without NaN and infinities, which JSON does not have.

    Raises:
        ValueError: naming ``path``.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            raise ValueError("a name occurs twice")
        return result

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise corrupt(path, f"its description is not JSON: {error}") from error


def _map(path: Path) -> tuple[Any, dict[str, str]]:
    if path.exists() and not path.is_file():
        raise corrupt(path, "not a regular file")  # a FIFO would be waited for
    try:
        file = safe_open(str(path), framework="pt")
        return file, file.metadata() or {}
    except FileNotFoundError as error:
        raise no_such_file(path) from error
    except PermissionError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        if not path.exists():  # it went while torch was mapping it
            raise no_such_file(path) from error
        raise corrupt(path, str(error)) from error


def corrupt(path: object, reason: str) -> ValueError:
    """The error for a file that is not what this library wrote."""
    return ValueError(
        f"{path}: expected a whole file as this library wrote it, got one that is truncated, corrupt or of another "
        f"kind ({reason}); copy it again or collect it anew"
    )
