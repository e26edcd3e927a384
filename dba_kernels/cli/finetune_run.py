"""The run of ``dba-kernels finetune``: steps, metrics, checkpoints, and what is written at the end."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dba_kernels import DBAAdamW, GlobalGradient, annealing_schedule
from dba_kernels.schedule import ANCHORS, BOOSTS

from .checkpoint import FOLDER, Checkpoints, extend_digest
from .failures import Interruption, Stopped
from .figures import require_matplotlib, run_figure, save, short_name
from .finetune_options import Options
from .held_out import KINDS, HeldOut, before_and_after, in_words
from .output import InputError, write_folder, write_whole
from .packing import Batch, Batches
from .progress import Bars, duration, progress
from .workload import Workload, count_targets

TIMED = 2
"""The step, of those that this process does, by which the time left is foretold; the first is slower."""


class Diverged(InputError):
    """Numbers that are not finite, which no further step makes finite again."""


class Training:
    """One run: its optimizer and schedule, where it stands, and what it has written.

    Args:
        options, settings: of the command; what checkpoints must agree in.
        work: the base model.
        gradient: ĝ_G, or None.

    Raises:
        InputError: settings that the optimizer refuses, a gradient of another model, a checkpoint of another run.
    """

    def __init__(
        self,
        options: Options,
        work: Workload,
        gradient: GlobalGradient | None,
        settings: dict[str, Any],
        console: Console,
    ) -> None:
        self.options, self.work, self.settings, self.console = options, work, settings, console
        self.checkpoints = Checkpoints(options.out / FOLDER, settings)
        self.metrics_file = options.out / "metrics.jsonl"
        self.optimizer = self._optimizer(gradient)
        self.scheduler = annealing_schedule(self.optimizer, options.steps, options.warmup)
        self.done = self.saved = 0  # steps; those that the newest checkpoint holds
        self._data_digest = ""
        if options.resume:
            self._resume()

    def _optimizer(self, gradient: GlobalGradient | None) -> DBAAdamW:
        o, method = self.options, {}
        try:
            if gradient is not None:
                gradient.check_model(self.work.model.named_parameters())
                boost = o.boost if o.boost in BOOSTS else float(o.boost)
                anchor = o.anchor if o.anchor in ANCHORS else float(o.anchor)
                method = {"total_steps": o.steps, "boost": boost, "boost_max": o.boost_max, "correction": o.correction}
                method |= {"anchor": anchor, "anchor_every": o.anchor_every}
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer = DBAAdamW(
                    self.work.model.named_parameters(),
                    lr=o.lr,
                    weight_decay=o.weight_decay,
                    global_gradient=gradient,
                    max_grad_norm=o.max_grad_norm,
                    state_format=o.state_format,
                    param_format=o.param_format,
                    **method,  # type: ignore[arg-type]
                )
        except ValueError as error:
            raise InputError(str(error)) from error
        for warning in caught:
            self.console.print(f"note     {warning.message}", soft_wrap=True)
        return optimizer

    def _resume(self) -> None:
        found, passed_over = self.checkpoints.load()
        for note in passed_over:
            self.console.print(f"note     {note}", soft_wrap=True)
        if found is None:
            self.console.print("nothing to resume from: starting at the first step")
            self.metrics_file.unlink(missing_ok=True)
            return
        try:
            self.work.model.load_state_dict(found["model"])
            self.optimizer.load_state_dict(found["optimizer"])
            self.scheduler.load_state_dict(found["scheduler"])
            torch.set_rng_state(found["random"])
            if found["random_cuda"]:
                torch.cuda.set_rng_state_all(found["random_cuda"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.checkpoints.folder}: expected the state of this run, got another ({error}); go on with the "
                "model and the version that it began with, or start anew with another --out"
            ) from error
        self.done = self.saved = found["step"]
        self._data_digest = found["data_digest"]
        kept = [line for line in self.metrics() if line["step"] <= self.done]
        write_whole(self.metrics_file, lambda path: path.write_text("".join(json.dumps(line) + "\n" for line in kept)))
        if len({line["step"] for line in kept} - {0}) < self.done:
            self.console.print(f"note     {self.metrics_file} lacks steps that were done", soft_wrap=True)
        self.console.print(f"going on after step {self.done:,} of {self.options.steps:,}")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines written so far; one that a killed process has left half is not there.

        Raises:
            InputError: another line is no such line.
        """
        if not self.metrics_file.exists():
            return []
        if not self.metrics_file.is_file():
            raise InputError(f"{self.metrics_file}: expected a regular file, got none; remove it")
        lines = []
        for number, text in enumerate(self.metrics_file.read_bytes().split(b"\n")[:-1], 1):
            try:
                lines.append(_checked(json.loads(text)))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise InputError(
                    f"{self.metrics_file}, line {number}: expected the metrics of a step, got {error!r}; restore the "
                    "file, or remove it"
                ) from error
        return lines

    # --- the steps ----------------------------------------------------------------------------------------------------

    def run(self, batches: Batches, evaluation: HeldOut | None) -> None:
        """The steps that are left.

        Raises:
            InputError: the data are not those of the checkpoint or cannot be read, or a checkpoint cannot be written.
            Diverged: the loss or a weight is not finite.
            Stopped: by a signal, between two steps; what is done is saved.
        """
        try:
            self._run(batches, evaluation)
        except BaseException:
            if not self.checkpoints.files():  # nothing to go on from
                self.metrics_file.unlink(missing_ok=True)
            raise

    def _run(self, batches: Batches, evaluation: HeldOut | None) -> None:
        o = self.options
        remaining = self._remaining(batches)
        with Interruption() as stop, open(self.metrics_file, "a") as file, progress(self.console) as bars:
            if evaluation and self.done == 0:
                self._write(file, {"step": 0, **self.measure(evaluation, bars)})
            first = self.done
            task = bars.add_task("fine-tuning", total=o.steps, tokens=o.batch * o.length, completed=self.done)
            while self.done < o.steps and not stop.asked:
                batch = self._next(remaining)
                line = self.step(batch)
                self._data_digest = extend_digest(self._data_digest, batch)
                last = self.done == o.steps
                if evaluation and (last or self.done % o.eval_every == 0):
                    line |= self.measure(evaluation, bars)
                self._write(file, line)
                if self.done == first + TIMED and not last:
                    left = line["seconds"] * (o.steps - self.done)
                    bars.console.print(f"time     about {duration(left)} for the other {o.steps - self.done:,} steps")
                if last or self.done % o.save_every == 0:
                    self.save()
                bars.advance(task)
        if stop.asked:
            if self.done > self.saved:
                self.save()
            kept = "go on with the same command and --resume" if self.saved else "nothing was kept"
            raise Stopped(f"stopped after step {self.done:,} of {o.steps:,}; {kept}")

    def save(self) -> None:
        """A checkpoint of where the run stands.

        Raises:
            Diverged: it is nowhere to go on from.
        """
        states = (value for state in self.optimizer.state.values() for value in state.values())
        tensors = [*self.work.model.parameters(), *(value for value in states if torch.is_tensor(value))]
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise self._diverged("a weight or its state", "not finite")
        self.checkpoints.save(self.done, self.work.model, self.optimizer, self.scheduler, self._data_digest)
        self.saved = self.done

    def _next(self, remaining: Iterator[Batch]) -> Batch:
        """The next batch; where it cannot be read, what was done is saved first."""
        try:
            batch = next(remaining)
        except BaseException:
            if self.done > self.saved:
                self.save()
            raise
        return batch

    def _diverged(self, what: str, got: object) -> Diverged:
        kept = f"its last good checkpoint, after step {self.saved:,}, stays in {self.checkpoints.folder}"
        return Diverged(
            f"step {self.done:,}: expected {what} to be finite, got {got}: the run has diverged, and no model was "
            f"written; {kept if self.saved else 'there is no checkpoint yet'}. Start anew with a smaller --lr, with "
            "--max-grad-norm 1 or a wider --dtype, and another --out"
        )

    def _remaining(self, batches: Batches) -> Iterator[Batch]:
        stream = iter(batches)
        digest = ""
        for batch in islice(stream, self.done):
            digest = extend_digest(digest, batch)
        if digest != self._data_digest:
            raise InputError("--data: expected the data that the run was started with, got others; restore them")
        return stream

    def step(self, batch: Batch) -> dict[str, Any]:
        """One optimizer step on a batch, in micro-batches; the line of metrics that says what it did."""
        started = time.perf_counter()
        self.work.model.train()
        targets, total = count_targets(batch), 0.0
        rows = self.options.micro_batch or self.options.batch
        for start in range(0, len(batch["labels"]), rows):
            loss, count = self.work.loss({key: tensor[start : start + rows] for key, tensor in batch.items()})
            if count:
                loss = loss * (count / targets)
                loss.backward()
                total += loss.item()
        self.done += 1
        if not math.isfinite(total):
            raise self._diverged("the loss", total)
        lr = self.scheduler.get_last_lr()[0]
        try:
            self.optimizer.step()
        except (OSError, ValueError) as error:  # of the global gradient's file, which is read now
            raise InputError(str(error)) from error
        self.scheduler.step()
        self.optimizer.zero_grad()
        line = {"step": self.done, "loss": total, "targets": targets, "lr": lr}
        return line | {"seconds": time.perf_counter() - started} | self.optimizer.metrics()

    def measure(self, evaluation: HeldOut, bars: Bars) -> dict[str, Any]:
        """The held-out losses now, which are also printed.

        Raises:
            Diverged: one is not finite.
        """
        found = evaluation.measure()
        for prefix in KINDS.values():
            if not math.isfinite(loss := found.get(f"{prefix}_loss", 0.0)):
                raise self._diverged("the held-out loss", loss)
        bars.console.print(f"step {self.done:,}: held-out loss {in_words(found)}", soft_wrap=True, highlight=False)
        return found

    def _write(self, file: Any, line: dict[str, Any]) -> None:
        file.write(json.dumps({k: _finite(v) for k, v in line.items()}) + "\n")
        file.flush()

    # --- the end ------------------------------------------------------------------------------------------------------

    def finish(self) -> Iterator[str]:
        """Write model, figure and ``run.json``, drop the checkpoints; lines that say what came of it."""
        out, lines = self.options.out, self.metrics()
        last = lines[-1] if lines else {}
        if last.get("skipped_steps") == self.done:
            raise self._diverged("the gradients", "none that were")
        self.work.model.config.use_cache = self.work.use_cache

        def save_model(folder: Path) -> None:
            self.work.model.save_pretrained(folder)
            self.work.tokenizer.save_pretrained(folder)

        write_folder(out, save_model)
        title = f"{short_name(self.work.source)}: {self.options.steps} steps at η₀ = {self.options.lr:g}"
        figure = self._draw(lines, title)
        evaluated = list(before_and_after(lines))
        outcome: dict[str, Any] = {"settings": self.settings, "steps": self.done, "last": last}
        for kind, _, before, after in evaluated:
            outcome |= {f"{KINDS[kind]}_loss_before": before, f"{KINDS[kind]}_loss_after": after}
        write_whole(out / "run.json", lambda path: path.write_text(json.dumps(outcome, indent=1)))
        self.checkpoints.remove()
        yield from (words for _, words, _, _ in evaluated)
        if skipped := last.get("skipped_steps"):
            yield f"{skipped:.0f} steps were skipped: their gradients were not finite"
        yield f"file: {out / 'model.safetensors'}"
        yield f"file: {self.metrics_file}"
        yield figure

    def _draw(self, lines: list[dict[str, Any]], title: str) -> str:
        """Draw the run; the line that says where, or why not."""
        path = self.options.out / "figure.png"
        if not any(line["step"] for line in lines):
            return f"no figure: {self.metrics_file} holds no step"
        try:
            require_matplotlib()
        except InputError as error:
            return f"no figure: {error.message}"
        write_whole(path, lambda file: save(run_figure(lines, title), file))
        return f"file: {path}"


def _finite(value: Any) -> Any:
    """What JSON can say: None for NaN and infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _checked(line: Any) -> dict[str, Any]:
    """A line of metrics: numbers, or None where one was not finite, or lists of numbers, under names.

    Raises:
        KeyError, TypeError: it is none.
    """
    if not isinstance(line, dict) or type(line["step"]) is not int:
        raise TypeError("a line is an object with the number of its step")
    for name, value in line.items():
        if not all(isinstance(number, (int, float)) for number in (value if isinstance(value, list) else [value or 0])):
            raise TypeError(f"{name!r} is {type(value).__name__}")
    return line
