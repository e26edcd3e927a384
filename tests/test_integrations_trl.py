"""TRL's SFTTrainer, from text to weights, against the plain loop over the batches that it collates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from dba_kernels import DBAAdamW
from dba_kernels.integrations.transformers import DBACallback, dba_adamw

from .support.tiny_llama import TEXT, decay_groups, difference, make_model, plain_loop
from .support.trainer import BATCH, LR, STEPS, arguments, byte_tokenizer

ACCUMULATION = 2

pytestmark = [
    pytest.mark.filterwarnings("ignore:boost. gamma starts at:UserWarning"),
    pytest.mark.usefixtures("fresh_accelerator"),
]


def make_trainer(folder: Path, stored: Path) -> SFTTrainer:
    paragraphs = [" ".join(part.split()) for part in TEXT.decode().split("\n\n") if part.strip()]
    args = arguments(folder, SFTConfig, gradient_accumulation_steps=ACCUMULATION, max_length=48, bf16=False)
    trainer = SFTTrainer(
        make_model(),
        args,
        train_dataset=Dataset.from_dict({"text": paragraphs[: STEPS * BATCH * ACCUMULATION]}),
        processing_class=byte_tokenizer(),
        optimizer_cls_and_kwargs=dba_adamw(args, stored),
    )
    DBACallback.attach(trainer)
    return trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, stored: Path) -> tuple[SFTTrainer, list[dict]]:
    """A trainer after its run, and the micro-batches that it collated."""
    trainer = make_trainer(tmp_path_factory.mktemp("sft"), stored)
    trainer.train()
    return trainer, list(trainer.get_train_dataloader())


def by_hand(micro: list[dict], stored: Path, **options: Any) -> torch.nn.Module:
    assert len(micro) == STEPS * ACCUMULATION and all(batch["labels"].ne(-100).any() for batch in micro)
    steps = [micro[i : i + ACCUMULATION] for i in range(0, len(micro), ACCUMULATION)]
    model = make_model()
    options = {"global_gradient": stored, "total_steps": STEPS} | options
    optimizer = DBAAdamW(decay_groups(model, 0.1), lr=LR, **options)
    plain_loop(model, optimizer, steps, STEPS, max_grad_norm=1.0)
    return model


def test_sft_trainer_is_the_plain_loop(trained: tuple[SFTTrainer, list[dict]], stored: Path) -> None:
    """To the rounding of the loss: TRL computes it without the logits, the plain loop from them."""
    trainer, micro = trained
    apart = difference(trainer.model, by_hand(micro, stored), make_model())
    assert apart < 1e-4
    gammas = [entry["dba_gamma"] for entry in trainer.state.log_history if "loss" in entry]
    assert gammas == pytest.approx([0.5 * (1 - t / STEPS) for t in range(STEPS)], rel=1e-6)


def test_another_run_is_told_apart(trained: tuple[SFTTrainer, list[dict]], stored: Path) -> None:
    """Negative control of the test above."""
    trainer, micro = trained
    apart = difference(trainer.model, by_hand(micro, stored, boost="paper"), make_model())
    assert apart > 1e-2
