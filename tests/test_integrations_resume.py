"""A Trainer's run that stops, or is killed, and goes on from its checkpoint, against one that was never interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback

from dba_kernels import DBAAdamW

from .support.tiny_llama import weights
from .support.trainer import make_trainer

ROOT = Path(__file__).resolve().parent.parent
SAVED, KILLED = 2, 3  # steps, of six
CHECKPOINT = f"checkpoint-{SAVED}"
EVERY = {"save_strategy": "steps", "save_steps": SAVED, "train_sampling_strategy": "random"}
FORMATS = {
    "fp32": {},
    "bf16 weights, int8 state": {
        "dtype": torch.bfloat16,
        "optimizer": {"state_format": "int8"},
        "gradient_accumulation_steps": 2,
    },
}

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


class Stop(TrainerCallback):
    """Ends the process by SIGKILL after a step (no handler runs, nothing is flushed), or only the training."""

    def __init__(self, step: int, kill: bool):
        self.step, self.kill = step, kill

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            control.should_training_stop = True


def run(folder: Path, gg: Path, formats: str, stop: Stop | None = None, resume: Path | None = None) -> Trainer:
    trainer = make_trainer(folder, gg, **EVERY, **FORMATS[formats])
    if stop is not None:
        trainer.add_callback(stop)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def state_of(trainer: Trainer) -> list[torch.Tensor]:
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, DBAAdamW)
    state = optimizer.state_dict()["state"]
    return [value for entry in state.values() for value in entry.values() if torch.is_tensor(value)]


def assert_same_run(got: Trainer, expected: Trainer) -> None:
    """Weights, every tensor of the state, and the figures of the last step, bit for bit."""
    assert torch.equal(weights(got.model), weights(expected.model))
    assert all(torch.equal(a, b) for a, b in zip(state_of(got), state_of(expected), strict=True))
    figures = [
        {key: value for key, value in trainer.state.log_history[-2].items() if key != "loss"}
        for trainer in (got, expected)
    ]
    assert figures[0] == figures[1] and "dba_gamma" in figures[0]


@pytest.mark.parametrize("formats", FORMATS)
def test_resumed_run_is_the_uninterrupted_one(
    formats: str,
    stored: Path,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
) -> None:
    """Protects checkpoints of the Trainer: a resumed run ends with the bits of an uninterrupted one, and quietly."""
    whole = run(tmp_path / "whole", stored, formats)
    run(tmp_path / "stopped", stored, formats, stop=Stop(KILLED, kill=False))
    resumed = run(tmp_path / "resumed", stored, formats, resume=tmp_path / "stopped" / CHECKPOINT)
    assert_same_run(resumed, whole)
    assert not [w for w in recwarn if "total_steps" in str(w.message) or "resuming" in str(w.message)]


def test_a_lost_optimizer_state_is_told_apart(stored: Path, tmp_path: Path) -> None:
    """Negative control: the checkpoint's weights alone are refused, since they have moved; AdamW goes elsewhere."""
    whole = run(tmp_path / "whole", stored, "fp32")
    checkpoint = tmp_path / "whole" / CHECKPOINT
    (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"load the optimizer's state before its first step"):
        run(tmp_path / "refused", stored, "fp32", resume=checkpoint)
    plain = make_trainer(tmp_path / "plain", None, **EVERY)
    plain.train(resume_from_checkpoint=str(checkpoint))
    assert not torch.equal(weights(plain.model), weights(whole.model))


def test_a_killed_process_resumes_in_a_new_one(stored: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of the run, in a process of its own; this one goes on to the same bits."""
    formats = "bf16 weights, int8 state"
    script = (
        "import sys; from pathlib import Path; from tests import test_integrations_resume as t;"
        "t.torch.set_num_threads(1); folder, gg = map(Path, sys.argv[1:]);"
        f"t.run(folder, gg, {formats!r}, stop=t.Stop(t.KILLED, kill=True))"
    )
    folder = tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(stored)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    whole = run(tmp_path / "whole", stored, formats)
    resumed = run(tmp_path / "resumed", stored, formats, resume=folder / CHECKPOINT)
    assert_same_run(resumed, whole)
