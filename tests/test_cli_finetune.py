"""``finetune``, and what is left of it and of ``collect`` after SIGKILL: the same bits as without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from dba_kernels import DBAAdamW, GlobalGradient, annealing_schedule  # noqa: E402
from dba_kernels.cli import checkpoint, finetune_run  # noqa: E402
from dba_kernels.cli.output import InputError  # noqa: E402
from dba_kernels.cli.packing import Batches, Encoder  # noqa: E402
from dba_kernels.cli.text import Corpus  # noqa: E402

from .support.cli_inputs import SMALL, run, write_inputs  # noqa: E402

STEPS, LR = 8, 2e-5
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    out = ("--data", folder / "general.jsonl", "--batches", 6, "--out", folder / "g.safetensors")
    assert run("collect", "--model", folder / "model", *out, *SMALL).exit_code == 0
    return folder


def arguments(inputs: Path, out: Path, *more: str | Path | int) -> list[str]:
    data = ("--data", inputs / "domain.txt", inputs / "chat.jsonl", "--eval-data", inputs / "held-out.txt")
    how = ("--steps", STEPS, "--lr", LR, "--boost", 0.5, "--batch", 4, "--eval-every", 4, "--save-every", 2)
    gradient = ("--global-gradient", inputs / "g.safetensors")
    return [
        str(a) for a in ("finetune", "--model", inputs / "model", *data, *gradient, *how, "--out", out, *SMALL, *more)
    ]


def run_finetune(inputs: Path, out: Path, *more: str | Path | int) -> Result:
    return run(*arguments(inputs, out, *more))


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("finished") / "new" / "tuned"
    result = run_finetune(inputs, out)
    assert result.exit_code == 0, result.output
    return out, result


# --- a run ------------------------------------------------------------------------------------------------------------


def test_it_writes_a_model_metrics_and_a_figure(inputs: Path, finished: tuple[Path, Result]) -> None:
    """Protects the result of a run: a model that has moved, metrics on the schedules, a figure, no remains."""
    out, result = finished
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.config.use_cache  # what the base said; it was off while training
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template
    base = transformers.AutoModelForCausalLM.from_pretrained(inputs / "model")
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True)]
    assert all(moved)
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "metrics.jsonl", "figure.png", "run.json", "tokenizer.json"} <= names
    assert not any(name.startswith(".") or name == "checkpoints" for name in names)
    written = lines(out)
    assert [line["step"] for line in written] == list(range(STEPS + 1))
    assert [line["step"] for line in written if "eval_loss" in line] == [0, 4, 8]
    assert [line["lr"] for line in written[1:]] == pytest.approx([LR * (1 - t / STEPS) for t in range(STEPS)])
    assert [line["gamma"] for line in written[1:]] == pytest.approx([0.5 * (1 - t / STEPS) for t in range(STEPS)])
    outcome = json.loads((out / "run.json").read_text())
    assert f"{outcome['eval_loss_before']:.4f} before, {outcome['eval_loss_after']:.4f} after" in result.output
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_it_is_the_plain_loop(inputs: Path, tmp_path: Path) -> None:
    """The same weights as a loop in a user's own script, without dropout and to the bit."""
    model_folder = tmp_path / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(inputs / "model", attention_dropout=0.0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(inputs / "model")
    model.save_pretrained(model_folder)
    tokenizer.save_pretrained(model_folder)
    result = run_finetune(inputs, tmp_path / "out", "--model", model_folder, "--max-grad-norm", 0.5)
    assert result.exit_code == 0, result.output

    corpus = Corpus([str(inputs / "domain.txt"), str(inputs / "chat.jsonl")])
    batches = iter(Batches(corpus, Encoder(tokenizer), length=32, size=4, seed=0, repeat=True))
    optimizer = DBAAdamW(
        model.named_parameters(), lr=LR, weight_decay=0.0, global_gradient=inputs / "g.safetensors", total_steps=STEPS,
        boost=0.5, max_grad_norm=0.5,
    )  # fmt: skip
    scheduler = annealing_schedule(optimizer, STEPS)
    for _ in range(STEPS):
        model(**next(batches), use_cache=False).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    tuned = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tuned.parameters(), strict=True))


