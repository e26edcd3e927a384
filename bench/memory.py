"""Bytes that a fine-tuning run holds between steps, and the peak during one: ``python -m bench.memory``.

Each row is a fresh process: the demo's model (SmolLM2-135M) in bf16 with bf16 gradients, two steps of one optimizer.
Held bytes are counted from what is alive, not from what should be: every storage that any Python-visible tensor refers
to, overlaps once, so that forgotten buffers count. The peak is the process's resident high-water mark during the second
``step()``, above what was resident before it. Prints a Markdown table.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch._subclasses.fake_tensor import FakeTensor

from bench.bench_anchor import random_curvature
from dba_kernels import DBAAdamW, GlobalGradient

LIMITS = {"split8 int8 int4": 8.2, "split16 int8 int4": 9.2, "split16 int8 anchor": 8.2 + 2.6}
"""Bytes per parameter, gradients included; an anchor costs at most 2.6."""

RANK = 64
"""Of the anchor's factors."""

ROW_SECONDS = 600
"""A peer that takes longer is given up: one compiles a kernel per shape, another quantises element by element."""

Params = list[tuple[str, torch.nn.Parameter]]
Step = Callable[[], object]


@dataclass
class Held:
    """Bytes per parameter between steps, and MiB of the peak during one (None: not measured here)."""

    weights: float
    gradients: float
    optimizer: float
    global_gradient: float
    other: float
    peak: float | None = None

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.global_gradient + self.other


# --- counting ---------------------------------------------------------------------------------------------------------


def span(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Addresses of the tensor's storage; None for one without memory of its own (meta, fake, wrapper subclasses)."""
    if tensor.is_meta or isinstance(tensor, FakeTensor) or hasattr(tensor, "__tensor_flatten__"):
        return None
    storage = tensor.untyped_storage()
    start = storage.data_ptr()
    return (start, start + storage.nbytes()) if start else None


def flatten(value: Any) -> Iterator[torch.Tensor]:
    """The plain tensors in a value: quantised states of other libraries are subclasses that wrap several."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from flatten(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from flatten(inner)
    elif isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                yield from flatten(getattr(value, name))
        else:
            yield value


def covered(tensors: Iterable[torch.Tensor], taken: list[tuple[int, int]]) -> int:
    """Bytes of the tensors' storages, overlaps once, without those of ``taken``, to which they are added."""
    before = _union(taken)
    taken += [place for tensor in tensors if (place := span(tensor)) is not None]
    return _union(taken) - before


def _union(spans: list[tuple[int, int]]) -> int:
    total, end = 0, 0
    for start, stop in sorted(spans):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def alive() -> list[torch.Tensor]:
    """Every tensor that Python can see."""
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]


def count(params: Params, optimizer: Any, gradient: GlobalGradient | None, before: list[tuple[int, int]]) -> Held:
    """What is held now, per parameter.

    Args:
        optimizer: with ``state``, and ``masters`` where it keeps fp32 copies.
        before: spans of what was alive before the model was made.
    """
    numel, taken = sum(p.numel() for _, p in params), list(before)
    stored = [] if gradient is None else [*(_parts(gradient, name) for name in gradient), *_curvature_parts(gradient)]
    masters = getattr(optimizer, "masters", [])
    state = [dict(entry) for entry in optimizer.state.values()]
    groups = (
        [p.data for _, p in params],
        [p.grad for _, p in params if p.grad is not None],
        flatten([masters, state]),
        flatten(stored),
        alive(),
    )
    return Held(*(covered(tensors, taken) / numel for tensors in groups))


def _parts(gradient: GlobalGradient, name: str) -> list[torch.Tensor]:
    stored = gradient.stored(name)
    factors = [stored.u, stored.v] if hasattr(stored, "sigma") else [stored]
    dense = [part for factor in factors for part in (factor.codes, factor.scales) if part is not None]
    return [*dense, *([stored.sigma] if hasattr(stored, "sigma") else [])]


def _curvature_parts(gradient: GlobalGradient) -> Iterator[torch.Tensor]:
    """The tensors of the curvature's factors."""
    for name in gradient.curvature_records:
        found = gradient.curvature(name)
        yield from flatten(found.diagonal)
        for factor in (side for term in found.terms for side in (term.left, term.right)):
            dense = getattr(factor, "u", None)
            yield from flatten([getattr(factor, "diagonal", None), getattr(factor, "sigma", None)])
            yield from flatten([] if dense is None else [dense.codes, dense.scales])


def resident(field: str) -> float | None:
    """MiB of ``VmRSS`` or ``VmHWM``; None where there is no /proc."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(field))


def peak_of(work: Step) -> float | None:
    """MiB that ``work`` needed at most, above what was resident before it; None where Linux does not say."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    except OSError:
        return None
    before = resident("VmRSS")
    work()
    peak = resident("VmHWM")
    return None if before is None or peak is None else peak - before


# --- optimizers -------------------------------------------------------------------------------------------------------


class MixedPrecision:
    """torch's fused AdamW as it is used with bf16 weights: fp32 masters and states, gradients widened for the step."""

    def __init__(self, params: Params, lr: float) -> None:
        self.params = [p for _, p in params]
        self.masters = [p.detach().float() for p in self.params]
        self.inner = torch.optim.AdamW(self.masters, lr=lr, fused=True)
        self.state = self.inner.state

    @torch.no_grad()
    def step(self) -> None:
        for master, param in zip(self.masters, self.params, strict=True):
            master.grad = param.grad.float()
        self.inner.step()
        self.inner.zero_grad()
        for master, param in zip(self.masters, self.params, strict=True):
            param.copy_(master)


