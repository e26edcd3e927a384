"""A Trainer's run as a user's script has it, and the same run by hand, on the small Llama."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from dba_kernels import DBAAdamW
from dba_kernels.integrations.transformers import DBACallback, dba_adamw

from .tiny_llama import batches, decay_groups, examples, make_model, plain_loop

LR, STEPS, BATCH, DECAY = 1e-5, 6, 2, 0.1


def arguments(folder: Path, kind: type = TrainingArguments, **options: Any) -> TrainingArguments:
    """A short run in the data's order, on the CPU, that logs every step and saves nothing."""
    defaults = dict(
        output_dir=str(folder),
        learning_rate=LR,
        weight_decay=DECAY,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return kind(**(defaults | options))


def make_trainer(
    folder: Path, stored: Path | None, dtype=torch.float32, optimizer: dict | None = None, **options: Any
) -> Trainer:
    """What a user's script does, in the three lines of the integration."""
    args = arguments(folder, **options)
    count = STEPS * BATCH * args.gradient_accumulation_steps
    trainer = Trainer(
        make_model(dtype),
        args,
        train_dataset=examples(count),
        optimizer_cls_and_kwargs=dba_adamw(args, stored, **(optimizer or {})),
    )
    DBACallback.attach(trainer)
    return trainer


def train(*args: Any, **kwargs: Any) -> Trainer:
    trainer = make_trainer(*args, **kwargs)
    trainer.train()
    return trainer


def by_hand(
    stored: Path | None,
    dtype=torch.float32,
    accumulation: int = 1,
    clip: float | None = 1.0,
    bf16: bool = False,
    total_steps: int = STEPS,
    **options: Any,
) -> tuple[torch.nn.Module, list[float]]:
    """The same run without any of Hugging Face's training code."""
    model = make_model(dtype)
    if stored is not None:
        options |= {"global_gradient": stored, "total_steps": total_steps}
    optimizer = DBAAdamW(decay_groups(model, DECAY), lr=LR, **options)
    micro = batches(examples(STEPS * BATCH * accumulation), BATCH)
    steps = [micro[i : i + accumulation] for i in range(0, len(micro), accumulation)]
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=bf16)
    return model, plain_loop(model, optimizer, steps, STEPS, clip, autocast)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; byte 0, which no text has, ends and pads."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=alphabet[-1], pad_token=alphabet[-1])
