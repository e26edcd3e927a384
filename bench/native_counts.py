"""Bytes and executed instructions per parameter of a native optimizer step: what no clock can disturb.

``python -m bench.native_counts`` prints a line per row of :mod:`.bench_step`. Bytes are those of the tensors that an
optimizer holds. Instructions are counted one by one: a child process calls ``DBAAdamW.step()`` and is stepped through
the library's call with ptrace, at two sizes of which the difference is taken, so that nothing fixed is in it. Needs
Linux on x86-64, objdump, and leave to trace its own children.
"""

from __future__ import annotations

import bisect
import collections
import ctypes
import math
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch

from dba_kernels.native import library

from .bench_step import OWN, Row
from .harness import in_fresh_process

SIZES = ((64, 128), (128, 128))
"""Shapes of one unit of work and of two."""

TRACEME, PEEKTEXT, POKETEXT, PEEKUSER, POKEUSER, CONT, SINGLESTEP = 0, 1, 4, 3, 6, 7, 9
RSP, RIP = 19 * 8, 16 * 8  # in struct user
BREAKPOINT = 0xCC


# --- bytes ------------------------------------------------------------------------------------------------------------


def held_bytes(row: Row, shape: tuple[int, int] = (128, 128)) -> dict[str, float]:
    """Bytes per parameter of what a step of ``row`` reads, or reads and writes, as the optimizer's tensors say."""
    step = row.step([shape])
    step()
    optimizer = step.__self__  # type: ignore[attr-defined]
    (param,) = optimizer.state
    parts = {key: value for key, value in optimizer.state[param].items() if key != "step"}
    stored = optimizer.global_gradient and optimizer.global_gradient.stored("0")
    sizes = {
        "weight": param.nbytes,
        "remainder": parts["remainder"].nbytes if "remainder" in parts else 0,
        "state": sum(part.nbytes for key, part in parts.items() if key != "remainder"),
        "gradient": param.grad.nbytes,
        "global gradient": stored.nbytes if stored else 0,
    }
    return {name: size / param.numel() for name, size in sizes.items()}


def moved_bytes(held: dict[str, float]) -> float:
    """Bytes per parameter that a whole step reads and writes.

    The update reads all and writes all but the gradients; with a global gradient its sums read both gradients before.
    """
    gradients = held["gradient"] + held["global gradient"]
    updated = held["weight"] + held["remainder"] + held["state"]
    return 2 * updated + gradients + (gradients if held["global gradient"] else 0.0)


# --- instructions -----------------------------------------------------------------------------------------------------

KINDS = {
    "divide": r"v?div[ps]s",
    "root": r"v?sqrt[ps]s",
    "estimate": r"v?rsqrt(14)?[ps]s|v?rcp(14)?[ps]s",
    "convert": r"v?cvt\w+|vpmov[sz]x\w+|vpmov[dqw][bwd]|v?pack\w+",
    "shuffle": r"v?p?(shuf|unpck|perm|alignr|blend)\w+|v(insert|extract|broadcast|pbroadcast)\w+|vpternlog\w+",
    "load": r"v?movu?a?(ps|dqu|dqa)\w*|vmovdq\w+|v?mov[ln]?\w*",
    "arithmetic": r"v\w+",
}
"""By mnemonic, the first that fits; ``load`` becomes ``store`` or ``move`` by its operands, and what is left
``scalar``: addresses, loops, calls."""


def kind_of(instruction: str) -> str:
    """Of an instruction as objdump writes it: what it occupies."""
    mnemonic, _, operands = instruction.partition(" ")
    kind = next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, mnemonic)), "scalar")
    if kind != "load":
        return kind
    if not re.search(r"%[xyz]mm", operands):
        return "scalar"
    return "store" if operands.rstrip().endswith(")") else "load" if "(" in operands else "move"


def reads_memory(instruction: str) -> bool:
    """Whether an operand that is no destination lies in memory."""
    sources = instruction.rpartition(",")[0]
    return "(" in instruction and not instruction.startswith(("lea", "nop", "prefetch")) and "(" in sources


def disassembly(path: Path) -> tuple[dict[int, str], int]:
    """Instructions by their address in the file, and that of ``dba_fused_step``."""
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(path)], check=True, capture_output=True, text=True
    ).stdout
    found = re.findall(r"^\s*([0-9a-f]+):\s+(\S.*?)\s*(?:#.*|<.*)?$", text, re.MULTILINE)
    start = re.search(r"^([0-9a-f]+) <dba_fused_step(?:@@\w+)?>:$", text, re.MULTILINE)
    if start is None:
        raise OSError(f"{path}: expected the symbol dba_fused_step, found none")
    return {int(at, 16): re.sub(r"\s+", " ", instruction) for at, instruction in found}, int(start[1], 16)


