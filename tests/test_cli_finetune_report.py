"""``finetune`` says what it will do before it starts, and shows what is learned and what is forgotten apart."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from dba_kernels.cli.held_out import before_and_after, weighted  # noqa: E402

from .support.cli_inputs import SMALL, run, sentences, write_inputs, write_jsonl  # noqa: E402


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    write_jsonl(folder / "general-held-out.jsonl", [{"text": text} for text in sentences(30, 9)])
    out = ("--data", folder / "general.jsonl", "--batches", 4, "--out", folder / "g.safetensors")
    assert run("collect", "--model", folder / "model", *out, *SMALL).exit_code == 0
    return folder


def run_finetune(inputs: Path, out: Path, *more: str | Path | float) -> Result:
    data = ("--data", inputs / "domain.txt", "--eval-data", inputs / "held-out.txt")
    data = (*data, "--general-eval-data", inputs / "general-held-out.jsonl")
    how = ("--steps", 6, "--lr", 1e-4, "--batch", 4, "--eval-every", 3, "--out", out)
    return run("finetune", "--model", inputs / "model", *data, *how, *SMALL, *more)


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("finished") / "tuned"
    result = run_finetune(inputs, out, "--global-gradient", inputs / "g.safetensors")
    assert result.exit_code == 0, result.output
    return out, result


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_domain_and_general_text_are_measured_apart(finished: tuple[Path, Result]) -> None:
    """Protects who wants to see forgetting: both losses before, during and after, with the changes' standard errors."""
    out, result = finished
    measured = [line for line in lines(out) if "eval_loss" in line]
    assert [line["step"] for line in measured] == [0, 3, 6]
    outcome = json.loads((out / "run.json").read_text())
    for prefix in ("eval", "general_eval"):
        for line in measured[1:]:
            expected = line[f"{prefix}_loss"] - measured[0][f"{prefix}_loss"]
            assert line[f"{prefix}_change"] == pytest.approx(expected, abs=1e-6)
        assert measured[-1][f"{prefix}_change_error"] > 0
        assert outcome[f"{prefix}_loss_before"] == measured[0][f"{prefix}_loss"]
        assert outcome[f"{prefix}_loss_after"] == measured[-1][f"{prefix}_loss"]
    assert measured[0]["eval_loss"] != measured[0]["general_eval_loss"]
    for step, line in zip((0, 3, 6), measured, strict=True):
        assert f"step {step}: held-out loss domain {line['eval_loss']:.4f}" in result.output
    for kind in ("domain", "general"):
        assert f"held-out loss of {kind} text" in result.output


def test_the_standard_error_is_that_of_the_mean() -> None:
    """Protects the ±: for equal weights it is s / √n; for one value it is not known."""
    mean, error = weighted([1.0, 2.0, 4.0], [5, 5, 5])
    assert mean == pytest.approx(7 / 3) and error == pytest.approx(math.sqrt(7 / 3) / math.sqrt(3))
    assert math.isnan(weighted([1.0], [3])[1])


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [(0.1, 0.01, "forgotten"), (-0.1, 0.01, "nothing forgotten"), (0.1, 0.1, "no change beyond the noise")],
)
def test_forgetting_is_called_by_its_name(change: float, error: float, said: str) -> None:
    """Protects the last lines of a run: a rise beyond twice its error is forgetting, one within it is not."""
    first, last = ({"general_eval_loss": loss} for loss in (3.0, 3.0 + change))
    last |= {"general_eval_change": change, "general_eval_change_error": error}
    ((kind, words, before, after),) = before_and_after([first, last])
    assert kind == "general" and words.endswith(f": {said}") and (before, after) == (3.0, 3.0 + change)


def test_it_says_what_it_will_do(inputs: Path, finished: tuple[Path, Result], tmp_path: Path) -> None:
    """Protects the user's time: tokens, epochs, γ₀ with its rule, bytes and the time left stand at the start."""
    printed = finished[1].output
    assert "6 steps of 4 rows of 32 tokens: 768 tokens, " in printed and "epochs" in printed
    assert "γ₀ = 0.5, falling linearly to 0 (k₀ = 0.5, auto: min(200, 0.003/η₀)/T, at most 0.5)" in printed
    assert "MiB between steps" in printed and "activations come on top" in printed and "time     about" in printed
    assert printed.index("MiB between steps") < printed.index("step 0:")
    plain = run_finetune(inputs, tmp_path / "plain", "--steps", 1)
    assert "AdamW: no global gradient" in plain.output
    paper = run_finetune(
        inputs, tmp_path / "paper", "--steps", 1, "--global-gradient", inputs / "g.safetensors", "--boost", "paper"
    )
    assert "k₀ = 200, paper: 200/T, clamped to --boost-max 0.5" in paper.output


def test_the_memory_it_names_is_what_the_optimizer_holds(finished: tuple[Path, Result], inputs: Path) -> None:
    """Protects the bytes at the start: for fp32, θ, g, m and v are 16 bytes a parameter, and the file's come on top."""
    from dba_kernels import GlobalGradient

    stored = GlobalGradient.load(inputs / "g.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(inputs / "model")
    numel, tensors = sum(p.numel() for p in model.parameters()), len(list(model.parameters()))
    each = (16 * numel + 4 * tensors + stored.nbytes) / numel
    assert f"{each:.2f} bytes per parameter" in finished[1].output


def test_gradient_checkpointing_changes_no_weight(
    inputs: Path, finished: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects --gradient-checkpointing: activations are recomputed (counted), and the weights are the very same."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls: list[bool] = []
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda *a: calls.append(torch.is_grad_enabled()) or forward(*a))
    more = ("--gradient-checkpointing", "--global-gradient", inputs / "g.safetensors")
    result = run_finetune(inputs, tmp_path / "out", *more)
    assert result.exit_code == 0, result.output
    assert "activations checkpointed" in result.output
    assert sum(calls) == 6 * 2 * 2  # steps, layers, and each twice
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (finished[0] / "model.safetensors").read_bytes()


def test_a_model_without_gradient_checkpointing_is_refused(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects who asks for it: a model that has none is refused by its name."""
    monkeypatch.setattr(transformers.LlamaForCausalLM, "supports_gradient_checkpointing", False)
    result = run_finetune(inputs, tmp_path / "out", "--gradient-checkpointing")
    assert result.exit_code == 1
    assert "--gradient-checkpointing: expected a model that has it, got LlamaForCausalLM" in result.output
