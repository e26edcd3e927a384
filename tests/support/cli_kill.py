"""Runs the command line in processes that are killed: ``python -m tests.support.cli_kill JOBS``.

``JOBS`` is a JSON list of ``{"argv": [...], "ranks": n, "kill": where}``. Each job forks ``n`` processes, with the
environment that ``torchrun`` would give them, from this one, which has done the slow imports and no arithmetic. As
``torchrun`` does, it ends the others when one dies. Prints the exit codes, a JSON list of lists; -9 is SIGKILL.

``kill``: ``["checkpoint", step]``: half-way through writing the checkpoint after that step;
``["batch", rank, n]``: rank ``rank``, after ``n`` micro-batches of a collection.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed.tensor  # the slow imports, before the forks
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

from dba_kernels import GlobalGradientCollector, cli


def kill_myself(where: list[Any]) -> None:
    """Arrange for SIGKILL at ``where``."""
    if where[0] == "checkpoint":
        save = torch.save

        def half(content: dict[str, Any], path: Path) -> None:
            if content["step"] != where[1]:
                return save(content, path)
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

        torch.save = half
    elif int(os.environ["RANK"]) == where[1]:
        backward = GlobalGradientCollector.backward

        def counted(self: GlobalGradientCollector, *arguments: Any) -> None:
            backward(self, *arguments)
            if self.consumed == where[2]:
                os.kill(os.getpid(), signal.SIGKILL)

        GlobalGradientCollector.backward = counted


def start(job: dict[str, Any], rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    world = job.get("ranks", 1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.dup2(2, 1)  # standard output is for the exit codes
    if "kill" in job:
        kill_myself(job["kill"])
    try:
        cli.main(job["argv"])
    except SystemExit as end:
        os._exit(int(end.code or 0))
    finally:
        os._exit(99)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(job: dict[str, Any]) -> list[int]:
    """The exit codes of the job's processes."""
    port = free_port()
    running = {start(job, rank, port): rank for rank in range(job.get("ranks", 1))}
    codes = [0] * len(running)
    while running:
        pid, status = os.wait()
        codes[running.pop(pid)] = code = os.waitstatus_to_exitcode(status)
        if code:
            for other in running:
                os.kill(other, signal.SIGTERM)
    return codes


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([run(job) for job in json.loads(sys.argv[1])]))
