"""What is seen to before a model is trained: that it is a causal language model, whole, in floating point."""

from __future__ import annotations

import socket
import threading
from collections.abc import Collection
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from safetensors import SafetensorError, safe_open

from .output import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

FLOATING = ("F64", "F32", "F16", "BF16")
"""safetensors' names of the dtypes that weights can be trained from."""

CAUSAL_NAMES = ("ForCausalLM", "LMHeadModel")
MOST_LAYERS = 10_000
HUB_SECONDS = 1.0
"""How long the Hugging Face hub is waited for before a name counts as not there."""


def check_config(config: PretrainedConfig, where: str) -> None:
    """Refuse what cannot be fine-tuned, by its configuration alone.

    Raises:
        InputError: quantised weights, an architecture that is no causal language model, or absurd sizes.
    """
    if quantised := getattr(config, "quantization_config", None):
        known = quantised if isinstance(quantised, dict) else vars(quantised)
        bits = [f"{n} bit" for n in (8, 4) if known.get(f"load_in_{n}bit") or known.get("bits") == n]
        method = known.get("quant_method", "an unknown method")
        _refuse_quantised(where, ", ".join([str(getattr(method, "value", method)), *bits]))
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    architectures = getattr(config, "architectures", None)
    named = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    known_names = CAUSAL.get(str(getattr(config, "model_type", "")), ())
    causal = {known_names} if isinstance(known_names, str) else set(known_names)
    if named and not any(name in causal or name.endswith(CAUSAL_NAMES) for name in named):
        raise InputError(
            f"--model: expected a causal language model, got {where!r}: {', '.join(named)}; its head would be random. "
            "Give a model that was trained to continue text"
        )
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise InputError(
            f"model {where!r}: expected at most {MOST_LAYERS:,} layers, got {layers:,}; see its config.json"
        )


def check_length(config: PretrainedConfig, length: int) -> None:
    """Refuse rows that are longer than what the model has positions for.

    Raises:
        InputError: naming both lengths.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < length:
        raise InputError(
            f"--length: expected at most {positions:,}, the positions that the model has, got {length:,}; give fewer"
        )


def check_stored(where: str) -> None:
    """Refuse a folder whose files hold weights that are not floating-point numbers, whatever its configuration says.

    Raises:
        InputError: naming the tensor; or a file is damaged.
    """
    for path in sorted(Path(where).glob("*.safetensors")) if Path(where).is_dir() else []:
        try:
            with safe_open(str(path), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    dtype = file.get_slice(name).get_dtype()
                    if name.endswith("weight") and dtype not in FLOATING:
                        _refuse_quantised(where, f"{name!r} is {dtype}")
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path}: expected a whole safetensors file, got {error}; download it again") from error


def check_loaded(model: PreTrainedModel, missing: Collection[str], where: str) -> None:
    """Refuse a model that was not wholly in its files.

    Args:
        missing: names of weights that were not there, and were made up.

    Raises:
        InputError: naming weights that are missing, or no floating-point numbers.
    """
    if missing:
        some = ", ".join(map(repr, sorted(missing)[:3])) + (", …" if len(missing) > 3 else "")
        raise InputError(
            f"model {where!r}: expected every weight in its files, {len(missing)} are missing and would be random "
            f"({some}); download it again, or give a causal language model"
        )
    for name, param in model.named_parameters():
        if not param.is_floating_point():
            _refuse_quantised(where, f"{name!r} is {param.dtype}")


def _refuse_quantised(where: str, how: str) -> None:
    raise InputError(
        f"model {where!r}: expected floating-point weights, got quantised ones ({how}), of which only some could be "
        "trained; give the model that they were made from, or dequantise them: "
        "AutoModelForCausalLM.from_pretrained(…).dequantize().save_pretrained(…)"
    )


def hub_options(name: str) -> dict[str, Any]:
    """How to ask transformers for a model of that name: from the cache alone, where the hub does not answer.

    Raises:
        InputError: it does not answer, and the model is not in the cache.
    """
    if Path(name).exists():
        return {}
    from huggingface_hub import constants, try_to_load_from_cache

    if not constants.HF_HUB_OFFLINE and hub_answers(constants.ENDPOINT):
        return {}
    with suppress(ValueError):  # no name that the hub could know
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return {"local_files_only": True}
    raise InputError(
        f"cannot load model {name!r}: there is no such folder here, it was never downloaded, and the Hugging Face hub "
        "cannot be reached; check the path, or the connection"
    )


@lru_cache
def hub_answers(endpoint: str) -> bool:
    """Whether a connection to the hub, or to the proxy before it, comes about within ``HUB_SECONDS``."""
    place = urlsplit(endpoint)
    proxies = getproxies()
    if proxy := proxies.get(place.scheme) or proxies.get("all"):
        place = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    answered = threading.Event()

    def connect() -> None:
        with suppress(OSError, ValueError):
            port = place.port or (80 if place.scheme == "http" else 443)
            socket.create_connection((place.hostname or "", port), timeout=HUB_SECONDS).close()
            answered.set()

    thread = threading.Thread(target=connect, daemon=True)  # a name server may take longer than any timeout
    thread.start()
    thread.join(HUB_SECONDS)
    return answered.is_set()
