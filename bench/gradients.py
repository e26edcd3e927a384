"""Real gradients of a real model, recorded once: the input of the studies on codecs."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file

from dba_kernels.cli.corpora import load_documents
from dba_kernels.cli.demo.blocks import token_blocks
from dba_kernels.cli.models import cache_dir, load_model

STEPS = 48
GLOBAL_BATCHES = 32
BATCH, LENGTH = 4, 128
LR, BETA1, BETA2, EPS = 3e-5, 0.9, 0.999, 1e-8
ROWS = {  # tensor → how many of its rows, evenly spaced, are kept: whole rows, so that groups stay what they are
    "model.embed_tokens.weight": 1024,
    "model.layers.0.self_attn.q_proj.weight": 256,
    "model.layers.0.self_attn.k_proj.weight": 192,
    "model.layers.0.mlp.down_proj.weight": 192,
    "model.layers.14.self_attn.v_proj.weight": 192,
    "model.layers.14.self_attn.o_proj.weight": 256,
    "model.layers.14.mlp.up_proj.weight": 256,
    "model.layers.29.self_attn.q_proj.weight": 256,
    "model.layers.29.mlp.gate_proj.weight": 256,
    "model.layers.29.mlp.down_proj.weight": 192,
}


def progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True))


def recording() -> dict[str, torch.Tensor]:
    """Real gradients, from the cache or recorded now.

    Per tensor: ``grad/NAME`` bf16 ``[STEPS, rows, cols]`` of a fine-tuning run on recipes, and ``global/NAME`` fp32
    ``[rows, cols]``, the mean gradient of the base model over Wikipedia text.
    """
    path = cache_dir() / "studies" / f"gradients-{STEPS}-{GLOBAL_BATCHES}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".partial")
        save_file(_record(), scratch)
        scratch.rename(path)
    return load_file(path)


def _record() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model, tokenizer, _ = load_model()
    model.eval()  # no dropout; SmolLM2 has none to begin with
    params = dict(model.named_parameters())
    rows = {name: torch.linspace(0, len(params[name]) - 1, count).long() for name, count in ROWS.items()}

    def batches(corpus: str, count: int) -> torch.Tensor:
        documents, _ = load_documents(corpus)
        blocks = token_blocks(tokenizer, documents, length=LENGTH, train=count * BATCH, held_out=BATCH)
        return blocks.train.view(count, BATCH, LENGTH)

    def backward(ids: torch.Tensor) -> None:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids, labels=ids).loss.backward()

    record = {f"global/{name}": torch.zeros(len(index), params[name].shape[1]) for name, index in rows.items()}
    with progress() as bar:
        for ids in bar.track(batches("wikipedia", GLOBAL_BATCHES), description="mean gradient on Wikipedia"):
            backward(ids)
            for name, index in rows.items():
                record[f"global/{name}"] += params[name].grad[index] / GLOBAL_BATCHES

        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(BETA1, BETA2), eps=EPS)
        grads: dict[str, list[torch.Tensor]] = {name: [] for name in rows}
        for step, ids in enumerate(bar.track(batches("recipes", STEPS), description="fine-tuning on recipes")):
            backward(ids)
            for name, index in rows.items():
                grads[name].append(params[name].grad[index].bfloat16())  # what a bf16 model would hand over
            optimizer.param_groups[0]["lr"] = LR * (1 - step / STEPS)
            optimizer.step()
    return record | {f"grad/{name}": torch.stack(steps) for name, steps in grads.items()}
