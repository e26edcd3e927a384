"""Models that must not be trained, and names that lead nowhere: refused before any work, in the command's own words."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

from dba_kernels.cli import model_checks, models  # noqa: E402
from dba_kernels.cli.output import InputError  # noqa: E402

from .support.cli_inputs import SMALL, make_tokenizer, run, write_inputs  # noqa: E402


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def folder(inputs: Path, tmp_path: Path) -> Path:
    """A copy of the model to be spoilt."""
    return Path(shutil.copytree(inputs / "model", tmp_path / "model"))


def change_config(folder: Path, **more: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | more))


def change_weights(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refused(inputs: Path, folder: Path, message: str, *more: str | int) -> None:
    """By both commands, with status 1 and nothing left behind."""
    out = folder.parent / "new" / "out"
    for command, how in (("collect", ("--batches", 2)), ("finetune", ("--steps", 2))):
        target = out / "g.safetensors" if command == "collect" else out
        options = ("--data", inputs / "domain.txt", "--out", target, *how, *SMALL, *more)
        result = run(command, "--model", folder, *options)
        assert result.exit_code == 1 and message in result.output, result.output
        assert not out.parent.exists()


@pytest.mark.parametrize(
    ("quantisation", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bit"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bit"),
        ({"quant_method": "gptq", "bits": 4}, "gptq, 4 bit"),
        ({"quant_method": "fp8"}, "fp8"),
    ],
)
def test_quantised_folders_are_refused_before_training(
    inputs: Path, folder: Path, quantisation: dict[str, Any], words: str
) -> None:
    """Protects against training the few tensors that are not quantised: the folder is refused by its configuration."""
    change_config(folder, quantization_config=quantisation)
    refused(inputs, folder, f"expected floating-point weights, got quantised ones ({words}")
    assert run("plan", "--model", folder).exit_code == 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_quantised_tensors_are_refused_whatever_the_configuration_says(
    inputs: Path, folder: Path, dtype: torch.dtype
) -> None:
    """Protects against codes taken for weights: a file's integer tensors are refused by name."""
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    refused(inputs, folder, f"got quantised ones ({name!r} is ")


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertModel", "BertLMHeadModel"])
def test_an_encoder_is_refused(inputs: Path, tmp_path: Path, kind: str) -> None:
    """Protects against a random head: encoders are refused by name, and by what they say where the name is a causal
    model's."""
    config = transformers.BertConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    getattr(transformers, kind)(config).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    words = "whose outputs depend on later tokens" if kind == "BertLMHeadModel" else f"{kind}; its head would be random"
    refused(inputs, tmp_path / "model", words)
    assert run("plan", "--model", tmp_path / "model").exit_code == (0 if kind == "BertLMHeadModel" else 1)


def test_a_decoder_is_not_taken_for_an_encoder(inputs: Path) -> None:
    """Control: a causal model passes every check."""
    options = ("--data", inputs / "domain.txt", "--out", inputs / "tuned", "--steps", 1, *SMALL)
    result = run("finetune", "--model", inputs / "model", *options)
    assert result.exit_code == 0, result.output


def test_missing_weights_are_not_made_up(inputs: Path, folder: Path) -> None:
    """Protects against random layers: a model whose files lack weights is refused with their names."""
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(folder, lambda tensors: tensors.pop(name))
    refused(inputs, folder, f"1 are missing and would be random ({name!r})")


def test_half_downloaded_files_are_refused(inputs: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects against raw tracebacks: cut off weights, configurations, tokenizers and .gguf files are named."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 7, 200, len(whole) // 2):
        weights.write_bytes(whole[:size])
        refused(inputs, folder, f"{weights}: expected a whole safetensors file")
    weights.write_bytes(whole)
    for name in ("tokenizer.json", "config.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        refused(inputs, folder, f"cannot load model '{folder}'")
        (folder / name).write_bytes(content)
    gguf = folder.parent / "half.gguf"
    for content in (b"", b"GGUF", b"GGUF\3\0\0\0" + b"\xff" * 40):
        gguf.write_bytes(content)
        refused(inputs, gguf, "cannot convert half.gguf")
    assert list((folder.parent / "cache" / "dba_kernels" / "models").iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 10**12},
        {"vocab_size": 10**30},
        {"hidden_size": -1},
        {"hidden_size": "many"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 10**9},
        {"model_type": "no-such-type"},
        {"model_type": None},
        {"hidden_act": "no-such-function"},
        {"architectures": 3},
    ],
)
def test_absurd_configurations_are_refused(inputs: Path, folder: Path, change: dict[str, Any]) -> None:
    """Protects against raw tracebacks: a configuration that fits no model ends in a message."""
    change_config(folder, **change)
    if "architectures" not in change:
        refused(inputs, folder, "model")
    for more in ((), ("--json",)):
        assert run("plan", "--model", folder, *more).exit_code in (0, 1)


