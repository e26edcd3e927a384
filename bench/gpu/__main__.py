"""All checks and benchmarks that need a GPU, in one unattended run of under nine minutes; one JSON file says it all.

    python -m bench.gpu                          # on a GPU
    python -m bench.gpu --simulate               # the same driver and sections here, in Triton's interpreter
    python -m bench.gpu --simulate --plant       # with a section that hangs, one that dies, one that fails, one whose
                                                 # device breaks: reported and survived
    python -m bench.gpu --only kernels --only graphs

Needs torch, triton, numpy and safetensors; nothing installed, no native library, no pytest. Each section runs in a
process of its own, the most important first. Times taken in the interpreter say nothing about a GPU: they are not
shown, and the file marks them.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from .driver import SECTIONS, Options, run_all
from .printing import print_section, print_summary

PLANTED = {"first": "fail", "scalars": "signal", "graphs": "hang", "placement": "device"}


def planted(words: list[str] | None) -> dict[str, str]:
    """``SECTION=FAULT`` pairs; the usual four where none is given."""
    if words is None:
        return {}
    return dict(word.split("=", 1) for word in words) if words else PLANTED


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", action="store_true", help="in Triton's interpreter, without a GPU")
    parser.add_argument("--plant", nargs="*", metavar="SECTION=FAULT", help="faults: hang, signal, fail, device")
    parser.add_argument("--only", action="append", choices=[s.name for s in SECTIONS], help="this section; repeatable")
    parser.add_argument("--budget", type=float, help="seconds for everything (530; simulated 1,800)")
    parser.add_argument("--patience", type=float, help="factor on what each section may take (1; simulated 4)")
    parser.add_argument("--stall", type=float, default=60.0, help="seconds of silence that mean a hang (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("dba_kernels_gpu.json"), help="where the report goes")
    arguments = parser.parse_args()
    if not arguments.output.resolve().parent.is_dir():
        parser.error(f"--output: the folder {arguments.output.parent} does not exist")
    sections = [section for section in SECTIONS if not arguments.only or section.name in arguments.only]
    # The interpreter takes as long as the CPU is busy otherwise: what is simulated is not how long a section may take.
    usual = (1800.0, 60.0, 4.0) if arguments.simulate else (530.0, 60.0, 1.0)
    given = (arguments.budget, arguments.stall, arguments.patience)
    limits = (default if value is None else value for value, default in zip(given, usual, strict=True))
    options = Options(arguments.simulate, *limits, planted(arguments.plant))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the section that runs is ended too
    report = run_all(sections, options, arguments.output, print_section)
    failed = print_summary(report)
    print(f"written to {arguments.output}: " + (f"{failed} problems" if failed else "all checks passed"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
