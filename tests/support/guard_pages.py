"""Tensors flush against memory that may not be touched: an access out of bounds kills the process.

Each tensor gets a mapping of its own, between two pages without any permission. Placed at the end, its last byte is the
last one that may be read or written; placed at the start, its first byte is the first.

    python -m tests.support.guard_pages triton     # every kernel over the whole matrix; also: native, reference

Run in a process of its own (:func:`run`), for what a failure does to it.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from dba_kernels.formats import STORAGE_FORMATS

from .backends import backend_named
from .cases import build, pairwise_matrix, size_cases

CODED = ((65, 77), (64, 64), (5000,), (70, 3, 33))
PAGE = mmap.PAGESIZE
PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)


class GuardPages:
    """A ``place`` of :mod:`tests.support.cases`: at the end of its pages, or at their start.

    At the end a tensor lies as its size has it: mostly misaligned, so it takes the masked path; at the start it is
    aligned to a page.
    """

    def __init__(self, at_end: bool):
        self.at_end = at_end
        self._mappings: list[mmap.mmap] = []

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        pages = max(1, -(-tensor.nbytes // PAGE))
        mapping = mmap.mmap(-1, (pages + 2) * PAGE)
        self._mappings.append(mapping)
        view = (ctypes.c_char * len(mapping)).from_buffer(mapping)
        for page in (0, pages + 1):
            address = ctypes.c_void_p(ctypes.addressof(view) + page * PAGE)
            if _libc.mprotect(address, PAGE, PROT_NONE) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        start = PAGE + (pages * PAGE - tensor.nbytes if self.at_end else 0)
        if tensor.nbytes == 0:
            return tensor.clone()
        inside = torch.frombuffer(mapping, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
        return inside.copy_(tensor)


def run(*arguments: str) -> int:
    """Exit status of ``python -m tests.support.guard_pages …``; negative where a signal killed it."""
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.support.guard_pages", *arguments]
    return subprocess.run(command, cwd=root, env=environment, check=False, capture_output=True).returncode


def _overrun() -> None:
    """The negative control: read one element past the end."""
    tensor = GuardPages(at_end=True)(torch.zeros(8))
    ctypes.c_float.from_address(tensor.data_ptr() + tensor.nbytes).value  # noqa: B018


def main(name: str, part: str = "all") -> None:
    backend = backend_named(name)
    cases = size_cases()[1:2] if part == "one" else pairwise_matrix() + size_cases()
    for case, at_end in itertools.product(cases, (True, False)):
        place = GuardPages(at_end)
        batch, grads, table = build(case, place)
        backend.similarity(batch, grads, place(torch.zeros(len(table), 2, dtype=torch.float64)))
        backend.step(batch, grads, place(table))
        totals = [place(torch.zeros(grad.shape)) for grad in grads]
        backend.accumulate(totals, grads, 0.5, place(torch.zeros(len(grads), dtype=torch.float64)))
        for stored, total in zip(batch.all("global_grad"), totals, strict=False):
            backend.decode(stored, total)
    shapes = CODED[:1] if part == "one" else CODED
    for format, shape, at_end in itertools.product(STORAGE_FORMATS, shapes, (True, False)):
        place = GuardPages(at_end)
        encoded = backend.encode(place(torch.randn(shape)), format)
        scales = None if encoded.scales is None else place(encoded.scales)
        backend.decode(replace(encoded, codes=place(encoded.codes), scales=scales), place(torch.zeros(shape)))
    print(f"{name}: {len(cases)} cases and {len(shapes)} shapes of every format at both ends of guarded pages")


if __name__ == "__main__":
    if sys.argv[1:] == ["overrun"]:
        _overrun()
    else:
        main(*sys.argv[1:])
