"""Reading a user's text: files and folders of records of known meaning, as documents in a repeatable order."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from .conversations import Document, as_document, is_record
from .corpora import CORPORA, LONGEST_DOCUMENT, load_documents
from .output import InputError
from .reading import read_records, unreadable


class Corpus:
    """Documents from any number of sources, each a text or a conversation.

    Args:
        paths: files of JSON lines (``.jsonl``, ``.ndjson``), JSON (a list, or a mapping, of records) or a table
            (``.csv``, ``.tsv``, names in the first row), each also with ``.gz``; a folder that ``datasets`` saved; a
            folder of files; a name in :data:`CORPORA`; any other file is plain text, cut at line ends into documents
            of at most :data:`LONGEST_DOCUMENT` characters.
        field: where a record keeps its text, unless it has ``messages`` (or ShareGPT's ``conversations``).

    Raises:
        InputError: nothing there, unreadable, or without a document.
    """

    def __init__(self, paths: Iterable[str], field: str = "text") -> None:
        self.names = tuple(paths)
        self.field = field
        named = [(name, source) for path in self.names for name, source in self._open(path)]
        self._sources = [source for _, source in named]
        self._source_names = [name for name, _ in named]
        self._ends = list(accumulate(len(source) for source in self._sources))
        if len(self) == 0:
            raise InputError(f"{', '.join(self.names)}: expected documents, found none; give files with text in them")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _place(self, index: int) -> tuple[int, int]:
        """Source, and record in it, from 0."""
        source = bisect_right(self._ends, index)
        return source, index - (self._ends[source - 1] if source else 0)

    def where(self, index: int) -> str:
        """File and record, as messages name them."""
        source, inner = self._place(index)
        return f"{self._source_names[source]}, record {inner + 1}"

    def document(self, index: int) -> Document:
        """The text, or the conversation, of one record.

        Raises:
            InputError: the record has neither ``messages`` nor the field.
        """
        source, inner = self._place(index)
        record = self._sources[source][inner]
        try:
            return as_document(record, self.field)
        except InputError as error:
            raise InputError(f"{self.where(index)}: {error.message}") from error

    def order(self, seed: int) -> list[int]:
        """Every index once, in an order that depends on ``seed`` and the number of documents alone."""
        order: list[int] = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        return order

    def in_order(self, seed: int) -> Iterator[Document]:
        """Every document once, by :meth:`order`."""
        return map(self.document, self.order(seed))

    def _open(self, name: str) -> Iterator[tuple[str, Sequence[Any]]]:
        path = Path(name)
        try:
            if path.is_dir():
                yield from self._open_folder(path)
            elif path.exists():
                yield name, self._records(path)
            elif name in CORPORA:
                yield name, load_documents(name)[0]
            else:
                known = ", ".join(CORPORA)
                raise InputError(f"data {name!r}: expected a file, a folder, or one of {known}; there is no such file")
        except (OSError, ValueError) as error:  # no right to look, or no name that a file can have
            raise unreadable(path, error) from error

    def _open_folder(self, path: Path) -> Iterator[tuple[str, Sequence[Any]]]:
        name = str(path)
        if (path / "dataset_dict.json").exists():
            splits = sorted(p.name for p in path.iterdir() if p.is_dir())
            advice = f"give {path / splits[0]}" if splits else "save it again"
            raise InputError(f"data {name!r}: expected one split, found {', '.join(splits) or 'none'}; {advice}")
        if (path / "state.json").exists():
            yield name, _dataset(path)
            return
        files = sorted(p for p in path.iterdir() if not p.name.startswith("."))
        if folders := [p for p in files if p.is_dir()]:
            raise InputError(
                f"data {name!r}: expected a folder of files, found the folder {folders[0].name!r} in it; give "
                f"{folders[0]} by itself, and the files beside it one by one"
            )
        if not files:
            raise InputError(f"data {name!r}: expected a folder of files or one that datasets saved; it holds no file")
        yield from ((str(file), self._records(file)) for file in files)

    def _records(self, path: Path) -> Sequence[Any]:
        return read_records(path, lambda data: is_record(data, self.field), LONGEST_DOCUMENT)


def _dataset(path: Path) -> Sequence[Any]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"data {str(path)!r} was saved by datasets; run: pip install datasets ({error})") from error
    try:
        loaded: Sequence[Any] = datasets.load_from_disk(str(path))
        return loaded
    except Exception as error:  # whatever a damaged folder makes it and Arrow throw
        raise InputError(f"cannot read {str(path)!r} with datasets.load_from_disk: {error}") from error
