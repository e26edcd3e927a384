"""From documents to batches: token ids, labels that mask what is not to be learned, rows of one length.

A row holds as many documents as fit. ``position_ids`` start again at 0 with each document: that is how transformers is
told that the documents of a row do not attend to each other (where the model's attention masks honour it).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .output import InputError
from .text import Corpus, Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label at which Hugging Face models predict nothing."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Batch = dict[str, torch.Tensor]
"""``input_ids``, ``labels``, ``position_ids``, int64 ``[rows, length]``."""


@dataclass(frozen=True)
class Example:
    """One document as tokens.

    Args:
        ids: token ids.
        labels: the same, or ``IGNORED``, per token; the first is never a target.
        whole: must not be cut between rows (a conversation: its end means nothing without its beginning).
    """

    ids: list[int]
    labels: list[int]
    whole: bool


class Encoder:
    """Documents to :class:`Example`.

    Text gets the tokenizer's own special tokens and ends in its end-of-sequence token, which separates it from the next
    document and is not a target. A conversation goes through the chat template; targets are the assistant's turns, or
    all tokens. The template's ``{% generation %}`` marks say which turns those are; without marks they are found by
    rendering the conversation up to each turn, which needs a template that only ever appends.

    Args:
        tokenizer: a fast one for conversations.
        loss_on: ``"assistant"`` or ``"all"``, for conversations.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss_on: str = "assistant") -> None:
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        self.conversations = 0

    @property
    def padding(self) -> int:
        """Any token: padding is never a target, and comes after all that is."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((token for token in known if token is not None), 0)

    def __call__(self, document: str | Messages) -> Example:
        """
        Raises:
            InputError: a conversation that the tokenizer has no template for, or in which it cannot find the turns.
        """
        if isinstance(document, str):
            ids = list(self.tokenizer(document, verbose=False)["input_ids"])
            end = self.tokenizer.eos_token_id
            if end is not None and ids[-1:] != [end]:
                ids.append(end)
            targets = [end is None or i < len(ids) - 1 for i in range(len(ids))]
        else:
            self.conversations += 1
            ids, targets = self._conversation(document)
        labels = [
            token if i and target else IGNORED for i, (token, target) in enumerate(zip(ids, targets, strict=True))
        ]
        return Example(ids, labels, whole=not isinstance(document, str))

    def _conversation(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Token ids, and which of them are targets."""
        template = self.tokenizer.chat_template
        if not template or not self.tokenizer.is_fast:
            lacking = "a fast tokenizer" if template else "a tokenizer with a chat template"
            raise InputError(f"data with 'messages': expected {lacking}, got none; give plain text, or another --model")
        if self.loss_on == "assistant" and isinstance(template, str) and _GENERATION.search(template):
            marked = self._template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            return list(marked["input_ids"]), [bool(target) for target in marked["assistant_masks"]]
        text = self._template(messages)
        spans = [(0, len(text))] if self.loss_on == "all" else self._assistant_spans(messages, text)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts = [start for start, _ in encoded["offset_mapping"]]
        return list(encoded["input_ids"]), [any(a <= start < b for a, b in spans) for start in starts]

    def _template(self, messages: Messages, tokenize: bool = False, **more: Any) -> Any:
        from jinja2.exceptions import TemplateError

        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=tokenize, **more)
        except (TemplateError, KeyError, TypeError, ValueError) as error:
            roles = [m.get("role") if isinstance(m, dict) else m for m in messages]
            raise InputError(
                f"conversation with roles {roles}: expected one that the model's chat template takes; it says: {error}"
            ) from error

    def _assistant_spans(self, messages: Messages, text: str) -> list[tuple[int, int]]:
        """Where in the rendered conversation the assistant's turns stand, in characters, their end marks included."""
        spans = []
        for i, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before = self._template(messages[:i], add_generation_prompt=True)
            after = self._template(messages[: i + 1]).rstrip()  # white space after the end of a turn is no answer
            if not (text.startswith(after) and after.startswith(before)):
                raise InputError(
                    "chat template: it has no {% generation %} marks and rewrites earlier turns, so the assistant's "
                    "tokens cannot be told from the others; use --loss-on all, or add the marks to the template"
                )
            spans.append((len(before), len(after)))
        return spans


