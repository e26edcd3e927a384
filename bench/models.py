"""The one place that builds Llamas of a chosen size: small ones for tests, SmolLM2-135M's shape, the study's."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
"""Two layers of width 64 over bytes, without special tokens."""

SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
"""134,515,008 parameters."""


def llama(**sizes: Any) -> LlamaForCausalLM:
    """Random weights from torch's seed, fp32. ``sizes``: fields of ``LlamaConfig``; :data:`TINY` gives the others."""
    return LlamaForCausalLM(LlamaConfig(**(TINY | sizes)))
