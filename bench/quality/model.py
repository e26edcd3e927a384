"""The model of the study: a Llama-style network of 4.2 M parameters, trained here on Wikipedia introductions."""

from __future__ import annotations

import hashlib
import math
import time
from pathlib import Path

import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

from bench.models import llama
from bench.quality import data

BASE_STEPS = 4000
BASE_BATCH = 8
BASE_LR = 2e-3


def new_model() -> LlamaForCausalLM:
    """4 layers of width 256, tied embeddings, 4,212,992 parameters in fp32."""
    return llama(
        vocab_size=data.VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=data.SEQUENCE,
        tie_word_embeddings=True,
    )


def token_losses(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses (nats, 0 where the target is padding) and hits of next-token prediction, both ``[rows, SEQUENCE - 1]``.

    The forward pass runs in bf16 autocast, about 1.5 times faster here than fp32; weights and gradients stay fp32.
    """
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=tokens.clamp(min=0), use_cache=False).logits
    logits, targets = logits[:, :-1].float(), tokens[:, 1:]
    losses = functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="none")
    return losses, logits.argmax(-1) == targets


def loss_fn(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss of full windows ``[rows, SEQUENCE]``."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=tokens, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: torch.nn.Module, tokens: torch.Tensor) -> dict[str, list[float]]:
    """Per document: summed loss, number of hits, number of predicted tokens."""
    losses, hits, counts = [], [], []
    for rows in tokens.split(16):
        loss, hit = token_losses(model, rows)
        losses += loss.sum(1).nan_to_num(nan=math.inf).tolist()
        hits += hit.sum(1).tolist()
        counts += (rows[:, 1:] >= 0).sum(1).tolist()
    return {"loss": losses, "hits": hits, "tokens": counts}


def mean_loss(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Mean loss per token, in nats."""
    result = evaluate(model, tokens)
    return sum(result["loss"]) / sum(result["tokens"])


def base_path(steps: int = BASE_STEPS) -> Path:
    return data.cache_folder() / f"base-{steps}.pt"


def train_base(steps: int = BASE_STEPS, log: bool = True) -> None:
    """Train the base model and keep it; resumes from its last checkpoint when it was cut off.

    AdamW, warm-up over 200 steps, cosine to 0: the plateau that this model, this text and these steps allow.
    """
    target, partial = base_path(steps), base_path(steps).with_suffix(".partial")
    if target.exists():
        return
    torch.manual_seed(0)
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_LR, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    start = 0
    if partial.exists():
        saved = torch.load(partial, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    train, valid = data.windows("general", "base"), data.evaluation("general", "valid", 128)
    per_epoch = len(train) // BASE_BATCH
    began = time.monotonic()
    for step in range(start, steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0 or step == start:
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch))
        lr = BASE_LR * min((step + 1) / 200, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr
        loss = loss_fn(model, train[order[place * BASE_BATCH : (place + 1) * BASE_BATCH]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 250 == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            data.replace_file(partial, lambda path, state=state: torch.save(state, path))
            if log:
                rate = (time.monotonic() - began) / (step + 1 - start)
                print(
                    f"base {step + 1}/{steps}: train {loss.item():.3f}, held-out {mean_loss(model, valid):.3f}, "
                    f"{rate * (steps - step - 1) / 60:.0f} min left",
                    flush=True,
                )
    data.replace_file(target, lambda path: torch.save(model.state_dict(), path))
    partial.unlink(missing_ok=True)


def base_digest() -> str:
    """Twelve hexadecimal digits that name the base weights: rounding differs between machines and thread counts."""
    digest = hashlib.sha256()
    for name, tensor in sorted(torch.load(base_path(), weights_only=True).items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:12]


def load_base(steps: int = BASE_STEPS) -> LlamaForCausalLM:
    """The trained base model (trained now if it is not in the cache), in evaluation mode: it has no dropout."""
    train_base(steps)
    model = new_model()
    model.load_state_dict(torch.load(base_path(steps), weights_only=True))
    return model.eval()