@dataclass
class Counts:
    """What packing left out: documents without a target, and tokens cut off conversations longer than a row."""

    documents: int = 0
    empty: int = 0
    truncated: int = 0

    def __str__(self) -> str:
        notes = [f"{self.empty:,} documents without anything to learn were left out"] if self.empty else []
        notes += [f"{self.truncated:,} conversations were cut to --length"] if self.truncated else []
        return "; ".join(notes)


class Rows:
    """Rows of ``length`` tokens from examples, in order; the last one is padded.

    Text runs on from row to row. A conversation that does not fit the rest of a row starts the next one, and is cut if
    it is longer than a row.
    """

    def __init__(self, examples: Iterable[Example], length: int, padding: int) -> None:
        self.examples, self.length, self.padding = examples, length, padding
        self.counts = Counts()

    def __iter__(self) -> Iterator[Batch]:
        row: list[tuple[int, int, int]] = []  # (id, label, position)
        for example in self.examples:
            self.counts.documents += 1
            ids, labels = example.ids, example.labels
            if example.whole and len(ids) > self.length:
                self.counts.truncated += 1
                ids, labels = ids[: self.length], labels[: self.length]
            if all(label == IGNORED for label in labels):
                self.counts.empty += 1
                continue
            if example.whole and len(row) + len(ids) > self.length:
                yield self._padded(row)
                row = []
            start = 0
            while start < len(ids):
                stop = start + self.length - len(row)
                row += [(*pair, i) for i, pair in enumerate(zip(ids[start:stop], labels[start:stop], strict=True))]
                start = stop
                if len(row) == self.length:
                    yield self._padded(row)
                    row = []
        if row:
            yield self._padded(row)

    def _padded(self, row: list[tuple[int, int, int]]) -> Batch:
        missing = self.length - len(row)
        filled = row + [(self.padding, IGNORED, row[-1][2] + 1 + i) for i in range(missing)]
        ids, labels, positions = torch.tensor(filled, dtype=torch.int64).T.contiguous()
        return {"input_ids": ids, "labels": labels, "position_ids": positions}


class Batches:
    """Batches of ``size`` rows; the data once, or again and again in another order each time.

    Args:
        corpus: the documents.
        encoder: how they become tokens.
        length, size: tokens per row, rows per batch.
        seed: of the order.
        repeat: start again where the data end; otherwise the last batch may have fewer rows.

    Raises:
        InputError: (while iterating) nothing in the data to learn from, or a record that cannot be read.
    """

    def __init__(
        self, corpus: Corpus, encoder: Encoder, *, length: int, size: int, seed: int, repeat: bool = False
    ) -> None:
        self.corpus, self.encoder, self.length, self.size = corpus, encoder, length, size
        self.seed, self.repeat = seed, repeat
        self.counts = Counts()

    def __iter__(self) -> Iterator[Batch]:
        rows = Rows(self._examples(), self.length, self.encoder.padding)
        self.counts = rows.counts
        batch: list[Batch] = []
        for row in rows:
            batch.append(row)
            if len(batch) == self.size:
                yield _stacked(batch)
                batch = []
        if batch:
            yield _stacked(batch)

    def _examples(self) -> Iterator[Example]:
        epoch = 0
        while True:
            yield from map(self.encoder, self.corpus.in_order(self.seed + epoch))
            if self.counts.empty == self.counts.documents:
                raise InputError(f"data {', '.join(self.corpus.names)}: expected targets, found none in any document")
            if not self.repeat:
                return
            epoch += 1


def _stacked(rows: list[Batch]) -> Batch:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
