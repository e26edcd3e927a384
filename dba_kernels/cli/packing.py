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

from .conversations import LEARNED, Conversation, Document, conversation
from .output import InputError
from .reading import check_text
from .text import Corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label at which Hugging Face models predict nothing."""

LOOKED_THROUGH = 10_000
"""Documents in which the first one that cannot be read is looked for, when one was met."""

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
    document and is not a target. A conversation goes through the chat template, with its tools; targets are the
    assistant's turns (but not one of weight 0), or all tokens. The template's ``{% generation %}`` marks say which
    turns those are; without marks they are found by rendering the conversation up to each turn, which needs a template
    that only ever appends.

    Args:
        tokenizer: a fast one for conversations.
        loss_on: ``"assistant"`` or ``"all"``, for conversations.
        vocabulary: rows of the model's embedding; None: any token will do.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, loss_on: str = "assistant", vocabulary: int | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        self.vocabulary = vocabulary
        self.roles: set[str] = set()  # of the conversations seen
        self._prompt: str | None = None

    @property
    def padding(self) -> int:
        """Any token: padding is never a target, and comes after all that is."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((token for token in known if token is not None and token < (self.vocabulary or token + 1)), 0)

    def __call__(self, document: Document | list[Any]) -> Example:
        """
        Args:
            document: a text, a conversation, or its list of messages.

        Raises:
            InputError: a conversation of another form, that the tokenizer has no template for, or in which it cannot
                find the turns; a token that the model has no embedding for.
        """
        if isinstance(document, str):
            ids = list(self.tokenizer(check_text(document), verbose=False)["input_ids"])
            end = self.tokenizer.eos_token_id
            if end is not None and ids[-1:] != [end]:
                ids.append(end)
            targets = [end is None or i < len(ids) - 1 for i in range(len(ids))]
        else:
            talk = document if isinstance(document, Conversation) else conversation(document)
            self.roles.update(message["role"] for message in talk.messages)
            ids, targets = self._conversation(talk)
        self._check_tokens(ids)
        labels = [
            token if i and target else IGNORED for i, (token, target) in enumerate(zip(ids, targets, strict=True))
        ]
        return Example(ids, labels, whole=not isinstance(document, str))

    def _check_tokens(self, ids: list[int]) -> None:
        largest = max(ids, default=0)
        if self.vocabulary is not None and largest >= self.vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise InputError(
                f"token {token!r}: expected an id below {self.vocabulary}, the rows of the model's embedding, got "
                f"{largest}; give the model its own tokenizer, or resize its embedding to the tokenizer"
            )

    def _conversation(self, talk: Conversation) -> tuple[list[int], list[bool]]:
        """Token ids, and which of them are targets."""
        template = self._template_of(talk)
        if self.loss_on == "assistant" and _GENERATION.search(template):
            if any(message.get("weight") == 0 for message in talk.messages):
                raise InputError(
                    "message of weight 0: expected a chat template without {% generation %} marks, which cannot leave "
                    "a turn out; leave the weights out, or take the marks out of the template"
                )
            marked = self._render(talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            return list(marked["input_ids"]), [bool(target) for target in marked["assistant_masks"]]
        text = self._render(talk)
        spans = [(0, len(text))] if self.loss_on == "all" else self._assistant_spans(talk, text)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts = [start for start, _ in encoded["offset_mapping"]]
        return list(encoded["input_ids"]), [any(a <= start < b for a, b in spans) for start in starts]

    def _template_of(self, talk: Conversation) -> str:
        """The tokenizer's template for this conversation, which must have a place for all that is to be learned."""
        if not self.tokenizer.chat_template or not self.tokenizer.is_fast:
            lacking = "a fast tokenizer" if self.tokenizer.chat_template else "a tokenizer with a chat template"
            raise InputError(f"data with 'messages': expected {lacking}, got none; give plain text, or another --model")
        try:
            template: str = self.tokenizer.get_chat_template(None, talk.tools)
        except ValueError as error:
            raise InputError(f"chat template: {error}") from error
        used = {key for message in talk.messages for key in LEARNED if message.get(key)} | (
            {"tools"} if talk.tools else set()
        )
        if missing := sorted(key for key in used if key not in template):
            raise InputError(
                f"conversation with {', '.join(map(repr, missing))}: expected a chat template that has a place for it, "
                "got one that leaves it out; take it out of the data, or use a model whose template knows it"
            )
        return template

    def _render(self, talk: Conversation, tokenize: bool = False, **more: Any) -> Any:
        try:
            made = self.tokenizer.apply_chat_template(talk.messages, tools=talk.tools, tokenize=tokenize, **more)
        except Exception as error:  # a template is a program: it may throw anything
            roles = [message["role"] for message in talk.messages]
            raise InputError(
                f"conversation with roles {str(roles)[:400]}: expected one that the model's chat template takes; it "
                f"says: {error}"
            ) from error
        return made if tokenize else check_text(made)

    def _assistant_spans(self, talk: Conversation, text: str) -> list[tuple[int, int]]:
        """Where in the rendered conversation the assistant's turns stand, in characters, their end marks included."""
        spans = []
        for i, message in enumerate(talk.messages):
            if message["role"] != "assistant" or message.get("weight") == 0:
                continue
            after = self._render(Conversation(talk.messages[: i + 1], talk.tools)).rstrip()  # white space is no answer
            if i:
                before = self._render(Conversation(talk.messages[:i], talk.tools), add_generation_prompt=True)
            else:  # nothing comes before but what the template puts there
                before = after[: after.find(self._assistant_mark())] + self._assistant_mark()
            if not (text.startswith(after) and after.startswith(before)):
                raise InputError(
                    "chat template: it has no {% generation %} marks and rewrites earlier turns, so the assistant's "
                    "tokens cannot be told from the others; use --loss-on all, or add the marks to the template"
                )
            spans.append((len(before), len(after)))
        return spans

    def _assistant_mark(self) -> str:
        """What the template writes before an answer."""
        if self._prompt is None:
            question = Conversation([{"role": "user", "content": "?"}])
            with_mark = self._render(question, add_generation_prompt=True)
            self._prompt = with_mark.removeprefix(self._render(question))
        return self._prompt


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
            for index in self.corpus.order(self.seed + epoch):
                yield self._example(index)
            if self.counts.empty == self.counts.documents:
                raise InputError(
                    f"data {', '.join(self.corpus.names)}: expected targets, found none: {self._why_none()}"
                )
            if not self.repeat:
                return
            epoch += 1

    def _example(self, index: int) -> Example:
        """One document, encoded.

        Raises:
            InputError: it cannot be; the first such document of the files is named, in whatever order they are read.
        """
        try:
            return self._encoded(index)
        except InputError:
            for earlier in range(min(index, LOOKED_THROUGH)):
                self._encoded(earlier)
            raise

    def _encoded(self, index: int) -> Example:
        document = self.corpus.document(index)
        try:
            return self.encoder(document)
        except InputError as error:
            raise InputError(f"{self.corpus.where(index)}: {error.message}") from error

    def _why_none(self) -> str:
        """Why no document has a target."""
        roles = self.encoder.roles
        if roles and "assistant" not in roles:
            got = ", ".join(map(repr, sorted(roles)))
            return f"no turn is the role 'assistant' (there are {got[:200]}); name it so, or use --loss-on all"
        if self.counts.truncated:
            return f"the first {self.length} tokens of each conversation come before an answer; raise --length"
        return "every document is empty, or a single token; give files with text in them"


def _stacked(rows: list[Batch]) -> Batch:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
