"""What ``collect`` and ``finetune`` share: the model on its device, and its loss on a batch."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from .devices import autocast_dtype, choose_device
from .model_checks import check_length
from .models import load_config, load_model
from .output import InputError
from .packing import IGNORED, Batch, Batches, Encoder
from .text import Corpus

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Workload:
    """A model on its device, ready to train or to be measured.

    Args:
        source: where the model was read from.
        dtype: one of ``DTYPES``, "auto" resolved.
        use_cache: the configuration's own setting: while training it is off.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    dtype: str
    use_cache: bool
    takes_positions: bool

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def batches(self, corpus: Corpus, *, loss_on: str, length: int, size: int, seed: int, repeat: bool) -> Batches:
        check_length(self.model.config, length)
        encoder = Encoder(self.tokenizer, loss_on, self.model.get_input_embeddings().num_embeddings)
        return Batches(corpus, encoder, length=length, size=size, seed=seed, repeat=repeat)

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass in place of keeping them; weights and losses stay as they are.

        Raises:
            InputError: the model cannot.
        """
        if not getattr(self.model, "supports_gradient_checkpointing", False):
            name = type(self.model).__name__
            raise InputError(f"--gradient-checkpointing: expected a model that has it, got {name}; leave it out")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the name that transformers 6 has for it
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def separates_documents(self) -> bool:
        """Whether what the model says of a row's second document is the same whatever the first one is.

        Tried, not looked up: linear attention, state-space layers and older attention masks do not read positions.
        """
        first, second = torch.arange(8), torch.arange(8)
        rows = torch.stack([torch.cat((first + shift, second)) for shift in (0, 8)])
        return _agree(self._said(rows, torch.cat((first, second)))[:, len(first) :])

    def looks_ahead(self) -> bool:
        """Whether what the model says at a token depends on later ones, as an encoder's words do."""
        first = torch.arange(8)
        rows = torch.stack([torch.cat((first, first + shift)) for shift in (0, 8)])
        return not _agree(self._said(rows, torch.arange(16))[:, : len(first)])

    @torch.no_grad()
    def _said(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits ``[2, 16, vocabulary]`` for two rows of token ids, taken modulo the vocabulary.

        Raises:
            InputError: the model cannot compute them, or they are not finite.
        """
        inputs = {"input_ids": rows % self.model.get_input_embeddings().num_embeddings}
        if self.takes_positions:
            inputs["position_ids"] = positions.expand_as(rows)
        try:
            logits: torch.Tensor = self.model(**{k: v.to(self.device) for k, v in inputs.items()}).logits
        except Exception as error:  # a configuration that does not fit together fails anywhere
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise InputError(f"model {self.source!r}: expected that it computes, got {reason}; load it anew") from error
        if not bool(logits.isfinite().all()):
            raise InputError(
                f"model {self.source!r}: expected finite outputs, got NaN or infinity; its weights are damaged, or "
                "need a wider --dtype"
            )
        return logits

    def loss(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """Mean loss per target token of a batch, fp32 scalar, and the number of targets."""
        targets = count_targets(batch)
        inputs = {k: v.to(self.device) for k, v in batch.items() if k != "position_ids" or self.takes_positions}
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == "mixed"):
            return self.model(**inputs).loss, targets


def _agree(said: torch.Tensor) -> bool:
    """Whether both rows of ``[2, tokens, vocabulary]`` are equal up to rounding."""
    rounding = torch.finfo(said.dtype).eps * said.abs().max()  # of experts that batch their tokens otherwise
    return bool((said[0] - said[1]).abs().max() <= rounding)


def count_targets(batch: Batch) -> int:
    """Tokens that are predicted: the first of a row never is."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def load(model: str | None, dtype: str, device: str | None, console: Console, local_rank: int = 0) -> Workload:
    """Read the model and put it on its device.

    Raises:
        InputError: no such model or device.
    """
    place = choose_device(device, local_rank)
    chosen = choose_dtype(dtype, model, place)
    with console.status("loading the model"):
        loaded, tokenizer, source = load_model(model, torch.bfloat16 if chosen == "bf16" else torch.float32)
        loaded.to(place)
    use_cache = bool(getattr(loaded.config, "use_cache", False))
    loaded.config.use_cache = False  # a cache would hide from the model that a row holds several documents
    takes_positions = "position_ids" in inspect.signature(loaded.forward).parameters
    workload = Workload(loaded, tokenizer, source, chosen, use_cache, takes_positions)
    if workload.looks_ahead():
        raise InputError(
            f"--model: expected a causal language model, got {source!r}, whose outputs depend on later tokens, as an "
            "encoder's do; give a model that was trained to continue text"
        )
    console.print(f"model    {source} ({workload.parameters:,} parameters, {chosen}, {place})", soft_wrap=True)
    if not workload.separates_documents():
        console.print(
            "note     this architecture does not keep the documents of one row apart: each sees those before it. "
            "Documents of about --length tokens make that rare",
            soft_wrap=True,
        )
    return workload


def choose_dtype(name: str, model: str | None, device: torch.device) -> str:
    if name != "auto":
        return name
    saved = getattr(load_config(model)[0], "dtype", None)
    if saved in (torch.bfloat16, torch.float16):
        return "bf16"
    return "mixed" if autocast_dtype(device) is not None else "fp32"
