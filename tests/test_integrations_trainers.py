"""Trainers that take no ``optimizer_cls_and_kwargs``: the recipe of ``dba_kernels/integrations/README.md`` in each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer

from dba_kernels import DBAAdamW, GlobalGradient
from dba_kernels.integrations.transformers import DBACallback, dba_adamw

from .support.tiny_llama import TEXT, make_model, weights
from .support.trainer import BATCH, DECAY, LR, arguments, byte_tokenizer

STEPS = 3
ROWS = STEPS * BATCH

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of the trainers; ours have tests of their own
    pytest.mark.usefixtures("fresh_accelerator"),
]


def texts(start: int, length: int = 12) -> list[str]:
    clean = " ".join(TEXT.decode().split())
    return [clean[i : i + length] for i in range(start, start + ROWS * length, length)]


def args_of(kind: type, folder: Path, **options: Any) -> Any:
    return arguments(folder, kind, max_steps=STEPS, bf16=False, **options)


def dpo(folder: Path, **extra: Any) -> DPOTrainer:
    rows = {"prompt": texts(0), "chosen": texts(500), "rejected": texts(1000)}
    args = args_of(DPOConfig, folder, max_length=48)
    options = dict(args=args, train_dataset=Dataset.from_dict(rows), processing_class=byte_tokenizer())
    return DPOTrainer(make_model(), make_model(), **options, **extra)


def kto(folder: Path, **extra: Any) -> KTOTrainer:
    rows = {"prompt": texts(0), "completion": texts(500), "label": [i % 2 == 0 for i in range(ROWS)]}
    args = args_of(KTOConfig, folder, max_length=48)
    options = dict(args=args, train_dataset=Dataset.from_dict(rows), processing_class=byte_tokenizer())
    return KTOTrainer(make_model(), make_model(), **options, **extra)


def grpo(folder: Path, **extra: Any) -> GRPOTrainer:
    def vowels(completions: list[str], **_: Any) -> list[float]:
        return [float(i + sum(char in "aeiou" for char in text)) for i, text in enumerate(completions)]

    args = args_of(GRPOConfig, folder, num_generations=BATCH, max_completion_length=4)
    rows = Dataset.from_dict({"prompt": texts(0)})
    options = dict(args=args, train_dataset=rows, processing_class=byte_tokenizer())
    return GRPOTrainer(make_model(), vowels, **options, **extra)


def seq2seq(folder: Path, **extra: Any) -> Seq2SeqTrainer:
    torch.manual_seed(0)
    sizes = dict(vocab_size=256, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0)
    ids = torch.tensor([list(text.encode()) for text in texts(0)])
    data = [{"input_ids": row, "labels": row.flip(0)} for row in ids]
    args = args_of(Seq2SeqTrainingArguments, folder)
    return Seq2SeqTrainer(T5ForConditionalGeneration(T5Config(**sizes)), args, train_dataset=data, **extra)


TRAINERS: dict[str, Callable[..., Any]] = {"dpo": dpo, "kto": kto, "grpo": grpo, "seq2seq": seq2seq}


def stored_for(model: torch.nn.Module) -> GlobalGradient:
    """Random, but large enough that it shows."""
    generator = torch.Generator().manual_seed(1)
    return GlobalGradient.from_tensors(
        {name: torch.randn(p.shape, generator=generator) * 0.01 for name, p in model.named_parameters()}, "int8"
    )


@pytest.mark.parametrize("kind", TRAINERS)
def test_recipe_for_trainers_without_the_argument(kind: str, tmp_path: Path) -> None:
    """Protects the recipe: the optimizer is ours, with the trainer's own rate, decay and steps, and the boost acts."""
    ends = {}
    for boost in (0.4, 0.0):
        trainer = TRAINERS[kind](tmp_path / f"{boost}")
        start = weights(trainer.model)
        stored = stored_for(trainer.model)
        trainer.optimizer_cls_and_kwargs = dba_adamw(trainer.args, stored, boost=boost)
        DBACallback.attach(trainer)
        trainer.train()
        optimizer = trainer.optimizer
        while not isinstance(optimizer, DBAAdamW):
            optimizer = optimizer.optimizer
        assert optimizer.global_gradient is stored
        assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, DECAY]
        assert optimizer.param_groups[0]["initial_lr"] == LR and optimizer.method.settings.total_steps == STEPS
        gammas = [entry["dba_gamma"] for entry in trainer.state.log_history if "loss" in entry]
        assert gammas == pytest.approx([boost * (1 - t / STEPS) for t in range(STEPS)], rel=1e-6)
        ends[boost] = weights(trainer.model)
        assert (ends[boost] - start).norm() > 0
    assert (ends[0.4] - ends[0.0]).norm() > 0.05 * (ends[0.0] - start).norm()


@pytest.mark.parametrize("kind", TRAINERS)
def test_they_take_no_such_argument(kind: str, tmp_path: Path) -> None:
    """Protects the recipe's reason: where a release takes the argument, the page should name the shorter way."""
    with pytest.raises(TypeError, match="optimizer_cls_and_kwargs"):
        TRAINERS[kind](tmp_path, optimizer_cls_and_kwargs=(DBAAdamW, {}))
