"""How the demo's texts become blocks of token ids."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..corpora import LONGEST_DOCUMENT
from ..output import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
