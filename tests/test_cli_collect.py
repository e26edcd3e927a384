"""``collect``, ``inspect`` and ``plan`` on a small model: right numbers, and what is wrong is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import Result

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from dba_kernels import DBAAdamW, GlobalGradient, GlobalGradientCollector  # noqa: E402
from dba_kernels.cli import collect_command, models, plan_command  # noqa: E402
from dba_kernels.cli.signal_to_noise import advice, batches_for, expected_cosine  # noqa: E402
from dba_kernels.cli.sizes import Sizes  # noqa: E402
from dba_kernels.formats import STATE_FORMATS, STORAGE_FORMATS  # noqa: E402

from .support.cli_inputs import SMALL, run, sentences, write_inputs, write_jsonl  # noqa: E402


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def run_collect(inputs: Path, out: Path, *more: str | Path | int) -> Result:
    data = ("--data", inputs / "general.jsonl", inputs / "chat.jsonl")
    return run("collect", "--model", inputs / "model", *data, "--batches", 8, "--out", out, *SMALL, *more)


@pytest.fixture(scope="module")
def collected(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("collected") / "g.safetensors"
    result = run_collect(inputs, out, "--format", "fp32")
    assert result.exit_code == 0, result.output
    return out, result


# --- collect ----------------------------------------------------------------------------------------------------------


def test_the_file_holds_the_mean_gradient_per_token(inputs: Path, collected: tuple[Path, Result]) -> None:
    """Against the gradient of one big batch of the same rows, computed here by autograd alone."""
    from itertools import islice

    from dba_kernels.cli.packing import Batches, Encoder
    from dba_kernels.cli.text import Corpus

    model = transformers.AutoModelForCausalLM.from_pretrained(inputs / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(inputs / "model")
    corpus = Corpus([str(inputs / "general.jsonl"), str(inputs / "chat.jsonl")])
    batches = list(islice(Batches(corpus, Encoder(tokenizer), length=32, size=4, seed=0), 8))
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    model(**whole, use_cache=False).loss.backward()
    gradient = GlobalGradient.load(collected[0])
    for name, param in model.named_parameters():
        assert torch.allclose(gradient[name], param.grad, rtol=1e-4, atol=1e-6), name
    assert gradient.provenance.tokens == int((whole["labels"][:, 1:] != -100).sum())
    masked = dict(model.named_parameters())["model.norm.weight"].grad.clone()
    model.zero_grad()
    model(input_ids=whole["input_ids"], labels=whole["input_ids"], use_cache=False).loss.backward()  # control: no mask
    assert not torch.allclose(masked, dict(model.named_parameters())["model.norm.weight"].grad, rtol=1e-2)


def test_it_says_what_was_done_and_whether_more_is_worth_it(collected: tuple[Path, Result]) -> None:
    """Protects the report of a collection: counts, signal-to-noise and file are printed; the sums stay beside it."""
    out, result = collected
    gradient = GlobalGradient.load(out)
    for part in ("80 documents", "global gradient: 8/8", "8 batches", f"{gradient.provenance.tokens:,} target tokens"):
        assert part in result.output
    assert f"signal-to-noise {gradient.signal_to_noise:.3g} after 8 batches" in result.output
    assert f"file: {out}" in result.output and "tokens/s" in result.output
    assert {path.name for path in out.parent.iterdir()} == {out.name, f"{out.stem}.snapshot.safetensors"}


def test_a_finished_collection_says_so_and_another_is_refused(inputs: Path, collected: tuple[Path, Result]) -> None:
    """Protects a finished file: the same command leaves it alone, one with other options is refused."""
    out, before = collected[0], collected[0].read_bytes()
    again = run_collect(inputs, out, "--format", "fp32")
    assert again.exit_code == 0 and "finished already" in again.output
    for option in (("--format", "int8"), ("--format", "fp32", "--seed", 1), ("--format", "fp32", "--batches", 4)):
        other = run_collect(inputs, out, *option)
        assert other.exit_code == 1 and "was collected with other options" in other.output, option
    assert out.read_bytes() == before


@pytest.mark.parametrize("more", [(), ("--batches", 5)], ids=["interrupted", "extended"])
def test_going_on_gives_the_same_bytes(
    inputs: Path, collected: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple
) -> None:
    """Interrupted after 5 of 8 micro-batches, or finished with 5 and then asked for 8."""
    out = tmp_path / "g.safetensors"
    options = ("--format", "fp32", "--snapshot-every", 3)
    if not more:
        backward = GlobalGradientCollector.backward

        def interrupted(self: GlobalGradientCollector, *arguments: object) -> None:
            if self.consumed == 5:
                raise KeyboardInterrupt
            backward(self, *arguments)

        monkeypatch.setattr(collect_command.GlobalGradientCollector, "backward", interrupted)
    first = run_collect(inputs, out, *options, *more)
    assert (first.exit_code == 0, out.exists()) == (bool(more), bool(more)), first.output
    monkeypatch.undo()
    second = run_collect(inputs, out, *options)
    assert second.exit_code == 0, second.output
    assert "going on from" in second.output and "5 of 8 batches are done" in second.output
    assert out.read_bytes() == collected[0].read_bytes()
    dropped = run_collect(inputs, out, *options, "--drop-snapshot")
    assert dropped.exit_code == 0 and [path.name for path in tmp_path.iterdir()] == [out.name]


def test_data_that_end_early_are_used_whole(inputs: Path, tmp_path: Path) -> None:
    """Protects short data: they are used whole, it is said, and the result counts as finished."""
    data = ("--data", write_jsonl(tmp_path / "few.jsonl", [{"text": text} for text in sentences(9, 3)]))
    out = ("--out", tmp_path / "g.safetensors")
    result = run("collect", "--model", inputs / "model", *data, "--batches", 50, *out, *SMALL)
    assert result.exit_code == 0, result.output
    assert "the data end after 2 of 50 batches" in result.output
    again = run("collect", "--model", inputs / "model", *data, "--batches", 50, *out, *SMALL)
    assert again.exit_code == 0 and "finished already" in again.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "./nowhere/model"), "model './nowhere/model': expected a folder, there is none of that name"),
        (("--model", "{inputs}"), "expected a folder that save_pretrained wrote, with a config.json, found chat.jsonl"),
        (("--model", "{inputs}/chat.jsonl"), "expected a folder, a .gguf file or a hub id, got another file"),
        (("--data", "{inputs}/nothing.txt"), "nothing.txt': expected a file, a folder, or one of wikipedia"),
        (("--field", "body"), "expected text in field 'body', or 'messages', got 'text'; name the field with --field"),
        (("--out", "g.bin"), "--out: expected a name that ends in .safetensors, got 'g.bin'"),
        (("--rank", "500"), "--rank: expected 1 <= rank < m·n / (m + n) for some matrix, got 500"),
        (("--device", "toaster"), "--device: expected a device that torch can use, got 'toaster'"),
    ],
)
def test_bad_input_is_refused(inputs: Path, tmp_path: Path, arguments: tuple[str, str], message: str) -> None:
    """Protects the user's time: each bad option is refused with what was expected and what was given."""
    given = {"--model": "{inputs}/model", "--data": "{inputs}/general.jsonl", "--out": str(tmp_path / "g.safetensors")}
    given |= {arguments[0]: arguments[1]}
    options = [part.format(inputs=inputs) for pair in given.items() for part in pair]
    result = run("collect", "--batches", 2, "--length", 32, "--dtype", "fp32", *options)
    assert result.exit_code == 1, result.output
    assert message in result.output


