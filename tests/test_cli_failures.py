"""What goes wrong while the command line works: messages, exit statuses, and what is left behind."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from dba_kernels import DBAAdamW, GlobalGradientCollector  # noqa: E402
from dba_kernels.cli import collect_command, failures, figures, finetune_run, output, plan_command  # noqa: E402
from dba_kernels.cli.output import InputError  # noqa: E402
from dba_kernels.cli.text import Corpus  # noqa: E402

from .support.cli_inputs import SMALL, run, sentences, write_inputs, write_jsonl  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
STEPS = 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    assert collect(folder, folder / "g.safetensors").exit_code == 0
    return folder


def collect(inputs: Path, out: Path, *more: str | Path | int) -> Result:
    data = () if "--data" in more else ("--data", inputs / "general.jsonl")
    return run("collect", "--model", inputs / "model", *data, "--batches", 6, "--out", out, *SMALL, *more)


def finetune(inputs: Path, out: Path, *more: str | Path | int | float) -> Result:
    data = () if "--data" in more else ("--data", inputs / "domain.txt")
    how = (*data, "--steps", STEPS, "--batch", 2, "--save-every", 2)
    return run("finetune", "--model", inputs / "model", *how, "--out", out, *SMALL, *more)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def saved_steps(out: Path) -> list[int]:
    return [int(file.name[5:13]) for file in sorted((out / "checkpoints").glob("*.pt"))]


# --- runs that diverge ------------------------------------------------------------------------------------------------


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, change: Any) -> None:
    """Call ``change(training)`` before that step."""
    honest = finetune_run.Training.step

    def changed(self: finetune_run.Training, batch: Any) -> Any:
        if self.done + 1 == step:
            change(self)
        return honest(self, batch)

    monkeypatch.setattr(finetune_run.Training, "step", changed)


def poison(training: finetune_run.Training) -> None:
    with torch.no_grad():
        next(training.work.model.parameters()).fill_(torch.nan)


def test_a_loss_that_becomes_nan_stops_the_run(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the model: a run that diverges ends with status 1, keeps its last good checkpoint, writes no model."""
    at_step(monkeypatch, 4, poison)
    result = finetune(inputs, tmp_path / "out")
    assert result.exit_code == 1
    assert "step 4: expected the loss to be finite, got nan: the run has diverged" in result.output
    assert "its last good checkpoint, after step 2, stays in" in result.output
    assert saved_steps(tmp_path / "out") == [2]
    assert not (tmp_path / "out" / "config.json").exists() and not (tmp_path / "out" / "run.json").exists()
    monkeypatch.undo()
    assert finetune(inputs, tmp_path / "out", "--resume").exit_code == 0  # what was kept is good


