"""The seed set: a tiny model, text in every form that is read, and what the commands leave half-way and at the end."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import tokenizers
import torch
import transformers

from bench.models import llama
from dba_kernels import cli
from dba_kernels.cli.finetune_run import Training

TEXT = "stir the butter into flour and bake it until a skewer comes out clean while oven cools with salt"
WORDS = TEXT.split()
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMALL = ("--length", "64", "--dtype", "fp32", "--device", "cpu")
COLLECT = ("--batches", "3", "--batch", "2", *SMALL)
FINETUNE = ("--steps", "4", "--batch", "2", "--save-every", "1", *SMALL)
DATA = ("general.jsonl", "chat.jsonl", "sharegpt.ndjson", "list.json", "table.csv", "domain.txt", "packed.jsonl.gz")


def make(folder: Path) -> None:
    """Fill ``folder``; ``whole/`` is a run of the same options as the interrupted one in ``half/``."""
    _model(folder / "model")
    _texts(folder)
    general = ("--model", str(folder / "model"), "--data", str(folder / "general.jsonl"))
    domain = ("--model", str(folder / "model"), "--data", str(folder / "domain.txt"))
    _run("collect", *general, *COLLECT, "--out", str(folder / "g.safetensors"))
    _run("collect", *general, *COLLECT, "--curvature", "4", "--out", str(folder / "curved.safetensors"))
    gradient = ("--global-gradient", str(folder / "g.safetensors"))
    _run("finetune", *domain, *gradient, *FINETUNE, "--out", str(folder / "whole"))
    finish, Training.finish = Training.finish, lambda _: iter(())  # all is saved, nothing finished
    _run("finetune", *domain, *gradient, *FINETUNE, "--out", str(folder / "half"))
    Training.finish = finish


def _run(*arguments: str) -> None:
    try:
        cli.main(list(arguments))
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"seed set: {arguments} ended with {end.code}") from end


def _model(folder: Path) -> None:
    trained = tokenizers.ByteLevelBPETokenizer()
    special = ["<|im_start|>", "<|im_end|>"]
    trained.train_from_iterator(_sentences(50, 0), vocab_size=300, special_tokens=special, show_progress=False)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<|im_end|>")
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    llama(vocab_size=len(wrapped), num_hidden_layers=1, tie_word_embeddings=True).save_pretrained(folder)


def _texts(folder: Path) -> None:
    texts = [text if i % 2 else " ".join(text.split()[:4]) for i, text in enumerate(_sentences(24, 1))]
    chats = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in zip(texts[::2], texts[1::2], strict=True)
    ]
    shared = [
        {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}], "system": "salt"}
        for q, a in zip(texts[::2], texts[1::2], strict=True)
    ]
    records = [{"text": text, "id": i} for i, text in enumerate(texts)]
    _lines(folder / "general.jsonl", records)
    _lines(folder / "chat.jsonl", chats)
    _lines(folder / "sharegpt.ndjson", shared)
    (folder / "list.json").write_text(json.dumps(records))
    (folder / "table.csv").write_text("id,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(texts)))
    (folder / "domain.txt").write_text("\n".join(_sentences(40, 2)))
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress((folder / "general.jsonl").read_bytes(), mtime=0))


def _lines(path: Path, records: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _sentences(count: int, seed: int) -> list[str]:
    drawn = random.Random(seed)
    return [" ".join(drawn.choices(WORDS, k=20)) for _ in range(count)]
