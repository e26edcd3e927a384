"""Runs the sections, each in a process of its own; nothing that happens in one costs another.

This process imports neither torch nor the library. A section writes one line when it begins a check and one when it
has ended; what died, hung or broke the device in between has failed, and the section goes on behind it in a fresh
process. The report is rewritten after every section.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
BROKEN_DEVICE = 70
"""Exit status of a section after an error that no later call of its process survives."""
DEVICE_BROKE = "the device was left broken, the section began anew"
RESTARTS = 4
SLOWEST_START = 60.0
"""Seconds until the first line: imports, and a device that wakes up."""


@dataclass(frozen=True)
class Section:
    """``bench.gpu.<module>``'s function ``run``, or the one named; seconds it may take. A dotted module is whole."""

    name: str
    module: str
    timeout: float
    function: str = "run"


SECTIONS = (
    Section("environment", "device", 40, "environment"),
    Section("first", "first", 60),
    Section("compile", "compile_ahead", 100),
    Section("kernels", "kernels", 90),
    Section("scalars", "scalars", 40),
    Section("training", "training", 60),
    Section("placement", "placement", 40),
    Section("graphs", "graphs", 50),
    Section("quiet", "quiet", 50),
    Section("speed", "speed", 70),
    Section("steps", "steps", 80),
    Section("large", "large", 60),
    Section("what if", "what_if", 80),
    Section("safety", "safety", 75),
    Section("peers", "steps", 60, "peers"),
)


@dataclass(frozen=True)
class Options:
    """What every section is told, and when to give up.

    Args:
        simulate: in Triton's interpreter on the CPU, a few elements, errors drawn as a GPU's.
        budget: seconds for everything.
        stall: seconds without a line after which a section hangs.
        patience: factor on the time that sections may take.
        plant: section → what goes wrong in it after its first check: ``hang``, ``signal`` or ``fail``.
    """

    simulate: bool
    budget: float
    stall: float
    patience: float = 1.0
    plant: dict[str, str] = field(default_factory=dict)


def command(section: Section, lines: Path, options: Options) -> list[str]:
    found = [sys.executable, "-m", "bench.gpu.section", section.module, section.function, str(lines)]
    found += ["--simulate"] * options.simulate
    if section.name in options.plant:
        found += ["--plant", options.plant[section.name]]
    return found


def environment_of(options: Options) -> dict[str, str]:
    found = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
    if options.simulate:
        found |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What the section has written; a line that its death cut off is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def in_progress(path: Path) -> str | None:
    """The check that has begun and not ended."""
    open_ones: dict[str, None] = {}
    for line in read_lines(path):
        if "begin" in line:
            open_ones[line["begin"]] = None
        elif "end" in line:
            open_ones.pop(line["end"], None)
    return next(reversed(open_ones), None)


def watch(process: subprocess.Popen[bytes], lines: Path, deadline: float, stall: float) -> str | None:
    """Wait; None if it ended well, else what happened. A process that hangs is killed with all its children."""
    size, changed = lines.stat().st_size if lines.exists() else 0, time.monotonic()
    allowed = max(stall, SLOWEST_START)
    while process.poll() is None:
        now = time.monotonic()
        grown = lines.stat().st_size if lines.exists() else 0
        if grown != size:
            size, changed, allowed = grown, now, stall
        if now > deadline or now - changed > allowed:
            kill(process)
            return "out of time" if now > deadline else f"hangs: nothing for {allowed:.0f} s"
        time.sleep(0.05)
    code = process.returncode
    if code == 0:
        return None
    if code == BROKEN_DEVICE:
        return DEVICE_BROKE
    return f"died by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def kill(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass  # gone already; or held by the driver, and nothing more can be done about it


def run_section(section: Section, options: Options, deadline: float, folder: Path) -> dict[str, Any]:
    """All checks of one section: status, what failed and why, figures."""
    lines, log = folder / f"{section.module}-{section.function}.jsonl", folder / "log.txt"
    start = time.monotonic()
    deadline = min(deadline, start + section.timeout * options.patience)
    accidents: list[str] = []
    text = ""
    while len(accidents) <= RESTARTS:
        before = len(read_lines(lines))
        with log.open("wb") as output:
            process = subprocess.Popen(
                command(section, lines, options),
                cwd=ROOT,
                env=environment_of(options),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            try:
                accident = watch(process, lines, deadline, options.stall)
            finally:
                if process.poll() is None:
                    kill(process)
        if accident is None:
            break
        text = log.read_text(errors="replace")[-1500:]
        culprit = in_progress(lines)
        accidents.append(f"{culprit or 'between checks'}: {accident}")
        if culprit is not None:
            with lines.open("a") as output:
                output.write("\n" + json.dumps({"end": culprit, "failed": accident}) + "\n")
        if time.monotonic() > deadline - 2 or len(read_lines(lines)) == before:
            break  # no time, or it dies before it begins
    return collected(read_lines(lines), accidents, time.monotonic() - start, text)


def collected(lines: list[dict[str, Any]], accidents: list[str], seconds: float, text: str) -> dict[str, Any]:
    ended = [line for line in lines if "end" in line]
    failures = {line["end"]: line["failed"] for line in ended if "failed" in line}
    for i, accident in enumerate(accidents):  # those that no check has to answer for
        if accident.startswith("between checks") and not accident.endswith(DEVICE_BROKE):
            failures[f"accident {i + 1}"] = accident
    found: dict[str, Any] = {
        "status": "failed" if failures else "passed",
        "seconds": round(seconds, 1),
        "checked": len(ended),
        "failures": failures,
        "figures": {line["end"]: line["figures"] for line in ended if "figures" in line},
        "skipped": {line["end"]: line["skipped"] for line in ended if "skipped" in line},
    }
    if accidents:
        found |= {"accidents": accidents, "log": text}
    return found


def write(path: Path, report: dict[str, Any]) -> None:
    """Whole or not at all."""
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    scratch.replace(path)


def run_all(
    sections: list[Section], options: Options, output: Path, told: Callable[[str, dict[str, Any]], None]
) -> dict[str, Any]:
    """Every section in turn while the budget lasts; ``told`` hears of each as it ends."""
    start = time.monotonic()
    report: dict[str, Any] = {"simulated": options.simulate, "planted": options.plant, "sections": {}}
    with tempfile.TemporaryDirectory(prefix="dba_gpu_") as folder:
        for section in sections:
            left = start + options.budget - time.monotonic()
            if left < 5:
                found: dict[str, Any] = {"status": "not run", "why": "the time budget was spent"}
            else:
                found = run_section(section, options, start + options.budget, Path(folder))
            report["sections"][section.name] = found
            report["seconds"] = round(time.monotonic() - start, 1)
            write(output, report)
            told(section.name, found)
    return report
