"""Compile every kernel that later sections launch, in parallel processes, into Triton's cache on disk."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING

from . import kernels
from .device import SIMULATED

if TYPE_CHECKING:
    from tests.support.cases import Case

    from .report import Report

WORKERS = 1 if SIMULATED else min(12, os.cpu_count() or 1)


def warm(case: Case) -> None:
    """The launches of one combination, on full and on masked tiles: the arguments' kinds do not depend on sizes."""
    from tests.support import cases

    from .device import DEVICE, synchronize

    for place in (cases.plain, cases.Misaligned(1)):
        batch, grads, table = cases.build(case, place, DEVICE)
        sums = table.new_zeros(len(table), 2)
        kernels.ops.similarity(batch, grads, sums, "triton")
        kernels.ops.step(batch, grads, table, "triton")
    synchronize()


def run(report: Report) -> None:
    """A worker that fails costs nothing here: the kernel is compiled, or fails, where it is used."""
    todo = [*kernels.large_cases(), *kernels.matrix()]
    if SIMULATED:
        report.attempt("nothing to compile in the interpreter", lambda: None)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, mp_context=context) as pool:
        from dataclasses import replace

        from tests.support.cases import FEW_SIZES

        futures = {str(case): pool.submit(warm, replace(case, shapes=FEW_SIZES)) for case in todo}
        for name, future in futures.items():
            report.attempt(name, future.result)
