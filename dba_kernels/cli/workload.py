"""What ``collect`` and ``finetune`` share: options, the model on its device, its loss on a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
import torch
from rich.console import Console

from .assets import load_config, load_model
from .files import InputError
from .packing import IGNORED, Batch, Batches, Encoder
from .text import CORPORA, Corpus
from .training import autocast_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "fp32", "mixed", "bf16")

DATA_HELP = f"""\b
Data (one or more paths):
  a.jsonl        one record a line: "messages" (a conversation), or text in --field
  a.json         a list, or a mapping, of such records
  folder/        saved by datasets (save_to_disk), or a folder of files
  anything else  plain text in UTF-8
  {", ".join(CORPORA)}: the corpora of bench/data-packages.txt
"""


def model_option(required: bool = True) -> Callable[[Any], Any]:
    return click.option(
        "--model", metavar="DIR|ID", required=required, help="Causal language model: folder, .gguf file or hub id."
    )


@dataclass(frozen=True)
class DataOptions:
    """What :func:`data_options` gives a command."""

    field: str
    loss_on: str
    length: int
    seed: int
    dtype: str
    device: str | None


def data_options(command: Any) -> Any:
    """The options that say which text is read, and how it becomes batches: :class:`DataOptions`."""
    for option in reversed(
        (
            click.option("--field", default="text", show_default=True, help="Where a record keeps its text."),
            click.option(
                "--loss-on",
                type=click.Choice(["assistant", "all"]),
                default="assistant",
                show_default=True,
                help="Of conversations: learn from the assistant's turns, or from every token.",
            ),
            click.option("--length", type=click.IntRange(8), default=512, show_default=True, help="Tokens per row."),
            click.option(
                "--seed", type=click.IntRange(0), default=0, show_default=True, help="Order of the documents."
            ),
            click.option(
                "--dtype",
                type=click.Choice(DTYPES),
                default="auto",
                show_default=True,
                help="fp32; bf16; mixed: fp32 weights, forward and backward in bf16; auto: bf16 if the model was saved "
                "in 16 bits, else mixed where the device is fast in bf16, else fp32.",
            ),
            click.option("--device", help="cpu, cuda, cuda:1 …  [default: cuda if there is one]"),
        )
    ):
        command = option(command)
    return command


def paths_option(name: str, required: bool, help: str) -> Callable[[Any], Any]:
    """An option that takes one or more paths, in a :class:`PathsCommand`."""
    return click.option(name, metavar="PATH…", multiple=True, required=required, help=help)


class PathsCommand(click.Command):
    """Lets repeatable options take several values at once, as a shell's ``*.jsonl`` gives them: ``--data a b c``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        repeatable = {name for p in self.params if isinstance(p, click.Option) and p.multiple for name in p.opts}
        expanded: list[str] = []
        current, has_value = "", False
        for arg in args:
            if arg.startswith("-"):
                name, _, value = arg.partition("=")
                current, has_value = name if name in repeatable else "", bool(value)
                expanded.append(arg)
            else:
                expanded += [current, arg] if current and has_value else [arg]
                has_value = True
        return super().parse_args(ctx, expanded)


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
        return self.model.device

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def batches(self, corpus: Corpus, *, loss_on: str, length: int, size: int, seed: int, repeat: bool) -> Batches:
        encoder = Encoder(self.tokenizer, loss_on)
        return Batches(corpus, encoder, length=length, size=size, seed=seed, repeat=repeat)

    @torch.no_grad()
    def separates_documents(self) -> bool:
        """Whether what the model says of a row's second document is the same whatever the first one is.

        Tried, not looked up: linear attention, state-space layers and older attention masks do not read positions.
        """
        first, second = torch.arange(8), torch.arange(8)
        rows = torch.stack([torch.cat((first + shift, second)) for shift in (0, 8)])
        inputs = {"input_ids": rows % self.model.get_input_embeddings().num_embeddings}
        if self.takes_positions:
            inputs["position_ids"] = torch.cat((first, second)).expand_as(rows)
        said = self.model(**{k: v.to(self.device) for k, v in inputs.items()}).logits[:, len(first) :]
        rounding = torch.finfo(said.dtype).eps * said.abs().max()  # of experts that batch their tokens otherwise
        return bool((said[0] - said[1]).abs().max() <= rounding)

    def loss(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """Mean loss per target token of a batch, fp32 scalar, and the number of targets."""
        targets = count_targets(batch)
        inputs = {k: v.to(self.device) for k, v in batch.items() if k != "position_ids" or self.takes_positions}
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == "mixed"):
            return self.model(**inputs).loss, targets


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
        loaded.to(place)  # type: ignore[arg-type]  # transformers wraps it untyped
    use_cache = bool(getattr(loaded.config, "use_cache", False))
    loaded.config.use_cache = False  # a cache would hide from the model that a row holds several documents
    takes_positions = "position_ids" in inspect.signature(loaded.forward).parameters
    workload = Workload(loaded, tokenizer, source, chosen, use_cache, takes_positions)
    console.print(f"model    {source} ({workload.parameters:,} parameters, {chosen}, {place})", soft_wrap=True)
    if not workload.separates_documents():
        console.print(
            "note     this architecture does not keep the documents of one row apart: each sees those before it. "
            "Documents of about --length tokens make that rare",
            soft_wrap=True,
        )
    return workload


def choose_device(name: str | None, local_rank: int) -> torch.device:
    default = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name or default)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device: expected a device that torch can use, got {name!r}: {reason}") from error
    return device


def choose_dtype(name: str, model: str | None, device: torch.device) -> str:
    if name != "auto":
        return name
    saved = getattr(load_config(model)[0], "dtype", None)
    if saved in (torch.bfloat16, torch.float16):
        return "bf16"
    return "mixed" if autocast_dtype(device) is not None else "fp32"