@pytest.mark.parametrize(("boost", "gamma"), [("auto", 0.3), ("paper", 0.5), ("0.2", 0.2)])
def test_boost_by_name(inputs: Path, tmp_path: Path, boost: str, gamma: float) -> None:
    """``auto`` follows the learning rate, ``paper`` is 200 / T up to --boost-max, a number is k₀."""
    result = run_finetune(inputs, tmp_path, "--boost", boost, "--steps", 1, "--lr", 1e-2)
    assert result.exit_code == 0, result.output
    assert next(line["gamma"] for line in lines(tmp_path) if "gamma" in line) == pytest.approx(gamma)


def test_micro_batches_change_rounding_only(inputs: Path, finished: tuple[Path, Result], tmp_path: Path) -> None:
    """Without dropout, whose random numbers fall otherwise: the first loss and the first gradient agree."""
    model = transformers.AutoModelForCausalLM.from_pretrained(inputs / "model", attention_dropout=0.0)
    model.save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(inputs / "model").save_pretrained(tmp_path / "model")
    first = []
    for rows in (4, 3):
        result = run_finetune(
            inputs, tmp_path / str(rows), "--model", tmp_path / "model", "--micro-batch", rows, "--steps", 1
        )
        assert result.exit_code == 0, result.output
        first.append(lines(tmp_path / str(rows))[1])
    for line in first[1:]:
        assert line["targets"] == first[0]["targets"]
        assert line["loss"] == pytest.approx(first[0]["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(first[0]["grad_norm"], rel=1e-4)


def test_compressed_state_and_bf16_weights(inputs: Path, tmp_path: Path) -> None:
    """Protects the least memory: bf16 weights with int8 state and 8-bit remainders run and are saved as bf16."""
    formats = ("--dtype", "bf16", "--state-format", "int8", "--param-format", "split8")
    result = run_finetune(inputs, tmp_path / "out", *formats)
    assert result.exit_code == 0, result.output
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_without_a_global_gradient_it_is_adamw(inputs: Path, tmp_path: Path) -> None:
    """Protects plain AdamW: without a global gradient nothing of the method is reported."""
    options = ("--data", inputs / "domain.txt", "--steps", 2, "--out", tmp_path / "out")
    result = run("finetune", "--model", inputs / "model", *options, *SMALL)
    assert result.exit_code == 0, result.output
    assert "gamma" not in lines(tmp_path / "out")[-1] and "eval_loss" not in lines(tmp_path / "out")[-1]
    assert (tmp_path / "out" / "figure.png").exists()


# --- killed, and resumed ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tuned/``: a run killed half-way through writing its checkpoint after step 6. ``whole.safetensors``: collected
    by two processes; ``g.safetensors``: the same, one of them killed after 3 of 4 micro-batches, then resumed."""
    folder = tmp_path_factory.mktemp("killed")
    collect = ["collect", "--model", str(inputs / "model"), "--data", str(inputs / "general.jsonl"), "--batches", "8"]
    collect += ["--batch", "2", "--snapshot-every", "1", *SMALL, "--out"]
    both: dict[str, Any] = {"ranks": 2, "argv": [*collect, str(folder / "g.safetensors")]}
    jobs = [
        {"argv": arguments(inputs, folder / "tuned"), "kill": ["checkpoint", 6]},
        {"ranks": 2, "argv": [*collect, str(folder / "whole.safetensors")]},
        both | {"kill": ["batch", 1, 3]},
        both,
    ]
    command = [sys.executable, "-m", "tests.support.cli_kill", json.dumps(jobs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    tuned, whole, interrupted, resumed = json.loads(done.stdout)
    assert (tuned, whole, resumed) == ([-9], [0, 0], [0, 0]), done.stderr
    assert interrupted[1] == -9 and interrupted[0] != 0, done.stderr
    assert "going on from" in done.stderr
    return folder


def test_a_killed_run_resumes_to_the_same_bits(inputs: Path, finished: tuple[Path, Result], killed: Path) -> None:
    """Protects hours of training: a run killed while it wrote a checkpoint resumes to the same bits."""
    out = killed / "tuned"
    left = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert len([name for name in left if name.endswith(".partial")]) == 1
    assert [name[:13] for name in left if name.endswith(".pt")] == ["step-00000002", "step-00000004"]
    assert "holds an unfinished run; go on with --resume" in run_finetune(inputs, out).output
    result = run_finetune(inputs, out, "--resume")
    assert result.exit_code == 0, result.output
    assert "going on after step 4 of 8" in result.output
    assert weights(out) == weights(finished[0])
    for ours, theirs in zip(lines(out), lines(finished[0]), strict=True):
        assert {k: v for k, v in ours.items() if k != "seconds"} == {k: v for k, v in theirs.items() if k != "seconds"}
    again = run_finetune(inputs, out, "--resume")
    assert again.exit_code == 0 and "finished already" in again.output
    assert not (out / "checkpoints").exists()


@pytest.mark.parametrize("forgotten", ["moments", "random", "scheduler", None])
def test_every_part_of_a_checkpoint_counts(
    inputs: Path, finished: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str | None
) -> None:
    """Control: a resumed run that forgets a part of the checkpoint ends elsewhere; one that forgets none does not."""
    save = checkpoint.Checkpoints.save

    def interrupt(self: checkpoint.Checkpoints, step: int, *rest: Any) -> None:
        save(self, step, *rest)
        if step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Checkpoints, "save", interrupt)
    stopped = run_finetune(inputs, tmp_path)
    assert stopped.exit_code == 130 and "go on with the same command and --resume" in stopped.output
    monkeypatch.undo()
    if forgotten == "moments":
        load = DBAAdamW.load_state_dict

        def forgetful(self: DBAAdamW, saved: dict[str, Any]) -> None:
            load(self, saved)
            for state in self.state.values():
                state["exp_avg"].zero_()

        monkeypatch.setattr(finetune_run.DBAAdamW, "load_state_dict", forgetful)
    elif forgotten == "random":
        monkeypatch.setattr(torch, "set_rng_state", lambda _: None)
    elif forgotten == "scheduler":
        monkeypatch.setattr(torch.optim.lr_scheduler.LambdaLR, "load_state_dict", lambda *_: None)
    result = run_finetune(inputs, tmp_path, "--resume")
    assert result.exit_code == 0, result.output
    assert (weights(tmp_path) == weights(finished[0])) == (forgotten is None)


def test_a_collection_killed_under_two_processes_resumes_to_the_same_bytes(inputs: Path, killed: Path) -> None:
    """Protects hours of collection: two processes, killed and resumed, write the same file as two that were not."""
    files = {path.name for path in killed.glob("*.safetensors")}
    kept = {f"{stem}.snapshot-{rank}-of-2.safetensors" for stem in ("whole", "g") for rank in range(2)}
    assert files == {"whole.safetensors", "g.safetensors"} | kept
    assert (killed / "g.safetensors").read_bytes() == (killed / "whole.safetensors").read_bytes()
    two = GlobalGradient.load(killed / "g.safetensors")
    assert two.provenance.batches == 8
    one = killed / "one.safetensors"
    options = ("--data", inputs / "general.jsonl", "--batches", 8, "--batch", 2, "--out", one)
    assert run("collect", "--model", inputs / "model", *options, *SMALL).exit_code == 0
    single = GlobalGradient.load(one)
    assert single.provenance.tokens == two.provenance.tokens
    assert all(torch.cosine_similarity(single[n].flatten(), two[n].flatten(), dim=0) > 0.9999 for n in single)


def test_the_newest_two_checkpoints_are_kept_and_a_broken_one_is_passed_over(tmp_path: Path) -> None:
    """Protects against a damaged checkpoint: the one before it is used, and other settings are refused."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = annealing_schedule(optimizer, 10)
    kept = checkpoint.Checkpoints(tmp_path / "c", {"seed": 0})
    assert kept.load() == (None, [])
    for step in (1, 2, 3):
        kept.save(step, model, optimizer, scheduler, "")
    assert [file.name[:13] for file in kept.files()] == ["step-00000002", "step-00000003"]
    newest = kept.files()[-1]
    newest.write_bytes(b"broken")
    found, damaged = kept.load()
    assert found is not None and found["step"] == 2 and [note.split(":")[0] for note in damaged] == [str(newest)]
    with pytest.raises(InputError, match="expected --seed 0, got 1"):
        checkpoint.Checkpoints(tmp_path / "c", {"seed": 1}).load()
    kept.save(3, model, optimizer, scheduler, "")  # gone on from step 2: the broken one does not count as one of two
    assert [file.name[:13] for file in kept.files()] == ["step-00000002", "step-00000003"]
    assert kept.load()[1] == []
    for file in kept.files():
        file.write_bytes(b"")
    with pytest.raises(InputError, match="no other is left: start anew"):
        kept.load()


def test_a_flipped_bit_in_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    """Protects against training on from damaged state: any bit of the file is noticed, and the one before is used."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    kept = checkpoint.Checkpoints(tmp_path / "c", {"seed": 0})
    for step in (1, 2):
        kept.save(step, model, optimizer, annealing_schedule(optimizer, 10), "")
    newest = kept.files()[-1]
    whole = newest.read_bytes()
    for position in range(0, 8 * len(whole), 8 * len(whole) // 60):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        newest.write_bytes(damaged)
        found, notes = kept.load()
        assert found is not None and found["step"] == 1
        assert notes[0].startswith(f"{newest}: expected a whole checkpoint, it is damaged")
    newest.write_bytes(whole)  # control
    found, notes = kept.load()
    assert found is not None and found["step"] == 2 and notes == []


# --- what it refuses --------------------------------------------------------------------------------------------------


def test_another_run_in_the_same_folder_is_refused(inputs: Path, finished: tuple[Path, Result]) -> None:
    """Protects finished results: another run in their folder is refused and changes nothing."""
    before = weights(finished[0])
    for more, message in (
        ((), "holds a finished run"),
        (("--resume", "--lr", "1e-5"), "expected --lr 2e-05, got 1e-05"),
        (("--resume", "--seed", 3), "expected --seed 0, got 3"),
    ):
        result = run_finetune(inputs, finished[0], *more)
        assert result.exit_code == 1 and message in result.output, result.output
    assert weights(finished[0]) == before


def test_resuming_on_other_data_is_refused(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects a resumed run: changed data are noticed and refused."""
    text = tmp_path / "own.txt"
    text.write_text((inputs / "domain.txt").read_text())
    monkeypatch.setattr(finetune_run.Training, "finish", lambda _: iter(()))
    options = ("--model", inputs / "model", "--data", text, "--steps", 2, "--out", tmp_path / "out", *SMALL)
    assert run("finetune", *options).exit_code == 0
    text.write_text(text.read_text()[::-1])
    result = run("finetune", *options, "--resume")
    assert result.exit_code == 1 and "--data: expected the data that the run was started with" in result.output


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--warmup", 8), "--warmup: expected fewer than --steps 8, got 8"),
        (("--global-gradient", "nothing.safetensors"), "--global-gradient: expected a file that `collect` wrote"),
        (("--boost", "much"), "--boost: expected a number, 'auto' or 'paper', got 'much'"),
        (("--boost", "-1"), "boost: expected a name, k0 >= 0"),
        (("--out", "{inputs}/domain.txt"), "cannot write to"),
    ],
)
def test_bad_options_are_refused(inputs: Path, tmp_path: Path, more: tuple[str, Any], message: str) -> None:
    """Protects the user's time: each bad option is refused with what was expected and what was given."""
    result = run_finetune(inputs, tmp_path / "out", *(str(part).format(inputs=inputs) for part in more))
    assert result.exit_code == 1, result.output
    assert message in result.output