def test_weights_that_become_nan_in_the_last_step_are_noticed(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the model: no loss is computed after the last step, so the weights themselves are looked at."""
    honest = DBAAdamW.step

    def last(self: DBAAdamW, *arguments: Any) -> Any:
        result = honest(self, *arguments)
        if next(iter(self.state.values()))["step"] == STEPS:
            with torch.no_grad():
                self.param_groups[0]["params"][0][0, 0] = torch.inf
        return result

    monkeypatch.setattr(DBAAdamW, "step", last)
    result = finetune(inputs, tmp_path / "out")
    assert result.exit_code == 1 and "step 6: expected a weight or its state to be finite" in result.output
    assert saved_steps(tmp_path / "out") == [2, 4] and not (tmp_path / "out" / "config.json").exists()


def test_a_learning_rate_without_bounds_is_a_run_that_diverges(inputs: Path, tmp_path: Path) -> None:
    """Protects the user: the same without any test double, from an absurd --lr; nothing is left to resume."""
    result = finetune(inputs, tmp_path / "out", "--lr", 1e30, "--save-every", 100)
    assert result.exit_code == 1 and "the run has diverged" in result.output, result.output
    assert "there is no checkpoint yet" in result.output
    assert not (tmp_path / "out").exists()


def test_steps_that_are_all_skipped_are_no_run(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the user: where every gradient is infinite, no model is written that is the base under a new name."""

    def infinite(self: finetune_run.Training, batch: Any) -> Any:
        param = next(self.work.model.parameters())
        param.grad = torch.full_like(param, torch.inf)
        return honest(self, batch)

    honest = finetune_run.Training.step
    monkeypatch.setattr(finetune_run.Training, "step", infinite)
    result = finetune(inputs, tmp_path / "out", "--max-grad-norm", 1)
    assert result.exit_code == 1 and "expected the gradients to be finite" in result.output, result.output
    assert not (tmp_path / "out" / "config.json").exists()


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_is_saved_and_goes_on_to_the_same_bits(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Protects the steps since the last checkpoint: Ctrl-C and SIGTERM end the step, save, and say how to go on."""
    assert finetune(inputs, tmp_path / "whole").exit_code == 0
    at_step(monkeypatch, 3, lambda _: os.kill(os.getpid(), number))
    result = finetune(inputs, tmp_path / "out", "--save-every", 100)
    assert result.exit_code == 130, result.output
    assert "stopped after step 3 of 6; go on with the same command and --resume" in result.output
    assert "Error" not in result.output and "Aborted" not in result.output
    assert saved_steps(tmp_path / "out") == [3]
    monkeypatch.undo()
    resumed = finetune(inputs, tmp_path / "out", "--resume")
    assert resumed.exit_code == 0 and "going on after step 3 of 6" in resumed.output
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert same[0] == same[1]


def test_a_second_signal_stops_at_once(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects who cannot wait: the second Ctrl-C does not wait for the step; an older checkpoint is there."""

    def twice(_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the step went on")

    at_step(monkeypatch, 4, twice)
    result = finetune(inputs, tmp_path / "out")
    assert result.exit_code == 130 and "go on with the same command and --resume" in result.output
    assert saved_steps(tmp_path / "out") == [2]
    at_step(monkeypatch, 1, twice)
    result = finetune(inputs, tmp_path / "other")
    assert result.exit_code == 130 and "nothing was kept" in result.output and not (tmp_path / "other").exists()


def test_a_stopped_collection_goes_on_to_the_same_bytes(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects hours of collection: Ctrl-C keeps every batch, says so, and the same command ends in the same file."""
    backward = GlobalGradientCollector.backward

    def interrupted(self: GlobalGradientCollector, *arguments: Any) -> None:
        if self.consumed == 3:
            os.kill(os.getpid(), signal.SIGINT)
        backward(self, *arguments)

    monkeypatch.setattr(collect_command.GlobalGradientCollector, "backward", interrupted)
    result = collect(inputs, tmp_path / "g.safetensors")
    assert result.exit_code == 130 and "stopped after 4 of 6 batches" in result.output, result.output
    assert "the same command goes on from there" in result.output
    monkeypatch.undo()
    resumed = collect(inputs, tmp_path / "g.safetensors")
    assert resumed.exit_code == 0 and "4 of 6 batches are done" in resumed.output
    assert (tmp_path / "g.safetensors").read_bytes() == (inputs / "g.safetensors").read_bytes()


def test_signals_are_as_before_afterwards() -> None:
    """Protects who calls the library: the handlers of the process are put back."""
    before = [signal.getsignal(number) for number in failures.SIGNALS]
    with failures.Interruption() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
    assert [signal.getsignal(number) for number in failures.SIGNALS] == before


def test_an_error_on_one_rank_ends_all_with_its_message(inputs: Path, tmp_path: Path) -> None:
    """Protects jobs of several processes: one rank's damaged snapshot ends both in seconds, and stderr names it.

    As torchrun does, the harness sends SIGTERM to the others when one ends.
    """
    argv = ["collect", "--model", str(inputs / "model"), "--data", str(inputs / "general.jsonl"), "--batch", "2"]
    argv += [*SMALL, "--out", str(tmp_path / "g.safetensors"), "--batches"]

    def run_ranks(batches: int) -> tuple[list[int], str]:
        command = [sys.executable, "-m", "tests.support.cli_kill"]
        jobs = json.dumps([{"ranks": 2, "argv": [*argv, str(batches)]}])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*command, jobs], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=True
        )
        return json.loads(done.stdout)[0], done.stderr

    assert run_ranks(4)[0] == [0, 0]
    snapshot = tmp_path / "g.snapshot-1-of-2.safetensors"
    content = bytearray(snapshot.read_bytes())
    content[-9] ^= 4
    snapshot.write_bytes(content)
    codes, said = run_ranks(8)
    assert codes[1] == 1 and codes[0] in (130, -signal.SIGTERM), codes
    assert f"Error: {snapshot}" in said and "corrupt" in said


# --- what is left behind ----------------------------------------------------------------------------------------------


def test_a_run_that_fails_before_work_leaves_no_folder(inputs: Path, tmp_path: Path) -> None:
    """Protects the next try: a folder that was made for nothing is gone, one that was there stays."""
    out = tmp_path / "new" / "out"
    (tmp_path / "empty.jsonl").write_text("")
    for more in (("--data", tmp_path / "empty.jsonl"), ("--eval-data", "none"), ("--length", 4096), ("--boost", "x")):
        assert finetune(inputs, out, *more).exit_code == 1
        assert not out.parent.exists(), more
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"text": None}])
    assert finetune(inputs, out, "--data", bad, "--eval-data", inputs / "held-out.txt").exit_code == 1
    assert not out.parent.exists()
    out.mkdir(parents=True)
    assert finetune(inputs, out, "--data", bad).exit_code == 1
    assert out.is_dir() and not list(out.iterdir())


def test_steps_before_a_bad_record_are_kept(inputs: Path, tmp_path: Path) -> None:
    """Protects the steps since the last checkpoint: a record that cannot be read ends the run after saving it."""
    records: list[Any] = [{"text": text} for text in sentences(30, 5)]
    late = Corpus([str(write_jsonl(tmp_path / "a.jsonl", records))]).order(0)[20]
    records[late] = {"text": None}
    data = write_jsonl(tmp_path / "a.jsonl", records)
    result = finetune(inputs, tmp_path / "out", "--data", data, "--steps", 50, "--save-every", 100)
    assert result.exit_code == 1 and f"record {late + 1}: expected text in field" in result.output
    (step,) = saved_steps(tmp_path / "out")
    assert step == lines(tmp_path / "out")[-1]["step"] > 0


def test_a_finished_folder_does_not_say_go_on(inputs: Path, tmp_path: Path) -> None:
    """Protects the message: of a finished run nothing is left to resume, and an unfinished one says --resume."""
    assert finetune(inputs, tmp_path / "out").exit_code == 0
    again = finetune(inputs, tmp_path / "out")
    assert again.exit_code == 1 and "holds a finished run; choose another folder, or delete it" in again.output
    assert "--resume" not in again.output


def test_damaged_results_are_named(inputs: Path, tmp_path: Path) -> None:
    """Protects against raw tracebacks: a damaged run.json or metrics.jsonl is refused by name."""
    assert finetune(inputs, tmp_path / "out").exit_code == 0
    for content in ("{", "[]", "3", '{"settings": 3}', "[" * 100_000):
        (tmp_path / "out" / "run.json").write_text(content)
        result = finetune(inputs, tmp_path / "out", "--resume")
        assert result.exit_code == 1 and "run.json: expected" in result.output, result.output


def test_damaged_metrics_are_named(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects against raw tracebacks: a line that is none of ours is refused with its number."""
    at_step(monkeypatch, 3, lambda _: os.kill(os.getpid(), signal.SIGINT))
    assert finetune(inputs, tmp_path / "out").exit_code == 130
    monkeypatch.undo()
    metrics = tmp_path / "out" / "metrics.jsonl"
    whole = metrics.read_text()
    for line in ("{", "3", "{}", '{"step": null}', '{"step": Infinity}'):
        metrics.write_text(whole + line + "\n")
        result = finetune(inputs, tmp_path / "out", "--resume")
        assert result.exit_code == 1 and "metrics.jsonl, line 4: expected the metrics of a step" in result.output
    metrics.write_text(whole + '{"step": 4, "lo')  # a killed process has left it half
    assert finetune(inputs, tmp_path / "out", "--resume").exit_code == 0


def test_state_that_is_no_file_is_named_or_gone_round(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects against waiting for ever and raw errors: pipes, folders and missing files among a run's own."""
    at_step(monkeypatch, 6, lambda _: os.kill(os.getpid(), signal.SIGINT))
    assert finetune(inputs, tmp_path / "out").exit_code == 130
    monkeypatch.undo()
    out = tmp_path / "out"
    newest = sorted((out / "checkpoints").glob("*.pt"))[-1]
    newest.unlink()
    for make in (os.mkfifo, os.mkdir):
        make(newest)
        copy = Path(shutil.copytree(out, tmp_path / "copy", copy_function=copy_or_make))
        result = finetune(inputs, copy, "--resume")
        assert (
            result.exit_code == 0 and f"{newest.name}: expected a whole checkpoint, it is no regular" in result.output
        )
        shutil.rmtree(copy)
        newest.unlink() if newest.is_fifo() else newest.rmdir()
    (out / "metrics.jsonl").unlink()
    os.mkfifo(out / "metrics.jsonl")
    result = finetune(inputs, out, "--resume")
    assert result.exit_code == 1 and "metrics.jsonl: expected a regular file" in result.output
    (out / "metrics.jsonl").unlink()
    result = finetune(inputs, out, "--resume")  # missing: the model is what counts
    assert result.exit_code == 0 and "lacks steps that were done" in result.output, result.output


def copy_or_make(source: str, target: str) -> None:
    os.mkfifo(target) if Path(source).is_fifo() else shutil.copy(source, target)


# --- files of gradients -----------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_the_gradient_is_noticed_before_training(inputs: Path, tmp_path: Path) -> None:
    """Protects against a raw error in the first step: the file's digests are checked before there is anything."""
    content = bytearray((inputs / "g.safetensors").read_bytes())
    content[-100] ^= 4
    (tmp_path / "g.safetensors").write_bytes(content)
    result = finetune(inputs, tmp_path / "out", "--global-gradient", tmp_path / "g.safetensors")
    assert result.exit_code == 1 and "--global-gradient: " in result.output and "corrupt" in result.output
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_is_not_called_finished(inputs: Path, tmp_path: Path) -> None:
    """Protects who repeats a command: a file that is there but damaged is refused, not reported as finished."""
    content = bytearray((inputs / "g.safetensors").read_bytes())
    (tmp_path / "g.safetensors").write_bytes(content)
    assert "finished already" in collect(inputs, tmp_path / "g.safetensors").output  # control
    content[-100] ^= 4
    (tmp_path / "g.safetensors").write_bytes(content)
    result = collect(inputs, tmp_path / "g.safetensors")
    assert result.exit_code == 1 and "it is there already, but damaged" in result.output, result.output


def test_a_gradient_that_changes_under_a_run_is_named(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects against a raw error: a file that is damaged after it was checked ends the run with its name."""
    path = tmp_path / "g.safetensors"
    path.write_bytes((inputs / "g.safetensors").read_bytes())

    def damage(_: Any) -> None:
        with open(path, "r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(b"\xff" * 50)

    at_step(monkeypatch, 1, damage)
    result = finetune(inputs, tmp_path / "out", "--global-gradient", path)
    assert result.exit_code == 1 and str(path) in result.output, result.output


def test_inspect_draws_png_only_and_says_what_it_lacks(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects ``inspect --plot``: another ending, and a missing matplotlib, are refused before anything is written."""
    gradient = inputs / "g.safetensors"
    for name in ("x.txt", "x", "x.png.bak"):
        result = run("inspect", gradient, "--plot", tmp_path / name)
        assert result.exit_code == 1 and "--plot: expected a name that ends in .png" in result.output
    assert run("inspect", gradient, "--plot", tmp_path / "x.PNG").exit_code == 0
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("inspect", gradient, "--plot", tmp_path / "y.png")
    assert result.exit_code == 1 and "run: pip install matplotlib" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["x.PNG"]
    with pytest.raises(InputError):
        figures.require_matplotlib()


def test_a_run_without_matplotlib_loses_its_figure_alone(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects a finished run: what cannot be drawn is said, and the model is there."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = finetune(inputs, tmp_path / "out")
    assert result.exit_code == 0 and "no figure: figures are drawn with matplotlib" in result.output
    assert (tmp_path / "out" / "model.safetensors").exists() and not (tmp_path / "out" / "figure.png").exists()


def test_messages_name_the_file_and_not_the_argument(inputs: Path, tmp_path: Path) -> None:
    """Protects the message of ``inspect``: it begins with what is wrong, not with "FILE:"."""
    result = run("inspect", tmp_path / "none.safetensors")
    assert result.exit_code == 1
    assert result.output == f"Error: expected a file that `collect` wrote, there is no '{tmp_path}/none.safetensors'\n"


def test_a_snapshot_of_other_options_says_which(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the message: another --length or --seed is named, in the command's words."""
    backward = GlobalGradientCollector.backward

    def interrupted(self: GlobalGradientCollector, *arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        backward(self, *arguments)

    monkeypatch.setattr(collect_command.GlobalGradientCollector, "backward", interrupted)
    assert collect(inputs, tmp_path / "g.safetensors").exit_code == 130
    monkeypatch.undo()
    for more, words in (
        (("--length", 64), "(4 x 32 tokens per batch in place of 4 x 64 tokens per batch)"),
        (("--seed", 1), "(seed 0 in place of seed 1)"),
        (("--data", inputs / "chat.jsonl"), "general.jsonl in place of"),
    ):
        result = collect(inputs, tmp_path / "g.safetensors", *more)
        assert result.exit_code == 1 and words in result.output, result.output
        assert "snapshot_path" not in result.output and "choose another --out" in result.output


def test_the_reason_of_a_failed_write_fits(tmp_path: Path) -> None:
    """Protects the message: only a full disk is told to free some space."""
    for number, full in ((errno.ENOSPC, True), (errno.ENOENT, False), (errno.EACCES, False)):

        def fail(_: Path, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        with pytest.raises(InputError) as caught:
            output.write_whole(tmp_path / "x", fail)
        assert ("free some space" in caught.value.message) == full
    with pytest.raises(InputError, match="No such file or directory; choose another place"):
        output.write_whole(tmp_path / "none" / "x", lambda path: path.write_text("x"))


def test_replaced_files_keep_their_mode_and_temporary_names_cannot_be_guessed(tmp_path: Path) -> None:
    """Protects other users' files: a mode stays, and a link planted under a temporary name cannot be met."""
    path = tmp_path / "x"
    path.write_text("old")
    path.chmod(0o640)
    names = []
    for _ in range(2):
        output.write_whole(path, lambda scratch: (names.append(scratch.name), scratch.write_text("new")))
    assert path.stat().st_mode & 0o777 == 0o640 and path.read_text() == "new"
    assert names[0] != names[1] and not any(str(os.getpid()) == part for part in names[0].split("."))


# --- the one place ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "out of memory; use fewer rows"),
        (MemoryError(), 1, "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 1, "/x: No space left on device; free some space"),
        (KeyboardInterrupt(), 130, "stopped"),
        (KeyError("x"), 70, "KeyError: 'x'\nThis is an error of dba-kernels: run it again with DBA_DEBUG=1"),
    ],
)
def test_exceptions_become_messages(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, words: str
) -> None:
    """Protects the terminal: each kind of exception has its status and words, and a traceback is there when asked."""

    def fail(_: str) -> None:
        raise error

    monkeypatch.setattr(plan_command, "model_shapes", fail)
    monkeypatch.delenv("DBA_DEBUG", raising=False)
    result = run("plan", "--model", "x")
    assert result.exit_code == status and words in result.output and "Traceback" not in result.output
    monkeypatch.setenv("DBA_DEBUG", "1")
    result = run("plan", "--model", "x")
    assert (result.exception is error) == isinstance(error, Exception)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_output_without_unicode_kills_nothing(inputs: Path, tmp_path: Path, encoding: str) -> None:
    """Protects a finished collection: a terminal that has no ĝ gets a ?, and the command its status 0."""
    out = tmp_path / "g.safetensors"
    arguments = ["collect", "--model", inputs / "model", "--data", inputs / "general.jsonl", "--batches", 2, *SMALL]
    command = [sys.executable, "-m", "dba_kernels", *map(str, (*arguments, "--out", out))]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert b"?_G" in done.stdout and out.exists()


@pytest.mark.parametrize(
    "more",
    [
        ("--seed", 2**64),
        ("--seed", 10**30),
        ("--steps", 10**30),
        ("--batch", 10**9),
        ("--length", 10**9),
        ("--lr", "nan"),
        ("--lr", "inf"),
        ("--weight-decay", "nan"),
        ("--max-grad-norm", "inf"),
        ("--save-every", 10**20),
        ("--warmup", 10**20),
    ],
)
def test_numbers_out_of_range_are_refused(inputs: Path, tmp_path: Path, more: tuple[str, Any]) -> None:
    """Protects against overflows: numbers that no run can have are wrong usage, status 2."""
    result = finetune(inputs, tmp_path / "out", *more)
    assert result.exit_code == 2 and f"Invalid value for '{more[0]}'" in result.output, result.output
    assert not (tmp_path / "out").exists()


def test_the_largest_seed_runs(inputs: Path, tmp_path: Path) -> None:
    """Control: the largest seed that is taken works, epoch after epoch."""
    assert finetune(inputs, tmp_path / "out", "--seed", 2**62, "--data", inputs / "held-out.txt").exit_code == 0
    assert isinstance(sys.stdout, io.TextIOBase)
