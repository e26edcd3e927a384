"""Options that several commands share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from .corpora import CORPORA

DTYPES = ("auto", "fp32", "mixed", "bf16")

DATA_HELP = f"""\b
Data (one or more paths):
  a.jsonl        one record a line (also .ndjson): a conversation in "messages" (or ShareGPT's "conversations"), with
                 its "tools" where it has any, or text in --field
  a.json         a list, or a mapping, of such records
  a.csv, a.tsv   a record a row, --field a name of the first row
  folder/        saved by datasets (save_to_disk), or a folder of files
  anything else  plain text in UTF-8; each of these also as .gz
  {", ".join(CORPORA)}: the corpora of bench/data-packages.txt
"""


COUNT = click.IntRange(1, 2**31 - 1)
ROWS = click.IntRange(1, 2**16)
TOKENS = click.IntRange(8, 2**20)
SEED = click.IntRange(0, 2**62)


class FiniteRange(click.FloatRange):
    """A ``FloatRange`` that also refuses infinity and "nan", which is outside of no range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


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
            click.option("--length", type=TOKENS, default=512, show_default=True, help="Tokens per row."),
            click.option("--seed", type=SEED, default=0, show_default=True, help="Order of the documents."),
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
