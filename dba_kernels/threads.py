"""Independent pieces of work on several CPU threads, each piece on one: results do not depend on how many there are.

A matrix product may add up in another order on two threads than on one. So the pieces are spread over threads in which
torch has one thread of its own, and not the products over torch's.
"""

from __future__ import annotations

import contextvars
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "dba_kernels", torch.set_num_threads, (1,))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has none of these threads


def map_on_threads(function: Callable[[Item], Result], items: Sequence[Item], device: torch.device) -> list[Result]:
    """``[function(item) for item in items]``, without gradients; on a CPU on as many threads as torch uses.

    Raises:
        Exception: the first one that ``function`` raised, after all items were tried.
    """
    threads = min(torch.get_num_threads(), len(items))

    def run(item: Item) -> Result:
        with torch.no_grad():  # of a thread's own
            return function(item)

    if device.type != "cpu" or threads < 2:
        return [run(item) for item in items]
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # of the process: torch's kernels ask for this one number in every thread
    try:
        pool = _pool(before)
        waiting = [pool.submit(contextvars.copy_context().run, run, item) for item in items]
        wait(waiting)
    finally:
        torch.set_num_threads(before)
    return [future.result() for future in waiting]
