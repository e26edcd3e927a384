"""The Trainer on two ranks (gloo, DistributedDataParallel), against the plain loop in one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .support.tiny_llama import difference, make_model, weights
from .support.trainer import BATCH, by_hand, make_trainer

ROOT = Path(__file__).resolve().parent.parent
RANKS = 2

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def run_rank(folder: Path, gg: Path) -> None:
    """One rank's process: the same script as on one, with its share of each batch; the weights go to a file."""
    torch.set_num_threads(1)
    trainer = make_trainer(folder, gg, per_device_train_batch_size=BATCH // RANKS, ddp_backend="gloo")
    trainer.train()
    assert trainer.args.world_size == RANKS
    torch.save(trainer.model.state_dict(), folder / f"rank{trainer.args.process_index}.pt")


def test_two_ranks_are_one(stored: Path, tmp_path: Path) -> None:
    """Ranks agree to the bit; with one process to the rounding of the gradients' mean over ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    script = (
        "import sys; from pathlib import Path; from tests.test_integrations_ddp import run_rank;"
        "run_rank(*map(Path, sys.argv[1:]))"
    )
    common = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), str(stored)],
            cwd=ROOT,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        for process in ranks:
            _, said = process.communicate(timeout=120)
            assert process.returncode == 0, said[-2000:]
    finally:
        for process in ranks:
            process.kill()
    models = []
    for rank in range(RANKS):
        models.append(make_model())
        models[rank].load_state_dict(torch.load(tmp_path / f"rank{rank}.pt"))
    assert torch.equal(weights(models[0]), weights(models[1]))
    one, _ = by_hand(stored)
    other, _ = by_hand(stored, boost=0.3)  # negative control
    apart = [difference(models[0], model, make_model()) for model in (one, other)]
    assert apart[0] < 1e-4 and apart[1] > 1e-2