@pytest.mark.parametrize("option", [("--boost", 0.1), ("--boost-max", 0.2), ("--correction", "none")])
def test_the_methods_options_need_a_global_gradient(inputs: Path, tmp_path: Path, option: tuple[str, Any]) -> None:
    """A forgotten --global-gradient is an error, not plain AdamW under another name."""
    how = ("--model", inputs / "model", "--data", inputs / "domain.txt", "--steps", STEPS, "--out", tmp_path / "out")
    result = run("finetune", *how, *option)
    assert result.exit_code == 1 and f"{option[0]}: needs --global-gradient" in result.output
    assert not (tmp_path / "out").exists()


def test_a_gradient_of_another_model_is_refused(inputs: Path, tmp_path: Path) -> None:
    """Protects against the wrong model: a global gradient of other weights is refused."""
    model = transformers.AutoModelForCausalLM.from_pretrained(inputs / "model")
    with torch.no_grad():
        model.model.norm.weight += 0.1
    model.save_pretrained(tmp_path / "other")
    transformers.AutoTokenizer.from_pretrained(inputs / "model").save_pretrained(tmp_path / "other")
    result = run_finetune(inputs, tmp_path / "out", "--model", tmp_path / "other")
    assert result.exit_code == 1
    assert "this is not the model that the global gradient was collected on" in result.output


def test_several_processes_are_refused(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects who starts several processes: one error says what to use for that."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run_finetune(inputs, tmp_path)
    assert result.exit_code == 1 and "use the Hugging Face Trainer with DBAAdamW" in result.output
