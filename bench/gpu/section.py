"""One section in a process of its own: ``python -m bench.gpu.section MODULE FUNCTION LINES`` (the driver calls it)."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import sys
import time
import traceback
import warnings
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module")
    parser.add_argument("function")
    parser.add_argument("lines", type=Path)
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--plant", choices=FAULTS)
    arguments = parser.parse_args()
    report = Report(arguments.lines, arguments.plant)
    warnings.filterwarnings("ignore", message=r"(lr|boost|total_steps): ")
    if arguments.simulate:
        from .approximate import draw

        draw()
    module = importlib.import_module(f"{__package__}.{arguments.module}")
    with contextlib.suppress(Absent):
        getattr(module, arguments.function)(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
