"""``python -m bench.bits``: digests of the bits of many small runs, one line each: for changes that must change none.

    python -m bench.bits FOLDER > before.txt      # then change the code
    python -m bench.bits FOLDER > after.txt && diff before.txt after.txt

Files are kept in FOLDER; those that an earlier version of the code left there are read instead of written anew, so old
files and checkpoints are shown to load and to go on to the same bits. Without ``TRITON_INTERPRET=1`` the Triton backend
is left out.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import torch

from dba_kernels import DBAAdamW, GlobalGradient, GlobalGradientCollector, collect_global_gradient
from dba_kernels.backends import BACKENDS, why_not
from dba_kernels.formats import PARAM_FORMATS, STATE_FORMATS, STORAGE_FORMATS

SHAPES = {"wide": (66, 70), "deep": (16, 4, 64), "small": (5, 7), "bias": (130,), "scalar": ()}
LOW = (torch.bfloat16, torch.float16)
KINDS = [(torch.float32, "native"), *itertools.product(LOW, PARAM_FORMATS)]
GLOBAL_FORMATS = ("none", *STORAGE_FORMATS, "lowrank")
BF16: dict[str, Any] = {"param_format": "split8", "state_format": "int8"}
OPTIONS: dict[str, dict[str, Any]] = {
    **{f"{c} {s}": {"correction": c, "correction_scope": s}
       for c in ("cosine", "none", "agem", "pcgrad") for s in ("tensor", "global")},
    "unclipped": {"max_grad_norm": None},
    "maximize": {"maximize": True},
    "paper boost": {"boost": "paper"},
    "boost and bounds": {"boost": 0.1, "boost_max": 0.05, "correction_bounds": (0.9, 1.1)},
    "functions": {"boost": lambda t, n: 0.1 * (1 - t / n), "correction": lambda d, g, h: 1 - d / (g * h).sqrt()},
    "later": {"total_steps": "later"},
}  # fmt: skip


def digest(tensors: Iterable[tuple[str, Any]]) -> str:
    """Of names, dtypes, shapes and bits, in order of the names."""
    found = hashlib.sha256()
    for name, value in sorted(tensors, key=lambda item: item[0]):
        if torch.is_tensor(value):
            kept = value.detach().cpu().contiguous().reshape(-1)
            found.update(
                f"{name} {value.dtype} {tuple(value.shape)}".encode() + kept.view(torch.uint8).numpy().tobytes()
            )
        else:
            found.update(f"{name} {value!r}".encode())
    return found.hexdigest()[:16]


def parameters(dtype: torch.dtype) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    values = {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: torch.nn.Parameter(value.to(dtype)) for name, value in values.items()}


def global_gradient(dtype: torch.dtype, format: str) -> GlobalGradient | None:
    """Of the model of :func:`parameters`, whose fingerprint it therefore has not: it is made of tensors."""
    if format == "none":
        return None
    generator = torch.Generator().manual_seed(2)
    tensors = {name: 1e-2 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    low_rank = {"format": "int8", "rank": 8} if format == "lowrank" else {"format": format}
    return GlobalGradient.from_tensors(tensors, **low_rank)


def train(optimizer: DBAAdamW, params: dict[str, torch.nn.Parameter], steps: range) -> None:
    """Steps with bf16 or fp32 gradients; in step 2 the bias has none, in step 3 one gradient is not finite."""
    for t in steps:
        generator = torch.Generator().manual_seed(100 + t)
        for name, param in params.items():
            grad = 1e-2 * torch.randn(param.shape, generator=generator)
            if t == 3 and name == "small":
                grad[0, 0] = math.nan
            param.grad = None if t == 2 and name == "bias" else grad.to(param.dtype)
        optimizer.step()


def everything(optimizer: DBAAdamW, params: dict[str, torch.nn.Parameter]) -> str:
    """Weights, state, and what the groups and metrics say."""
    saved = optimizer.state_dict()
    state = {f"{i}.{key}": value for i, own in saved["state"].items() for key, value in own.items()}
    groups = {f"group {i} {key}": v for i, group in enumerate(saved["param_groups"]) for key, v in group.items()}
    return digest([*params.items(), *state.items(), *groups.items(), *optimizer.metrics().items()])


def make(dtype: torch.dtype, stored: str, backend: str, **options: Any) -> tuple[DBAAdamW, dict]:
    params = parameters(dtype)
    gg = global_gradient(dtype, stored)
    options = {"total_steps": 300, "max_grad_norm": 1.0} | options
    if gg is None:
        options["total_steps"] = None
    optimizer = DBAAdamW(params.items(), lr=1e-4, global_gradient=gg, backend=backend, **options)
    if options["total_steps"] == "later":
        optimizer.set_total_steps(300)
    return optimizer, params


def runs(backend: str) -> Iterator[tuple[str, str]]:
    """Every parameter × state × global format, every option on one of them, and loss scaling.

    Of Triton, whose interpreter is slow, a third in which every two formats still meet.
    """
    combinations = itertools.product(enumerate(KINDS), enumerate(STATE_FORMATS), enumerate(GLOBAL_FORMATS))
    for (i, (dtype, kind)), (j, state), (k, stored) in combinations:
        if backend == "triton" and (i + j + k) % 3:
            continue
        optimizer, params = make(dtype, stored, backend, param_format=kind, state_format=state)
        train(optimizer, params, range(2))
        yield f"{backend} {dtype} {kind} {state} {stored}", everything(optimizer, params)
    for name, options in OPTIONS.items():
        optimizer, params = make(torch.bfloat16, "int8", backend, **BF16 | options)
        train(optimizer, params, range(4))
        yield f"{backend} {name}", everything(optimizer, params)
    optimizer, params = make(torch.float16, "int4", backend, param_format="split16")
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    train(optimizer, params, range(2))
    optimizer.found_inf = torch.tensor(1.0)
    train(optimizer, params, range(2, 3))
    yield f"{backend} loss scale", everything(optimizer, params)


def resumed(folder: Path) -> Iterator[tuple[str, str]]:
    """Checkpoints: saved at step 2, or left by an earlier version; loaded by a new optimizer for two more steps."""
    for (dtype, kind), state in itertools.product(KINDS, STATE_FORMATS):
        name = f"checkpoint {dtype} {kind} {state}".replace("torch.", "")
        file = folder / f"{name}.pt"
        options = {"param_format": kind, "state_format": state}
        if not file.exists():
            optimizer, params = make(dtype, "int8", "reference", **options)
            train(optimizer, params, range(2))
            weights = {key: param.detach() for key, param in params.items()}
            torch.save({"weights": weights, "optimizer": optimizer.state_dict()}, file)
        saved = torch.load(file, weights_only=True)
        optimizer, params = make(dtype, "int8", "reference", **options)
        for key, param in params.items():
            param.data.copy_(saved["weights"][key])
        optimizer.load_state_dict(saved["optimizer"])
        train(optimizer, params, range(2, 4))
        yield name, everything(optimizer, params)


def loss(model: torch.nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
    return model(batch).square().mean(), len(batch)


def collections(folder: Path) -> Iterator[tuple[str, str]]:
    """Files of every format, a collection that goes on from a snapshot, and what files say when they are read."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(80, 96), torch.nn.Tanh(), torch.nn.Linear(96, 64))
    batches = list(torch.randn(7, 4, 80))
    for format, rank in [*((f, None) for f in STORAGE_FORMATS), ("int8", 8)]:
        name = f"file {format} {rank or ''}".strip()
        gg = collect_global_gradient(model, batches, loss, format, rank, data="numbers")
        fresh, kept = folder / "fresh.safetensors", folder / f"{name}.safetensors"
        gg.save(fresh)
        yield name, hashlib.sha256(fresh.read_bytes()).hexdigest()[:16]
        fresh.replace(kept) if not kept.exists() else fresh.unlink()
        loaded = GlobalGradient.load(kept)
        yield f"{name}, read", digest([*loaded.items(), ("digest", loaded.digest), ("snr", loaded.signal_to_noise)])
    file = folder / "snapshot.safetensors"
    if not file.exists():
        collector = GlobalGradientCollector(model, snapshot_path=file, snapshot_every=4)
        with collector:
            for batch in collector.remaining(batches[:4]):
                collector.backward(*loss(model, batch))
    before = file.read_bytes()
    yield "snapshot", hashlib.sha256(before).hexdigest()[:16]
    gg = collect_global_gradient(model, batches, loss, "fp32", snapshot_path=file, snapshot_every=4)
    yield "snapshot, gone on from", digest(gg.items())


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def main(folder: Path) -> None:
    """Print the digests; files are kept in FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    lists = [runs(name) for name in BACKENDS if why_not(name) is None]
    for name, found in itertools.chain(*lists, resumed(folder), collections(folder)):
        click.echo(f"{found}  {name}")


if __name__ == "__main__":
    main()
