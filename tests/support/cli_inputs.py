"""A small model with a real (byte-level BPE) tokenizer and chat template, and texts, for the command line's tests."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import torch
import transformers
from click.testing import CliRunner, Result

from bench.models import llama
from dba_kernels import cli

TEXT = "stir the butter into flour and bake it until a skewer comes out clean while oven cools with salt"
WORDS = TEXT.split()
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
SMALL = ("--length", "32", "--dtype", "fp32", "--device", "cpu")


def sentences(count: int, seed: int, words: int = 20) -> list[str]:
    picks = torch.randint(len(WORDS), (count, words), generator=torch.Generator().manual_seed(seed)).tolist()
    return [" ".join(WORDS[i] for i in row) for row in picks]


def make_tokenizer(template: str | None = CHATML) -> transformers.PreTrainedTokenizerFast:
    trained = tokenizers.ByteLevelBPETokenizer()
    special = ["<|im_start|>", "<|im_end|>"]
    trained.train_from_iterator(sentences(200, 0), vocab_size=400, special_tokens=special, show_progress=False)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<|im_end|>")
    wrapped.chat_template = template
    return wrapped


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def save_model(folder: Path, tokenizer: transformers.PreTrainedTokenizerFast, **more: float) -> None:
    """Two layers of random weights and the tokenizer, saved as users save theirs."""
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = llama(vocab_size=len(tokenizer), num_key_value_heads=2, tie_word_embeddings=True, **more)
    model.save_pretrained(folder)


def write_inputs(folder: Path) -> Path:
    """``model/``, ``general.jsonl``, ``chat.jsonl``, ``domain.txt``, ``held-out.txt`` in ``folder``."""
    save_model(folder / "model", make_tokenizer(), attention_dropout=0.1)  # so that the random state matters
    write_jsonl(folder / "general.jsonl", [{"text": text} for text in sentences(60, 1)])
    pairs = zip(sentences(20, 2, words=5), sentences(20, 3, words=8), strict=True)
    write_jsonl(folder / "chat.jsonl", [{"messages": conversation(q, a)} for q, a in pairs])
    (folder / "domain.txt").write_text("\n".join(sentences(40, 4)))
    (folder / "held-out.txt").write_text("\n".join(sentences(10, 5)))
    return folder


def run(*arguments: str | Path | int | float) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
