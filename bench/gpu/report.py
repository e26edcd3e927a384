"""What a section writes while it runs: a line when a check begins, one when it has ended; faults to plant."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .driver import BROKEN_DEVICE, read_lines

DEADLY = ("CUDA error", "illegal memory access", "unspecified launch failure", "misaligned address", "device-side")
"""What CUDA's messages say when every later call of the process fails too."""


class Absent(Exception):
    """What a check needs is not on this machine; it says what."""


class Report:
    """The section's lines. What a former process of this section has begun is not begun again."""

    def __init__(self, path: Path, planted: str | None = None):
        self.path, self.planted = path, planted
        self.begun = {line["begin"] for line in read_lines(path) if "begin" in line}

    def attempt(self, name: str, job: Callable[..., Any], *arguments: Any) -> None:
        """Run one check; what it returns are its figures. An exception of any kind is its failure."""
        if name in self.begun:
            return
        self.begun.add(name)
        self._write({"begin": name})
        end: dict[str, Any] = {"end": name}
        deadly = False
        try:
            figures = job(*arguments)
            _synchronize()
            if figures is not None:
                end["figures"] = figures
        except Absent as absent:
            end["skipped"] = str(absent)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = "" if isinstance(error, AssertionError) else f" ({Path(where.filename).name}:{where.lineno})"
            end["failed"] = f"{type(error).__name__}: {str(error)[:600]}{place}"
            deadly = any(word in str(error) for word in DEADLY)
        self._write(end)
        if deadly:
            sys.stdout.flush()
            os._exit(BROKEN_DEVICE)  # tearing a broken device down may hang
        if self.planted is not None and "planted" not in self.begun:
            self.attempt("planted", FAULTS[self.planted])

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as lines:
            lines.write(json.dumps(line) + "\n")


def _hang() -> None:
    time.sleep(3600)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _fail() -> None:
    raise AssertionError("a planted failure")


def _break_device() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered (planted)")


FAULTS: dict[str, Callable[[], None]] = {"hang": _hang, "signal": _die, "fail": _fail, "device": _break_device}


def _synchronize() -> None:
    """An error of the device belongs to the check that made it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