def test_a_tokenizer_that_cannot_encode_is_refused(inputs: Path, folder: Path) -> None:
    """Protects against a raw TypeError at the first document: a setting of the wrong type is refused at once."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "many"}))
    refused(inputs, folder, f"cannot load model '{folder}'")


def test_damaged_weights_are_noticed_before_training(inputs: Path, folder: Path) -> None:
    """Protects against a run on a broken base: weights that make the output NaN are refused."""
    change_weights(folder, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
    refused(inputs, folder, "expected finite outputs, got NaN or infinity")


def test_rows_longer_than_the_models_positions_are_refused(inputs: Path, folder: Path) -> None:
    """Protects against an IndexError, or worse, quiet extrapolation: --length is held against the positions."""
    change_config(folder, max_position_embeddings=31)
    refused(inputs, folder, "--length: expected at most 31, the positions that the model has, got 32")
    change_config(folder, max_position_embeddings=32)  # control
    options = ("--data", inputs / "domain.txt", "--out", folder.parent / "tuned", "--steps", 1, *SMALL)
    assert run("finetune", "--model", folder, *options).exit_code == 0


def test_a_tokenizer_of_another_model_is_refused(inputs: Path, tmp_path: Path) -> None:
    """Protects against an IndexError in the middle of a run: a token without an embedding is named, with its record."""
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    refused(inputs, tmp_path / "model", "domain.txt, record 1: token '")


def test_code_in_a_folder_is_not_run(inputs: Path, folder: Path) -> None:
    """Protects against foreign code: a folder with Python is refused, without a question on standard input."""
    change_config(folder, model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
    (folder / "own.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w')")
    refused(inputs, folder, "comes as Python code in its folder, which is never run")
    assert not (folder.parent / "ran").exists()


def test_pipes_in_a_folder_are_refused(inputs: Path, folder: Path) -> None:
    """Protects against waiting for ever: a FIFO in place of one of the model's files is named."""
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        refused(inputs, folder, f"expected regular files, '{name}' is a pipe or a device")
        (folder / name).unlink()
        shutil.copy(inputs / "model" / name, folder / name)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection comes about, and nobody asks transformers to try."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    model_checks.hub_answers.cache_clear()


@pytest.mark.usefixtures("offline")
def test_a_mistyped_name_fails_at_once_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the user's time: offline, an unknown name is refused before transformers tries and waits and tries."""
    monkeypatch.setattr(models, "import_transformers", lambda: pytest.fail("it would retry for half a minute"))
    for name in ("org/no-such-model", "no-such-model"):
        result = run("plan", "--model", name)
        assert result.exit_code == 1 and "it was never downloaded, and the Hugging Face hub cannot" in result.output
    monkeypatch.setattr(model_checks.threading.Thread, "start", lambda _: None)  # a name server that never answers
    monkeypatch.setattr(model_checks.threading.Thread, "join", lambda _, seconds: None)
    assert not model_checks.hub_answers("https://elsewhere.invalid")


@pytest.mark.usefixtures("offline")
def test_a_downloaded_model_is_found_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects work offline: what is in the hub's cache is taken from there, without asking the hub."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: f"/cache/{name}/{file}")
    assert model_checks.hub_options("org/name") == {"local_files_only": True}


def test_the_hub_is_reached_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects machines behind a proxy: the connection that is tried is the proxy's."""
    tried: list[Any] = []

    def connect(place: Any, timeout: float) -> Any:
        tried.append(place)
        return socket.socket()

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(model_checks, "getproxies", lambda: {"https": "http://proxy.invalid:3128"})
    model_checks.hub_answers.cache_clear()
    assert model_checks.hub_answers("https://hub.invalid") and tried == [("proxy.invalid", 3128)]
    monkeypatch.setattr(model_checks, "getproxies", dict)
    model_checks.hub_answers.cache_clear()
    assert model_checks.hub_answers("https://hub.invalid") and tried[1:] == [("hub.invalid", 443)]
    model_checks.hub_answers.cache_clear()


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "", "../..//"])
def test_names_that_no_folder_can_have(name: str) -> None:
    """Protects against raw errors of the file system."""
    result = run("plan", "--model", name)
    assert result.exit_code == 1 and result.output.startswith("Error: "), result.output


@pytest.mark.parametrize("device", ["meta", "cuda:99", "cpu:3000000000", "", "vulkan", "\ud800"])
def test_devices_that_cannot_compute_are_refused(device: str, inputs: Path, tmp_path: Path) -> None:
    """Protects against raw errors: a device that torch cannot use is refused by name."""
    options = ("--data", inputs / "domain.txt", "--out", tmp_path / "out", "--steps", 1, "--length", 32)
    result = run("finetune", "--model", inputs / "model", *options, "--device", device)
    assert result.exit_code == (0 if device == "" else 1), result.output
    assert device == "" or "--device: expected a device that torch can use" in result.output
    with pytest.raises(InputError):
        models.locate_model(os.devnull)
