"""Running a case in a forked process, and what of its end is a finding.

1. a traceback, an error that the command line calls its own (70), another status than 0, 1, 2, or death by a signal;
2. no end within the time;
3. temporary files left, or a new folder of results with nothing in it after a failure;
4. status 0 without what was asked for: a file of ĝ_G that verifies, a model of finite weights with metrics of every
   step, JSON that parses, a PNG; of a resumed run, the bits of the one that was not interrupted; of a damaged ĝ_G that
   verifies, the tensors of the whole one;
5. a failure where nothing was spoilt and no option drawn.
"""

from __future__ import annotations

import json
import math
import os
import resource
import select
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from dba_kernels import GlobalGradient, cli

from .drawing import Case

TEMPORARY = (".*.partial", ".partial-*", ".*.tmp", ".converting-*")
MEMORY = 12 << 30
"""Address space of a run, bytes: what asks for more ends in an error, not in the machine's."""


@dataclass
class End:
    """How a run ended."""

    status: int
    said: str
    printed: str
    seconds: float
    late: bool


def run(case: Case, folder: Path, timeout: float) -> End:
    """In a fork of this process, which has done the slow imports."""
    started = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        _child(case, folder)
    late = not _wait(pid, timeout)
    if late:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    printed, said = ((folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))
    return End(os.waitstatus_to_exitcode(status), said, printed, time.perf_counter() - started, late)


def _child(case: Case, folder: Path) -> None:
    status = 99
    try:
        for name, number in (("stdout", 1), ("stderr", 2)):
            opened = os.open(folder / name, os.O_WRONLY | os.O_CREAT)
            os.dup2(opened, number)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.environ["DBA_DEBUG"] = "1"
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.chdir(folder)
        cli.main(case.argv)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(pid: int, timeout: float) -> bool:
    """Whether the process ended in time: seconds that it worked, or slept, count; those in which the machine had no
    time for it, or stopped it, do not."""
    watched = os.pidfd_open(pid)
    slept, before = 0, 0.0
    try:
        while not select.select([watched], [], [], 1.0)[0]:
            state, worked = _state(pid)
            slept += state == "S" and worked == before
            before = worked
            if worked + slept > timeout:
                return False
        return True
    finally:
        os.close(watched)


def _state(pid: int) -> tuple[str, float]:
    """As Linux says it: "R" ready, "S" asleep, "T" stopped …, and the seconds that it has worked."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def findings(case: Case, end: End, folder: Path, seeds: Path) -> list[str]:
    """What is wrong with this end, in words."""
    if end.late:
        return [f"no end within {end.seconds:.0f} s"]
    found = []
    if "Traceback (most recent call last)" in end.said + end.printed or end.status not in (0, 1, 2):
        last = (end.said.strip().splitlines() or ["nothing was said"])[-1]
        found.append(f"status {end.status}, {last[:300]}")
    left = [path for pattern in TEMPORARY for path in folder.rglob(pattern)]
    if left:
        found.append(f"left {', '.join(str(path.relative_to(folder)) for path in left)}")
    if end.status and case.out is not None and not case.existed:
        if case.out.is_dir() and not any(case.out.iterdir()):
            found.append("an empty folder of results was left")
        if case.out.suffix and case.out.exists():
            found.append("a file was written by a run that failed")
    if end.status in (1, 2) and "Error: " not in end.said:
        found.append(f"status {end.status} without a message")
    if end.status == 0:
        found += _missing(case, end, folder, seeds)
    elif not found and not case.target and not case.drawn:
        found.append(f"refused though nothing was wrong: {end.said.strip()[-300:]}")
    return found


def _missing(case: Case, end: End, folder: Path, seeds: Path) -> list[str]:
    """What a run that says it succeeded did not do."""
    try:
        if case.command == "collect" and case.out is not None:
            gradient = GlobalGradient.load(case.out)
            gradient.verify()
            if gradient.provenance.batches < 1:
                return ["a gradient of no batch"]
        elif case.command == "finetune" and case.out is not None:
            return _model(case, case.out, seeds)
        elif case.command == "inspect":
            return _inspected(case, end, folder, seeds)
        elif case.command == "plan" and "--json" in case.argv:
            if json.loads(end.printed)["parameters"] < 1:
                return ["a model of no parameters"]
        elif case.command == "cache":
            return _cached(case, folder)
        elif case.command == "try" and case.out is not None:
            shown = json.loads((case.out / "results.json").read_text())
            losses = [loss for points in shown["losses"].values() for point in points for loss in point]
            if not losses or not all(map(math.isfinite, losses)) or not shown["verdict"]:
                return ["no verdict, or losses that are not finite"]
            if not (case.out / "figure.png").read_bytes().startswith(b"\x89PNG"):
                return ["no figure"]
        elif case.command == "demo" and case.out is not None:
            json.loads((case.out / "results.json").read_text())
            if not (case.out / "figure.png").read_bytes().startswith(b"\x89PNG"):
                return ["no figure"]
    except Exception as error:  # whatever is missing shows in its own way
        return [f"status 0 without what was asked for: {type(error).__name__}: {error}"]
    return []


def _model(case: Case, out: Path, seeds: Path) -> list[str]:
    weights = load_file(out / "model.safetensors")
    if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
        return ["a model with weights that are not finite"]
    run = json.loads((out / "run.json").read_text())
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    if not case.target.endswith("metrics.jsonl") and [s for s in steps if s] != list(range(1, run["steps"] + 1)):
        return [f"metrics of the steps {steps}, not of all {run['steps']}"]
    if any(file.is_file() for file in (out / "checkpoints").glob("*")):
        return ["checkpoints of a finished run"]
    if case.resumes and not case.target.startswith("model"):
        whole = load_file(seeds / "whole" / "model.safetensors")
        if any(not weights[name].equal(tensor) for name, tensor in whole.items()):
            return ["a resumed run that ended in other bits"]
    return []


def _cached(case: Case, folder: Path) -> list[str]:
    kept = folder / "cache" / "dba_kernels"
    if "--clear" in case.argv and any(
        path.name != "models" for path in (*kept.iterdir(), *(kept / "models").glob("*"))
    ):
        return ["a cache that was cleared and holds something"]
    if not (folder / "model" / "config.json").is_file():
        return ["a file outside the cache was deleted"]
    return []


def _inspected(case: Case, end: End, folder: Path, seeds: Path) -> list[str]:
    if case.out is not None and not case.out.read_bytes().startswith(b"\x89PNG"):
        return ["no figure"]
    if "--json" in case.argv:
        shown = json.loads(end.printed)
        if not all(math.isfinite(tensor["norm"]) for tensor in shown["tensors"]):
            return ["a norm that is not finite"]
    if "--verify" in case.argv and case.target:
        given, whole = GlobalGradient.load(folder / case.target), GlobalGradient.load(seeds / case.target)
        if any(not given[name].equal(whole[name]) for name in whole):
            return ["another gradient, verified"]
    return []