class Traced:
    """A child process that calls ``run`` under this process's control, one thread of it."""

    def __init__(self, run: Any) -> None:
        self._ptrace = ctypes.CDLL(None, use_errno=True).ptrace
        self._ptrace.restype = ctypes.c_long
        self._ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
        self.child = os.fork()
        if self.child == 0:
            try:
                self._ptrace(TRACEME, 0, None, None)
                os.kill(os.getpid(), signal.SIGSTOP)
                run()
            finally:
                os._exit(0)
        self._wait(signal.SIGSTOP)

    def _ask(self, request: int, address: int = 0, data: int = 0) -> int:
        ctypes.set_errno(0)
        answer = int(self._ptrace(request, self.child, address, data))
        if answer == -1 and ctypes.get_errno():
            raise OSError(ctypes.get_errno(), f"ptrace: {os.strerror(ctypes.get_errno())}; tracing may be forbidden")
        return answer & 0xFFFFFFFFFFFFFFFF

    def _wait(self, expected: signal.Signals) -> None:
        status = os.waitpid(self.child, 0)[1]
        if not os.WIFSTOPPED(status) or os.WSTOPSIG(status) != expected:
            raise OSError(f"traced process: expected a stop by {expected.name}, got status {status:#x}")

    def addresses(self, function: int) -> Iterator[int]:
        """Of every instruction executed from the entry of ``function`` until its return; the child ends then."""
        word = self._ask(PEEKTEXT, function)
        self._ask(POKETEXT, function, word & ~0xFF | BREAKPOINT)
        self._ask(CONT)
        self._wait(signal.SIGTRAP)
        self._ask(POKETEXT, function, word)
        self._ask(POKEUSER, RIP, function)
        back = self._ask(PEEKTEXT, self._ask(PEEKUSER, RSP))
        while (at := self._ask(PEEKUSER, RIP)) != back:
            yield at
            self._ask(SINGLESTEP)
            self._wait(signal.SIGTRAP)
        self._ask(CONT)
        os.waitpid(self.child, 0)


def executed(row: Row, shape: tuple[int, int]) -> collections.Counter[int]:
    """How often each instruction of the library runs in one step, by its address in the file; 0 for all outside."""
    torch.set_num_threads(1)
    step = row.step([shape])
    step()
    path = Path(library.load()._name)
    instructions, start = disassembly(path)
    entry = ctypes.cast(library.load().dba_fused_step, ctypes.c_void_p).value
    assert entry is not None
    known, shift = sorted(instructions), entry - start
    inside = range(known[0], known[-1] + 1)
    counts = collections.Counter(at - shift for at in Traced(step).addresses(entry))
    strange = [at for at in counts if at in inside and known[bisect.bisect(known, at) - 1] != at]
    if strange:
        raise OSError(f"{path}: expected the addresses of instructions, got {strange[0]:#x}; the file has changed")
    return collections.Counter({at: n for at, n in counts.items() if at in inside})


def instructions(row: Row) -> dict[str, float]:
    """Executed instructions per parameter, by kind, and those of all kinds that read memory; in a fresh process."""
    text, _ = disassembly(Path(library.load()._name))
    small, large = (in_fresh_process(executed, row, shape) for shape in SIZES)
    elements = math.prod(SIZES[1]) - math.prod(SIZES[0])
    kinds: collections.Counter[str] = collections.Counter()
    for at in small.keys() | large.keys():
        more = large[at] - small[at]
        kinds[kind_of(text[at])] += more
        kinds["all"] += more
        kinds["reading memory"] += more * reads_memory(text[at])
    return {kind: n / elements for kind, n in kinds.items()}


COLUMNS = (*("all", "divide", "root", "estimate", "convert", "shuffle", "arithmetic"), *("load", "store", "scalar"))


@click.command()
@click.option("--only", multiple=True, help="Rows whose name contains this; may be repeated.")
@click.option("--lanes", default=16, show_default=True, help="Count per so many parameters: the lanes of a vector.")
def main(only: tuple[str, ...], lanes: int) -> None:
    """Bytes per parameter, and executed instructions per vector of parameters, of every row of bench_step."""
    print(f"{library.isa()}; bytes per parameter, instructions per {lanes} parameters; torch {torch.__version__}")
    print(f"| row | bytes | {' | '.join(COLUMNS)} | reading memory |")
    print(f"|---|{'---|' * (len(COLUMNS) + 2)}")
    for row in OWN:
        if only and not any(part in row.name for part in only):
            continue
        found = instructions(row)
        moves = found.get("move", 0.0)
        found["arithmetic"] = found.get("arithmetic", 0.0) + moves
        figures = [f"{found.get(kind, 0.0) * lanes:.1f}" for kind in (*COLUMNS, "reading memory")]
        print(f"| {row.name} | {moved_bytes(held_bytes(row)):.2f} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main()
