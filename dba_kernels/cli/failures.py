"""The one place where what goes wrong becomes a message and an exit status, and where signals are waited for."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

import click
import torch

from .output import InputError, reason_of

DEBUG = "DBA_DEBUG"
SIGNALS = (signal.SIGINT, signal.SIGTERM)
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
"""What torch's RuntimeErrors say of it on a CPU."""


class Stopped(InputError):
    """The user stopped the command; the message says what is kept, and how to go on."""

    exit_code = 128 + signal.SIGINT

    def show(self, file: Any = None) -> None:
        click.echo(self.message, file=file, err=file is None)


class Unexpected(click.ClickException):
    """An error of this library, not of its input."""

    exit_code = 70  # as sysexits.h names an internal error


class Commands(click.Group):
    """A group of commands whose failures end in a message: 1 for bad input, 2 for wrong usage, 130 where the user
    stopped it, 70 for an error of this library; its traceback is there with ``DBA_DEBUG=1``."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # a terminal without ĝ shows ?, and the work goes on
        if _in_main_thread() and os.environ.get("WORLD_SIZE", "1") in ("", "1"):  # torchrun's ranks end each other
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            raise Stopped("stopped") from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # the reader of our output has gone; click ends quietly
            if os.environ.get(DEBUG, "0") not in ("", "0"):
                raise
            raise _explained(error) from error


def _explained(error: Exception) -> click.ClickException:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in str(error) for text in OUT_OF_MEMORY):
        return InputError("out of memory; use fewer rows (--micro-batch, --batch), a smaller --length, or --dtype bf16")
    if isinstance(error, OSError):
        return InputError(f"{error.filename or 'a file'}: {reason_of(error)}")
    said = f"{type(error).__name__}: {error}".splitlines()[0]
    return Unexpected(
        f"{said}\nThis is an error of dba-kernels: run it again with {DEBUG}=1, and report what it prints"
    )


class Interruption:
    """Within it, the first SIGINT or SIGTERM only sets :attr:`asked`, for the work to stop where it can be gone on
    with; the second ends it at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if _in_main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        os.write(2, b"\nstopping after this step; once more to stop at once\n")  # print may be what was interrupted


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
