"""Files that exist whole or not at all, and the safetensors format on top of them."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import math
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

METADATA_KEY = "dba_kernels"
DIGEST_KEY = "dba_kernels.digest"
SHARD_KEY = "dba_kernels.shard_of"
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
}


@contextmanager
def atomic_writer(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file that replaces ``path`` when the block ends without an exception, and leaves no trace otherwise.

    Written beside ``path`` (a rename is atomic only within a file system), fsynced, renamed, the folder fsynced. The
    temporary name carries host and process: what a killed process left behind is removed by the next write to ``path``.

    Raises:
        OSError: naming ``path``, the cause and the fix; the old file is intact.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        _remove_stale(path)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        reason = error.strerror or str(error)
        fix = "choose a folder that exists, is writable and has room"
        raise OSError(error.errno, f"cannot write {path}: {reason}; an older file is untouched; {fix}") from error


def _remove_stale(path: Path) -> None:
    """Remove temporary files of ``path`` whose process, on this host, is gone."""
    start = f".{path.name}.{socket.gethostname()}."
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        pid = leftover.name[len(start) : -len(".tmp")]
        if leftover.name.startswith(start) and pid.isdigit() and not _alive(int(pid)):
            with suppress(OSError):
                leftover.unlink()


def _alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # elsewhere, os.kill(pid, 0) does not merely ask
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system lets a folder be opened."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a ``.safetensors`` file through :func:`atomic_writer`, one tensor at a time, the same bytes every time.

    The safetensors package's own writer neither syncs nor renames. Wide dtypes come first, so that every tensor is
    aligned to its own element.

    Raises:
        OSError: see :func:`atomic_writer`.
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
    with atomic_writer(path) as file:
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

    Shards carry a digest of ``content`` in their names, and the index, renamed into place last, is what makes them
    count: a write that fails or is killed leaves the older set as it was.

    Args:
        path: ends in ``.safetensors``.
        content: describes the tensors well enough (digests) that equal content means equal tensors.
        max_shard_bytes: start a new shard beyond this size; one tensor is never split. None for a single file.

    Returns:
        ``path``, or its index.

    Raises:
        ValueError: the path's ending, or a size below 1.
        OSError: see :func:`atomic_writer`.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path: expected a name that ends in '.safetensors', got {str(path)!r}")
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: expected at least 1 or None, got {max_shard_bytes}")
    text = to_json(content)
    metadata = {METADATA_KEY: text, DIGEST_KEY: text_digest(text)}
    index_path = index_of(path)
    old = _old_shards(path)
    shards = _fill_shards(tensors, max_shard_bytes)
    if len(shards) == 1:
        write_safetensors(path, tensors, metadata)
        _remove([index_path, *old])
        return path
    stem, count = f"{path.stem}-{metadata[DIGEST_KEY][:8]}", len(shards)
    names = [f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    files = [path.with_name(name) for name in names]
    weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total, **metadata}, "weight_map": weight_map}
    try:
        for file, keys in zip(files, shards, strict=True):
            write_safetensors(file, {key: tensors[key] for key in keys}, {SHARD_KEY: index_path.name})
        with atomic_writer(index_path) as writer:
            writer.write(json.dumps(index, indent=1, allow_nan=False).encode())
    except BaseException:
        _remove([file for file in files if file not in old])
        raise
    _remove([path, *(file for file in old if file not in files)])
    return index_path


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


def _old_shards(path: Path) -> list[Path]:
    """Shards that earlier calls with this path wrote, also of one that was killed before its index."""
    pattern = re.compile(re.escape(path.stem) + r"-[0-9a-f]{8}-\d{5}-of-\d{5}\.safetensors")
    return [file for file in path.parent.glob("*.safetensors") if pattern.fullmatch(file.name)]


def _remove(files: list[Path]) -> None:
    for file in files:
        with suppress(OSError):
            file.unlink()


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
        path = Path(path)
        if path.suffix == ".safetensors" and not path.exists() and index_of(path).exists():
            path = index_of(path)
        self.path = path
        if path.suffix == ".json":
            metadata = self._open_shards()
        else:
            file, metadata = _map(path)
            if SHARD_KEY in metadata:
                raise ValueError(f"{path}: expected a whole set, got one shard; load {metadata[SHARD_KEY]} beside it")
            self._files = dict.fromkeys(file.keys(), file)
        self.content = self._verified(metadata)

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return type(self), (self.path,)  # a copy maps the same file anew

    def _open_shards(self) -> dict[str, Any]:
        try:
            index = json.loads(self.path.read_bytes())
            weight_map, metadata = dict(index["weight_map"]), dict(index["metadata"])
            shards = {name: _map(self.path.with_name(name))[0] for name in sorted(set(weight_map.values()))}
        except FileNotFoundError as error:
            missing = error.filename or error
            raise FileNotFoundError(error.errno, f"{self.path}: {missing}; copy all shards beside the index") from error
        except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise _corrupt(self.path, f"not an index: {error!r}") from error
        self._files = {key: shards[name] for key, name in weight_map.items()}
        for key, file in self._files.items():
            if key not in file.keys():  # noqa: SIM118 - not a dict
                raise _corrupt(self.path, f"{key!r} is not in its shard")
        return metadata

    def _verified(self, metadata: dict[str, Any]) -> dict[str, Any]:
        text, digest = metadata.get(METADATA_KEY), metadata.get(DIGEST_KEY)
        if not isinstance(text, str):
            raise _corrupt(self.path, "no description by this library")
        if text_digest(text) != digest:
            raise _corrupt(self.path, "its description does not match its digest")
        described: dict[str, Any] = json.loads(text)
        return described

    def check_layout(self, expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Compare every tensor's dtype and shape, from the headers alone.

        Raises:
            ValueError: naming the tensor.
        """
        for key in expected.keys() ^ self._files.keys():
            raise _corrupt(self.path, f"tensor {key!r} is {'missing' if key in expected else 'not described'}")
        for key, (dtype, shape) in expected.items():
            view = self._files[key].get_slice(key)
            want, got = (DTYPE_NAMES[dtype], shape), (view.get_dtype(), tuple(view.get_shape()))
            if got != want:
                raise _corrupt(self.path, f"tensor {key!r}: expected {want}, got {got}")

    def __getitem__(self, key: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[key].get_tensor(key)
        return tensor


def _map(path: Path) -> tuple[Any, dict[str, str]]:
    try:
        file = safe_open(str(path), framework="pt")
        return file, file.metadata() or {}
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path.absolute())) from error
    except PermissionError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise _corrupt(path, str(error)) from error


def _corrupt(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path}: expected a whole file as this library wrote it, got one that is truncated, corrupt or of another "
        f"kind ({reason}); copy it again or collect it anew"
    )
