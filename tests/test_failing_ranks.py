"""An error on one rank ends all of them, with that rank's message; nobody waits for who will not come."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from dba_kernels import collect_global_gradient

from .support.distributed_model import make_net
from .support.failing_rank import collect, flip, mean_loss
from .support.ranks import run_ranks

ROOT = Path(__file__).resolve().parent.parent


def collect_whole(rank: int, folder: Path) -> None:
    """Each rank has the whole model, and a part of the data."""
    path = folder / f"sums.whole.{rank}.safetensors"
    data = range(3 * rank, 3 * rank + 3)
    collect_global_gradient(make_net(), data, mean_loss, "int8", snapshot_path=path, group=dist.group.WORLD)


def with_a_corrupt_snapshot(rank: int, world: int, folder: Path) -> dict[str, str]:
    """Collections that rank 1 cannot continue."""
    found = {}
    for kind in ("sharded", "whole"):
        for attempt in range(2):
            try:
                collect(rank, world, folder) if kind == "sharded" else collect_whole(rank, folder)
            except (ValueError, RuntimeError) as error:
                found[kind] = f"{type(error).__name__}: {error}"
            if attempt == 0 and rank == 1:
                for file in (*folder.glob("*.rank1-*"), *folder.glob("*.whole.1.*")):
                    flip(file)
            dist.barrier()
    return found


def test_a_corrupt_snapshot_on_one_rank_ends_all(tmp_path: Path) -> None:
    """Protects from waiting: rank 0, whose own snapshot is whole, says at once what is wrong on rank 1."""
    whole, corrupt = run_ranks(with_a_corrupt_snapshot, 2, tmp_path)
    for kind in ("sharded", "whole"):
        assert "is corrupt; delete the snapshot and start again" in corrupt[kind]
        assert whole[kind] == f"RuntimeError: rank 1 failed, and all end with it: {corrupt[kind]}"


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("snapshot", "is corrupt; delete the snapshot and start again"),
        ("loss", "ValueError: row 3 of rank 1 is broken"),
        ("step", "exp_avg_sq of 'embed.weight': expected shape"),
    ],
)
def test_torchrun_ends_with_the_message_of_the_rank_that_failed(where: str, message: str, tmp_path: Path) -> None:
    """Protects a job: an error on rank 1, whichever part of the library was at work, ends the job with its message."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", "-m", "tests.support.failing_rank"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*command, where, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150
    )
    assert done.returncode != 0
    assert message in done.stderr, done.stderr[-3000:]
    assert not (tmp_path / "gg.safetensors").exists() or where == "snapshot"
