"""Progress of long work: bars on a terminal, a plain line now and then elsewhere (a log, a pipe, a batch system)."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

SECONDS_BETWEEN_LINES = 15.0
WIDTH = 160


class _Rate(ProgressColumn):
    """Tokens per second of a task that knows how many tokens one of its units holds."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed * task.fields['tokens']:,.0f} tokens/s" if speed else "", style="cyan")


@dataclass
class _Line:
    description: str
    total: int
    tokens: int
    completed: int
    first: int
    started: float
    printed: float


class Lines:
    """What :func:`progress` gives where there is no terminal; the part of ``rich.progress.Progress`` that is used."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._tasks: list[_Line] = []

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def add_task(self, description: str, *, total: int, tokens: int, completed: int = 0) -> TaskID:
        now = time.perf_counter()
        self._tasks.append(_Line(description, total, tokens, completed, completed, now, now))
        return TaskID(len(self._tasks) - 1)

    def advance(self, task: TaskID) -> None:
        line, now = self._tasks[task], time.perf_counter()
        line.completed += 1
        if line.completed < line.total and now - line.printed < SECONDS_BETWEEN_LINES:
            return
        line.printed = now
        seconds, done = max(now - line.started, 1e-9), line.completed - line.first
        left = duration(seconds / done * (line.total - line.completed))
        rest = f"{left} left" if line.completed < line.total else f"took {duration(seconds)}"
        rate = f"{done * line.tokens / seconds:,.0f} tokens/s"
        self.console.print(f"{line.description}: {line.completed}/{line.total}, {rate}, {rest}", soft_wrap=True)


Bars = Progress | Lines


def progress(console: Console) -> Bars:
    """A context whose ``add_task(description, total=, tokens=, completed=)`` and ``advance(task)`` show a count, a rate
    and the time left; ``tokens`` is what one unit holds."""
    if not console.is_terminal:
        return Lines(console)
    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def wide_console(quiet: bool = False) -> Console:
    """A console whose tables are not squeezed to 80 columns where neither a terminal nor ``COLUMNS`` says how wide."""
    console = Console(quiet=quiet)
    known = console.is_terminal or os.environ.get("COLUMNS", "").isdigit()
    return console if known else Console(quiet=quiet, width=WIDTH)


def duration(seconds: float) -> str:
    """``"8 s"``, ``"2 min 05 s"``, ``"3 h 07 min"``."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02} min"
