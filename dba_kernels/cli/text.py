"""Reading a user's text: files and folders of records of known meaning, as documents in a repeatable order."""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from .corpora import CORPORA, LONGEST_DOCUMENT, load_documents
from .output import InputError

Messages = list[dict[str, Any]]
"""A conversation: ``{"role": …, "content": …}`` per turn, as chat templates take it."""


class JsonLines(Sequence[Any]):
    """The records of a ``.jsonl`` file; lines are found once, and read when they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts, position = array("q"), 0
        try:
            self._file = open(path, "rb")  # noqa: SIM115 - kept open: records are read in any order
            for line in self._file:
                if line.strip():
                    self._starts.append(position)
                position += len(line)
        except OSError as error:
            raise InputError(f"cannot read {str(path)!r}: {error.strerror}") from error

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        self._file.seek(self._starts[index])
        try:
            return json.loads(self._file.readline())
        except ValueError as error:  # of encoding or of JSON
            raise InputError(f"{self.path}, record {index + 1}: expected a line of JSON in UTF-8: {error}") from error


class Corpus:
    """Documents from any number of sources, each a string or a conversation (``Messages``).

    Args:
        paths: ``.jsonl`` files; ``.json`` files (a list, or a mapping, of records); a folder that ``datasets`` saved; a
            folder of files; a name in :data:`CORPORA`; any other file is plain text, cut at line ends into documents
            of at most :data:`LONGEST_DOCUMENT` characters.
        field: where a record keeps its text, unless it has ``messages``.

    Raises:
        InputError: nothing there, unreadable, or without a document.
    """

    def __init__(self, paths: Iterable[str], field: str = "text") -> None:
        self.names = tuple(paths)
        self.field = field
        named = [(name, source) for path in self.names for name, source in _open(path)]
        self._sources = [source for _, source in named]
        self._source_names = [name for name, _ in named]
        self._ends = list(accumulate(len(source) for source in self._sources))
        if len(self) == 0:
            raise InputError(f"{', '.join(self.names)}: expected documents, found none; give files with text in them")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def document(self, index: int) -> str | Messages:
        """The text, or the conversation, of one record.

        Raises:
            InputError: the record has neither ``messages`` nor the field.
        """
        source = bisect_right(self._ends, index)
        inner = index - (self._ends[source - 1] if source else 0)
        record = self._sources[source][inner]
        if isinstance(record, str):
            return record
        messages, text = (record.get("messages"), record.get(self.field)) if isinstance(record, dict) else (None, None)
        if isinstance(messages, list):
            return messages
        if isinstance(text, str):
            return text
        got = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
        raise InputError(
            f"{self._source_names[source]}, record {inner + 1}: expected text in field {self.field!r}, or 'messages', "
            f"got {got}; name the field with --field"
        )

    def in_order(self, seed: int) -> Iterator[str | Messages]:
        """Every document once, in an order that depends on ``seed`` and the number of documents alone."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return map(self.document, order.tolist())


def _open(name: str) -> Iterator[tuple[str, Sequence[Any]]]:
    path = Path(name)
    if not path.exists():
        if name in CORPORA:
            yield name, load_documents(name)[0]
            return
        raise InputError(
            f"data {name!r}: expected a file, a folder, or one of {', '.join(CORPORA)}; there is no such file"
        )
    if not path.is_dir():
        yield name, _records(path)
    elif (path / "dataset_dict.json").exists():
        splits = sorted(p.name for p in path.iterdir() if p.is_dir())
        raise InputError(f"data {name!r}: expected one split, found {', '.join(splits)}; give {path / splits[0]}")
    elif (path / "state.json").exists():
        yield name, _dataset(path)
    else:
        files = sorted(p for p in path.iterdir() if not p.name.startswith("."))
        if folders := [p for p in files if p.is_dir()]:
            raise InputError(
                f"data {name!r}: expected a folder of files, found the folder {folders[0].name!r} in it; give "
                f"{folders[0]} by itself, and the files beside it one by one"
            )
        if not files:
            raise InputError(f"data {name!r}: expected a folder of files or one that datasets saved; it holds no file")
        yield from ((str(file), _records(file)) for file in files)


def _dataset(path: Path) -> Sequence[Any]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"data {str(path)!r} was saved by datasets; run: pip install datasets ({error})") from error
    try:
        loaded: Sequence[Any] = datasets.load_from_disk(str(path))
        return loaded
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {str(path)!r} with datasets.load_from_disk: {error}") from error


def _records(path: Path) -> Sequence[Any]:
    if path.suffix.lower() == ".jsonl":
        return JsonLines(path)
    text = _text(path)
    if path.suffix.lower() != ".json":
        return list(_pieces(text))
    try:
        data = json.loads(text)
    except ValueError as error:
        raise InputError(f"cannot read {str(path)!r} as JSON: {error}") from error
    return list(data.values()) if isinstance(data, dict) else data if isinstance(data, list) else [data]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {str(path)!r}: expected text in UTF-8: {error}") from error
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error.strerror}") from error


def _pieces(text: str) -> Iterator[str]:
    """Cut at the last line end, or else the last space, within ``LONGEST_DOCUMENT``."""
    start = 0
    while start < len(text):
        stop = start + LONGEST_DOCUMENT
        if stop < len(text):
            cut = next((at for mark in "\n " if (at := text.rfind(mark, start, stop)) > start), stop - 1)
            stop = cut + 1
        if piece := text[start:stop].strip():
            yield piece
        start = stop
