"""Telling data, functions and dtypes apart: an interrupted collection goes on with what it began with, nothing else."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .tensor_files import as_bytes

_PLAIN = (str, bytes, int, float, type(None))


def digest_batch(batch: Any) -> bytes:
    """SHA-256 of what a batch holds: tensors, arrays, numbers and texts, in containers and in objects' attributes."""
    return _digest(batch, ())


def following(batches: Iterable[Any], done: int, digest: str, where: object) -> Iterator[tuple[int, Any, str]]:
    """Micro-batches after the first ``done``, which must be those that ``digest`` is of.

    Args:
        where: the snapshot's file, for errors.

    Yields:
        position, micro-batch, and the digest of all up to this one.

    Raises:
        ValueError: the skipped ones are others, or fewer.
    """
    chain, position = "", -1
    for position, batch in enumerate(batches):
        chain = hashlib.sha256(chain.encode() + digest_batch(batch)).hexdigest()
        if position >= done:
            yield position, batch, chain
        elif position == done - 1 and chain != digest:
            raise ValueError(
                f"{where}: expected the {done} batches of the interrupted collection, got others; give the same data "
                "in the same order, or delete the snapshot"
            )
    if position + 1 < done:
        raise ValueError(
            f"{where}: expected at least the {done} batches of the interrupted collection, got fewer; give the same "
            "data, or delete the snapshot"
        )


def announce_unknown(batches: Iterable[Any]) -> Iterator[Any]:
    """The same micro-batches; a warning before the first, where :func:`digest_batch` cannot tell such ones apart."""
    for position, batch in enumerate(batches):
        if position == 0 and (unknown := tells_apart(batch)) is not None:
            warnings.warn(
                f"batches: {unknown} shows no tensors, arrays, numbers or texts, so an interrupted collection cannot "
                "tell whether it is given the same data again; see to that",
                stacklevel=2,
            )
        yield batch


def tells_apart(batch: Any) -> str | None:
    """None where :func:`digest_batch` sees what ``batch`` holds, else the type of an object that shows nothing."""
    unknown: list[str] = []
    _digest(batch, (), unknown)
    return unknown[0] if unknown else None


def _digest(item: Any, above: tuple[int, ...], unknown: list[str] | None = None) -> bytes:
    """Of one item; ``above`` holds the ids of what contains it, ``unknown`` receives types that show nothing."""
    if isinstance(item, torch.Tensor):
        return _digest_tensor(item, above, unknown)
    if id(item) in above:  # it contains itself
        return hashlib.sha256(b"cycle").digest()

    def inner(child: Any) -> bytes:
        return _digest(child, (*above, id(item)), unknown)

    if isinstance(item, Mapping):
        children = [repr(key).encode() + inner(item[key]) for key in sorted(item, key=repr)]
    elif isinstance(item, (list, tuple)):
        children = [inner(child) for child in item]
    elif isinstance(item, _PLAIN):
        children = [repr(item).encode()]
    elif isinstance(item, (set, frozenset)):
        children = sorted(inner(child) for child in item)
    elif hasattr(item, "dtype") and hasattr(item, "shape") and hasattr(item, "tolist"):  # arrays of any library
        plain = getattr(item.dtype, "hasobject", True)  # of objects, the bytes are addresses
        content = inner(item.tolist()) if plain or not hasattr(item, "tobytes") else item.tobytes()
        children = [f"{item.dtype} {tuple(item.shape)}".encode(), content]
    elif callable(getattr(item, "tobytes", None)):  # images
        children = [repr((getattr(item, "mode", ""), getattr(item, "size", ""))).encode(), item.tobytes()]
    else:
        attributes = _attributes(item)
        children = [name.encode() + inner(attributes[name]) for name in sorted(attributes)]
        if not attributes and unknown is not None:
            unknown.append(f"an object of type {type(item).__name__}")
    return hashlib.sha256(type(item).__name__.encode() + b"".join(children)).digest()


def _digest_tensor(item: torch.Tensor, above: tuple[int, ...], unknown: list[str] | None) -> bytes:
    """Of dtype, shape and elements; of the parts, where a tensor wraps others or is sparse."""
    head = f"{item.dtype} {tuple(item.shape)}".encode()
    if item.device.type == "meta":
        if unknown is not None:
            unknown.append("a tensor without elements (device meta)")
        return hashlib.sha256(head).digest()
    if is_traceable_wrapper_subclass(item):
        parts = [getattr(item, name) for name in item.__tensor_flatten__()[0]]
    elif item.layout != torch.strided:
        sparse = item.to_sparse().coalesce()
        parts = [sparse.indices(), sparse.values()]
    else:
        return hashlib.sha256(head + as_bytes(item.resolve_conj().resolve_neg())).digest()
    return hashlib.sha256(head + b"".join(_digest(part, above, unknown) for part in parts)).digest()


def _attributes(item: Any) -> dict[str, Any]:
    """Instance attributes, in ``__dict__`` and in slots."""
    slots = [slot for kind in type(item).__mro__ for slot in _slots_of(kind)]
    return {slot: getattr(item, slot) for slot in slots if hasattr(item, slot)} | dict(getattr(item, "__dict__", {}))


def _slots_of(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return tuple(slot for slot in ([slots] if isinstance(slots, str) else slots) if not slot.startswith("__"))


def describe_function(function: Any) -> str:
    """Name and a digest of what a function does: its code, the numbers and texts among defaults and enclosed values.

    Stable between processes of one Python. What may change while it is used, lists and tensors that it fills, and the
    functions that it calls are known by type and name alone.
    """
    if function is None:
        return "None"
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{name} {hashlib.sha256(_parts_of(function, ()).encode()).hexdigest()[:16]}"


def _parts_of(value: Any, above: tuple[int, ...]) -> str:
    if id(value) in above:
        return "cycle"
    above = (*above, id(value))
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, types.MethodType):
        return f"{_parts_of(value.__func__, above)} of {type(value.__self__).__qualname__}"
    if isinstance(value, functools.partial):
        parts = (value.func, *value.args, *(part for pair in sorted(value.keywords.items()) for part in pair))
        return repr([_parts_of(part, above) for part in parts])
    if isinstance(value, types.FunctionType):
        enclosed = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        with contextlib.suppress(ValueError):  # an empty cell
            enclosed += [cell.cell_contents for cell in value.__closure__ or ()]
        return repr([_code(value.__code__), [_parts_of(part, above) for part in enclosed]])
    kind = type(value)
    call = vars(kind).get("__call__")
    code = _code(call.__code__) if isinstance(call, types.FunctionType) else ""
    return f"{kind.__module__}.{kind.__qualname__} {code}"


def _code(code: types.CodeType) -> str:
    """What a code object does, without where it stands."""

    def constant(value: Any) -> str:
        if isinstance(value, types.CodeType):
            return _code(value)
        return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)

    return repr((code.co_code.hex(), [constant(c) for c in code.co_consts], code.co_names, code.co_varnames))


def dtypes_of(params: Mapping[str, torch.Tensor]) -> str:
    """The dtypes of a model's parameters, as one text."""
    counts: dict[str, int] = {}
    for param in params.values():
        name = str(param.dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