def test_a_model_that_is_neither_here_nor_on_the_hub(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the message for a model that is nowhere: both places are named, without the library's long story."""
    monkeypatch.setattr(
        transformers.AutoConfig,
        "from_pretrained",
        lambda *_, **__: (_ for _ in ()).throw(OSError("not found\nlong story")),
    )
    monkeypatch.setattr(models, "hub_options", lambda _: {})  # the hub answers
    result = run("plan", "--model", "org/no-such-model")
    assert result.exit_code == 1
    assert "there is no such folder here, and the Hugging Face hub did not give a model of that name" in result.output
    assert "(OSError: not found)" in result.output and "long story" not in result.output


def test_plan_refuses_a_model_that_is_no_causal_one(tmp_path: Path) -> None:
    """Protects ``plan``: a model of another kind is refused in one sentence."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    result = run("plan", "--model", tmp_path)
    assert result.exit_code == 1 and "--model: expected a causal language model, got" in result.output
    assert "LlamaConfig" not in result.output  # not transformers' list of all there are


# --- signal -----------------------------------------------------------------------------------------------------------


def test_advice_follows_the_estimate() -> None:
    """Protects the advice: unknown, too noisy, worth more batches, and enough are told apart."""

    def advised(s: float | None, n: int = 10) -> str:
        from types import SimpleNamespace

        return advice(SimpleNamespace(signal_to_noise=s, provenance=SimpleNamespace(batches=n, tokens=9 * n)))  # type: ignore

    assert "unknown" in advised(None)
    assert "hides the signal. Collect 40 batches in all" in advised(-0.1)
    assert "More batches are worth it: 20 in all (--batches 20) would give 0.82, about 93 in all give 0.95" in advised(
        1.0
    )
    assert "That is enough: 20 batches in all would give 0.98" in advised(10.0)


def test_batches_for_a_cosine_are_right_where_the_truth_is_known() -> None:
    """Micro-batch gradients μ + noise of known size: the predicted number of batches reaches the cosine."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(20_000, generator=generator)
    n, cosine = 4, 0.9
    signal_to_noise = n * 1.0 / 25.0  # noise of variance 25 per element and batch, signal of variance 1
    needed = batches_for(cosine, signal_to_noise, n)
    assert needed == math.ceil(25 * 0.81 / 0.19)
    mean = true + 5 * torch.randn(needed, 20_000, generator=generator).mean(0)
    assert torch.cosine_similarity(mean, true, dim=0).item() == pytest.approx(cosine, abs=0.01)
    few = true + 5 * torch.randn(n, 20_000, generator=generator).mean(0)  # control: the batches at hand do not
    assert torch.cosine_similarity(few, true, dim=0).item() == pytest.approx(expected_cosine(0.16), abs=0.02)


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_prints_each_tensor_and_the_totals(inputs: Path, tmp_path: Path) -> None:
    """Protects ``inspect``: table, totals, plot and JSON show what the file holds."""
    out = tmp_path / "g.safetensors"
    assert run_collect(inputs, out, "--format", "int8", "--rank", 8).exit_code == 0
    result = run("inspect", out, "--plot", tmp_path / "g.png", "--verify")
    assert result.exit_code == 0, result.output
    gradient = GlobalGradient.load(out)
    for name, record in gradient.records.items():
        (row,) = [line for line in result.output.splitlines() if f" {name} " in line]
        shown = f"rank {record.rank}, int8" if record.rank else record.format
        assert shown in row and f"{math.sqrt(record.squared_norm):.3e}" in row and f"{record.cosine:.6f}" in row
        assert f"{record.signal_to_noise:.3g}" in row
    assert f"{gradient.nbytes:,} bytes" in result.output and "chat.jsonl" in result.output
    assert f"the digests of all {len(gradient)} tensors are right" in result.output
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads(run("inspect", out, "--json").output)
    assert sum(tensor["bytes"] for tensor in data["tensors"]) == data["bytes"] == gradient.nbytes
    assert data["provenance"]["batches"] == 8


def test_inspect_refuses_what_is_no_global_gradient(
    inputs: Path, collected: tuple[Path, Result], tmp_path: Path
) -> None:
    """Protects ``inspect``: damaged data, folders, missing and foreign files are refused by name."""
    damaged = tmp_path / "damaged.safetensors"
    content = bytearray(collected[0].read_bytes())
    content[-100] ^= 1
    damaged.write_bytes(content)
    assert run("inspect", damaged).exit_code == 0  # the headers are whole
    cases = [((damaged, "--verify"), "the file is corrupt"), ((inputs,), "got the folder")]
    cases += [((tmp_path / "no.safetensors",), "there is no"), ((inputs / "chat.jsonl",), "corrupt or of another kind")]
    for arguments, message in cases:
        result = run("inspect", *arguments)
        assert result.exit_code == 1 and message in result.output, result.output


# --- plan -------------------------------------------------------------------------------------------------------------


def test_plan_counts_what_the_library_really_stores(inputs: Path) -> None:
    """Protects ``plan``: its bytes are those that files and optimizers of each format really hold."""
    shapes, _ = plan_command.model_shapes(str(inputs / "model" / "config.json"))  # no weights are read
    model = transformers.AutoModelForCausalLM.from_pretrained(inputs / "model")
    assert shapes == {name: tuple(param.shape) for name, param in model.named_parameters()}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    sizes = Sizes(shapes, torch.bfloat16, rank=8)
    for format in STORAGE_FORMATS:
        assert sizes.globals[format] == GlobalGradient.from_tensors(tensors, format).nbytes, format
    assert sizes.globals["rank 8, int8"] == GlobalGradient.from_tensors(tensors, "int8", rank=8).nbytes
    for param_format in sizes.param_formats:
        for state_format in STATE_FORMATS:
            params = [torch.nn.Parameter(tensor.bfloat16()) for tensor in tensors.values()]
            optimizer = DBAAdamW(params, lr=1e-5, param_format=param_format, state_format=state_format)
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
            held = [param for param in params] + [param.grad for param in params]
            held += [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
            assert sizes.total(param_format, state_format, 0) == sum(tensor.nbytes for tensor in held)


def test_plan_prints_totals_and_the_batches_that_are_needed(inputs: Path, collected: tuple[Path, Result]) -> None:
    """Protects ``plan``: the printed totals and the number of further batches follow from the formulas."""
    result = run("plan", "--model", inputs / "model", "--global-gradient", collected[0], "--cosine", 0.999)
    assert result.exit_code == 0, result.output
    sizes = Sizes(plan_command.model_shapes(str(inputs / "model"))[0], torch.bfloat16)
    (row,) = [line for line in result.output.splitlines() if "split8" in line and "int8" in line]
    assert f"{sizes.total('split8', 'int8', sizes.globals['int4']) / sizes.parameters:.2f} (" in row
    s = GlobalGradient.load(collected[0]).signal_to_noise
    needed = math.ceil(8 * 0.999**2 / (1 - 0.999**2) / s)
    assert f"n' = n · c² / (1 − c²) / s = {needed:,}: collect {needed - 8:,} more" in result.output
    data = json.loads(run("plan", "--model", inputs / "model", "--dtype", "fp32", "--json").output)
    assert {total["param_format"] for total in data["totals"]} == {"native"} and data["batches"] is None