def _torchao(params: Params, lr: float) -> Any:
    from torchao.optim import AdamW8bit

    return AdamW8bit([p for _, p in params], lr=lr, bf16_stochastic_round=True)


def _bitsandbytes(params: Params, lr: float) -> Any:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit([p for _, p in params], lr=lr)


OURS = {
    "split8 int8 int4": dict(param_format="split8", state_format="int8"),
    "split16 int8 int4": dict(param_format="split16", state_format="int8"),
    "defaults int8": {},
    "split16 int8 anchor": dict(param_format="split16", state_format="int8"),
    "split16 int8 none": dict(param_format="split16", state_format="int8"),
    "split8 int8 none": dict(param_format="split8", state_format="int8"),
    "native int8 none": dict(param_format="native", state_format="int8"),
}
"""Name: parameter, state and global-gradient format ("anchor": curvature alone); and the arguments of DBAAdamW."""

PEERS: dict[str, Callable[[Params, float], Any]] = {
    "torch mixed": MixedPrecision,
    "torchao": _torchao,
    "bitsandbytes": _bitsandbytes,
}
TITLES = {
    "split8 int8 int4": "DBA: split8, int8 state, int4 ĝ_G",
    "split16 int8 int4": "DBA: split16, int8 state, int4 ĝ_G",
    "defaults int8": "DBA: defaults (split16, fp32 state), int8 ĝ_G",
    "split16 int8 anchor": "second-order memory of rank 64, int8: split16, int8 state",
    "split16 int8 none": "plain AdamW of this library: split16, int8 state",
    "split8 int8 none": "plain AdamW of this library: split8, int8 state",
    "native int8 none": "plain AdamW of this library: native, int8 state",
    "torch mixed": "torch AdamW, mixed precision (fp32 master and state)",
    "torchao": "torchao AdamW8bit (bf16 weights, stochastic rounding)",
    "bitsandbytes": "bitsandbytes AdamW8bit (bf16 weights, rounded to nearest)",
}


def make(row: str, params: Params, folder: Path) -> tuple[Any, GlobalGradient | None]:
    """The row's optimizer, and its global gradient, mapped from a file as in any run."""
    if row in PEERS:
        return PEERS[row](params, 1e-5), None
    gradient, format = None, row.split()[-1]
    if format == "anchor":
        gradient = GlobalGradient.load(random_curvature(params, RANK).save(folder / "memory.safetensors"))
        anchored = dict(global_gradient=gradient, anchor=30.0, anchor_every=1)
        return DBAAdamW(params, lr=1e-5, **OURS[row], **anchored), gradient
    if format != "none":
        means = ((name, torch.randn(p.shape) * 1e-3) for name, p in params)
        gradient = GlobalGradient.load(GlobalGradient.from_tensors(means, format).save(folder / "g.safetensors"))
    method = {} if gradient is None else {"global_gradient": gradient, "total_steps": 1000}
    return DBAAdamW(params, lr=1e-5, **OURS[row], **method), gradient


def measure(row: str, model: torch.nn.Module, loss: Step, before: list[tuple[int, int]]) -> Held:
    """Two steps of the row's optimizer on ``model``; gradients stay, as between backward and ``zero_grad()``."""
    params = list(model.named_parameters())
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer, gradient = make(row, params, Path(folder))
        loss().backward()  # type: ignore[attr-defined]
        optimizer.step()
        peak = peak_of(optimizer.step)
        held = count(params, optimizer, gradient, before)
    held.peak = peak
    return held


def measure_demo(row: str) -> Held:
    """One row of the table, in this process."""
    from dba_kernels.cli.models import load_model

    before = [place for tensor in alive() if (place := span(tensor)) is not None]
    model, _, _ = load_model(dtype=torch.bfloat16)
    ids = torch.arange(64)[None]

    def loss() -> torch.Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    return measure(row, model, loss, before)


# --- the table --------------------------------------------------------------------------------------------------------


def in_process_of_its_own(row: str) -> Held | str:
    """The row's figures, or the last line of what went wrong."""
    command = [sys.executable, "-m", "bench.memory", "--row", row]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ROW_SECONDS)
    except subprocess.TimeoutExpired:
        return f"two steps took more than {ROW_SECONDS / 60:.0f} minutes"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    return Held(**json.loads(done.stdout.splitlines()[-1]))


@click.command()
@click.option("--row", type=click.Choice(list(TITLES)), help="Measure one row here and print JSON.")
def main(row: str | None) -> None:
    """Print the table; exit status 1 where a limit does not hold."""
    if row is not None:
        print(json.dumps(asdict(measure_demo(row))))
        return
    head = ("", "bytes/parameter", "weights", "gradients", "optimizer", "ĝ_G", "other", "peak of step(), MiB more")
    print("|", " | ".join(head), "|")
    print("|---" * len(head) + "|")
    holds = True
    for name, title in TITLES.items():
        held = in_process_of_its_own(name)
        if isinstance(held, str):
            print(f"| {title} | does not run here: {held} |" + " |" * (len(head) - 2), flush=True)
            holds &= name not in LIMITS
            continue
        parts = (held.weights, held.gradients, held.optimizer, held.global_gradient, held.other)
        peak = "–" if held.peak is None else f"{held.peak:.0f}"
        print(f"| {title} | {held.total:.2f} |", " | ".join(f"{part:.2f}" for part in parts), f"| {peak} |", flush=True)
        holds &= held.total <= LIMITS.get(name, float("inf"))
    print("\nlimits", "hold:" if holds else "DO NOT HOLD:", LIMITS)
    raise SystemExit(0 if holds else 1)


if __name__ == "__main__":
    main()
