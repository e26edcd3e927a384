"""One section in a process of its own: ``python -m bench.gpu.section MODULE FUNCTION LINES`` (the driver calls it)."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import warnings
from pathlib import Path

from .report import FAULTS, Absent, Report


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
    name = arguments.module
    module = importlib.import_module(name if "." in name else f"{__package__}.{name}")
    with contextlib.suppress(Absent):
        getattr(module, arguments.function)(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
