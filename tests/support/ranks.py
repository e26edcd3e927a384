"""Real processes with gloo for the distributed tests, forked from a server that has imported torch once."""

from __future__ import annotations

import datetime
import io
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

PRELOAD = [
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "dba_kernels",
    "torch._dynamo",
]
TIMEOUT = 40.0
"""Seconds; only a deadlock takes so long."""


def run_ranks(function: Callable[..., Any], world: int, *args: Any, killed: tuple[int, ...] = ()) -> list[Any]:
    """What ``function(rank, world, *args)`` returned in each of ``world`` processes; tensors come back whole.

    Args:
        function: importable by name.
        killed: ranks that must end by SIGKILL; then the others may fail, and theirs and the killed's results are None.

    Raises:
        AssertionError: with the traceback of every rank that failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        ranks = [
            context.Process(target=_run, args=(pipe[1], f"{folder}/store", function, rank, world, args))
            for rank, pipe in enumerate(pipes)
        ]
        for rank in ranks:
            rank.start()
        try:
            return _collect(ranks, pipes, killed)
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()


def _collect(ranks: list[Any], pipes: list[tuple[Connection, Connection]], killed: tuple[int, ...]) -> list[Any]:
    results: list[Any] = [None] * len(ranks)
    errors = {}
    deadline = time.monotonic() + TIMEOUT
    for _, sender in pipes:
        sender.close()  # so that a dead process reads as the end of its pipe
    for i, (receiver, _) in enumerate(pipes):
        if not receiver.poll(max(0.0, deadline - time.monotonic())):
            errors[i] = f"nothing after {TIMEOUT:g} s"
            break  # the others wait for this one
        try:
            ok, content = receiver.recv()
        except EOFError:
            ranks[i].join()
            assert i in killed and ranks[i].exitcode == -signal.SIGKILL, f"rank {i}: exit code {ranks[i].exitcode}"
            continue
        if ok:
            results[i] = torch.load(io.BytesIO(content), weights_only=False)
        elif i in killed or not killed:
            errors[i] = content
    assert not errors, "\n".join(f"rank {i}: {error}" for i, error in errors.items())
    return results


def _run(pipe: Connection, store: str, function: Callable, rank: int, world: int, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        limit = datetime.timedelta(seconds=TIMEOUT)
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world, timeout=limit)
        result = function(rank, world, *args)
        dist.barrier()
        buffer = io.BytesIO()
        torch.save(result, buffer)
        pipe.send((True, buffer.getvalue()))
        dist.destroy_process_group()
    except BaseException:
        pipe.send((False, traceback.format_exc()))
