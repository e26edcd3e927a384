"""Calls every public function with one wrong argument and prints, as JSON lines, what did not end in a clear error.

Run as a program, so that a crash ends nobody else: ``python -m tests.support.wrong_arguments EXAMPLES LOG``. The log's
last line is the call that was being made.
"""

from __future__ import annotations

import faulthandler
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import dba_kernels
from dba_kernels import DBAAdamW, GlobalGradient, GlobalGradientCollector, ops
from dba_kernels.formats import EncodedTensor
from dba_kernels.stepdata import Coefficient, Hyper, ParamTensors, StepScalars, StepSettings, Summary, TensorBatch

ROWS, COLS = 64, 70


@dataclass(frozen=True)
class Call:
    """A function with arguments that are right, made anew for each call.

    Args:
        names: by argument, another word that an error may use for it; torch's own errors do.
    """

    function: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]
    names: dict[str, str] | None = None


def model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(COLS, ROWS)


def stored() -> GlobalGradient:
    return GlobalGradient.from_tensors({"weight": torch.randn(ROWS, COLS), "bias": torch.randn(ROWS)})


def batch() -> TensorBatch:
    moments = {"exp_avg": torch.zeros(ROWS, COLS), "exp_avg_sq": torch.zeros(ROWS, COLS)}
    encoded = ops.encode(torch.randn(ROWS, COLS), "int8")
    return TensorBatch(
        "native", "fp32", "int8", [ParamTensors(0, torch.randn(ROWS, COLS), **moments, global_grad=encoded)]
    )


def scalars() -> StepScalars:
    def table(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.float64)

    whole = {"group": torch.zeros(1, dtype=torch.int64), "active": torch.zeros(1, dtype=torch.int64)}
    return StepScalars(
        **{"sums": table(1, 2), "global_sq": table(1), "hyper": table(1, Hyper.COUNT) / 2, **whole},
        **{"steps": torch.zeros(1), "bias_corrections": table(1, 2), "counters": torch.zeros(2, dtype=torch.int64)},
        **{"coefficients": table(1, Coefficient.COUNT), "report": table(1, 2), "summary": table(Summary.COUNT)},
    )


def train(**options: Any) -> None:
    """The constructor, two steps, and what one does with it."""
    optimizer = DBAAdamW(**options)
    for _ in range(2):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        optimizer.step()
    optimizer.metrics()
    optimizer.load_state_dict(optimizer.state_dict())


def collect(**options: Any) -> None:
    dba_kernels.collect_global_gradient(**options)


def with_collector(**options: Any) -> None:
    collector = GlobalGradientCollector(**options)
    with collector:
        for x in collector.remaining([torch.ones(3, COLS)]):
            collector.backward(collector.model(x).square().mean(), 3)
    collector.finish()


def backward(loss: Any, tokens: Any) -> None:
    collector = GlobalGradientCollector(model())
    with collector:
        collector.backward(collector.model(torch.ones(2, COLS)).sum() if loss is model else loss, tokens)


def finish(format: Any, rank: Any, save_to: Any) -> None:
    collector = GlobalGradientCollector(model())
    with collector:
        collector.backward(collector.model(torch.ones(2, COLS)).square().mean(), 2)
    collector.finish(format, rank, save_to=save_to)


def use(backend: Any) -> None:
    with dba_kernels.use_backend(backend):
        pass


def weights_out(model: Any, optimizer: Any) -> None:
    dba_kernels.fp32_state_dict(model, optimizer)


def loaded(state_dict: Any) -> None:
    own = model()
    DBAAdamW(own.parameters()).load_state_dict(state_dict)


def weights_in(state_dict: Any) -> None:
    own = model()
    dba_kernels.load_fp32_state_dict(own, DBAAdamW(own.parameters()), state_dict)


def part_of_batch(**parts: Any) -> None:
    """The step of a batch some of whose parts are others."""
    its = batch()
    its.tensors[0] = replace(its.tensors[0], **{name: parts[name] for name in parts if hasattr(its.tensors[0], name)})
    its = replace(its, **{name: parts[name] for name in parts if name.endswith("_format")})
    ops.similarity(its, [torch.ones(ROWS, COLS)], torch.zeros(1, 2, dtype=torch.float64))
    ops.step(its, [torch.ones(ROWS, COLS)], torch.ones(1, Coefficient.COUNT, dtype=torch.float64))


def encoded(**parts: Any) -> None:
    ops.decode(EncodedTensor(**parts))


def columns(**parts: Any) -> None:
    ops.coefficients(StepScalars(**parts), StepSettings())


def optimizer_of(its: nn.Module) -> DBAAdamW:
    return DBAAdamW(its.parameters())


def calls(folder: Path) -> dict[str, Call]:
    file = folder / "gg.safetensors"
    stored().save(file)
    own = model()
    gg = {"global_gradient": stored(), "total_steps": 1000}
    hyper = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    method = {"boost": "auto", "boost_max": 0.5, "correction": "cosine", "correction_scope": "tensor"}
    method |= {"correction_bounds": (0.0, 2.0), "max_grad_norm": 1.0, "anchor": "auto", "shrink": None}
    formats = {"state_format": "fp32", "param_format": "auto", "missing": "error", "backend": "auto"}
    loss = {"loss_fn": lambda m, x: m.weight.square().mean()}  # what a model makes of its batch is its own affair
    parts = ops.encode(torch.randn(ROWS, COLS), "int8")
    one = torch.zeros(1, dtype=torch.float64)
    return {
        "DBAAdamW": Call(
            train,
            lambda: {"params": model().named_parameters(), **gg, **hyper, **method, **formats},
            {"params": "param"},
        ),
        "load_state_dict": Call(loaded, lambda: {"state_dict": optimizer_of(own).state_dict()}, {"state_dict": "stat"}),
        "annealing_schedule": Call(
            dba_kernels.annealing_schedule,
            lambda: {"optimizer": optimizer_of(own), "total_steps": 10, "warmup_steps": 1, "shape": "linear"},
        ),
        "collect_global_gradient": Call(
            collect,
            lambda: {
                **{"model": model(), "batches": [torch.ones(3, COLS)], **loss, "format": "int8", "rank": None},
                **{"weighting": "tokens", "data": (), "autocast_dtype": None, "snapshot_path": None},
                **{"snapshot_every": 5, "save_to": None, "curvature": None},
            },
        ),
        "GlobalGradientCollector": Call(
            with_collector,
            lambda: {"model": model(), "weighting": "tokens", "data": (), "snapshot_path": None, "snapshot_every": 5},
        ),
        "backward": Call(backward, lambda: {"loss": model, "tokens": 2}),
        "finish": Call(finish, lambda: {"format": "int8", "rank": None, "save_to": None}),
        "from_tensors": Call(
            GlobalGradient.from_tensors,
            lambda: {"tensors": {"w": torch.ones(ROWS, COLS)}, "format": "int8", "rank": 4},
            {"tensors": "tensor"},
        ),
        "load": Call(GlobalGradient.load, lambda: {"path": file}),
        "save": Call(stored().save, lambda: {"path": folder / "a.safetensors", "max_shard_bytes": None}),
        "use_backend": Call(use, lambda: {"backend": "auto"}),
        "fp32_state_dict": Call(weights_out, lambda: {"model": own, "optimizer": optimizer_of(own)}),
        "load_fp32_state_dict": Call(weights_in, lambda: {"state_dict": own.state_dict()}),
        "ops.accumulate": Call(
            ops.accumulate,
            lambda: {
                **{"totals": [torch.zeros(5, 7)], "grads": [torch.ones(5, 7)], "weight": 1.0},
                **{"squared_norms": one.clone(), "backend": "auto"},
            },
            {"totals": "grads"},
        ),
        "ops.encode": Call(ops.encode, lambda: {"tensor": torch.ones(ROWS, COLS), "format": "int4", "backend": "auto"}),
        "ops.encode_all": Call(ops.encode_all, lambda: {"tensors": [torch.ones(ROWS, COLS)], "format": "int8"}),
        "ops.decode": Call(ops.decode, lambda: {"stored": parts, "backend": "auto"}),
        "ops.decode_all": Call(ops.decode_all, lambda: {"encoded": [parts], "backend": "auto"}),
        "EncodedTensor": Call(encoded, lambda: {f.name: getattr(parts, f.name) for f in fields(parts)}),
        "ops.factorize": Call(
            ops.factorize,
            lambda: {"tensor": torch.ones(ROWS, COLS), "rank": 3, "format": "fp32"},
            {"tensor": "rank"},
        ),
        "ops.similarity": Call(
            ops.similarity,
            lambda: {"batch": batch(), "grads": [torch.ones(ROWS, COLS)], "sums": torch.zeros(1, 2).double()},
        ),
        "ops.step": Call(
            ops.step,
            lambda: {
                **{"batch": batch(), "grads": [torch.ones(ROWS, COLS)]},
                "coefficients": torch.ones(1, Coefficient.COUNT).double(),
            },
        ),
        "ops.coefficients": Call(ops.coefficients, lambda: {"scalars": scalars(), "settings": StepSettings()}),
        "StepScalars": Call(
            columns,
            lambda: {f.name: getattr(scalars(), f.name) for f in fields(StepScalars)},
            {"coefficients": "scalars"},  # the others are compared with it
        ),
        "ParamTensors": Call(
            part_of_batch,
            lambda: (
                {f.name: getattr(batch().tensors[0], f.name) for f in fields(ParamTensors)}
                | {"param_format": "native", "state_format": "fp32", "global_format": "int8"}
            ),
            {"param": "batch.tensors"},
        ),
    }


# --- wrong values -----------------------------------------------------------------------------------------------------


def _tensor(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> torch.Tensor:
    if kind == "meta":
        return torch.zeros(shape, dtype=dtype, device="meta")
    made = torch.zeros(shape, dtype=dtype)
    if kind == "strided" and len(shape) == 2:
        return torch.zeros(shape[::-1], dtype=dtype).T
    if kind == "sparse" and len(shape) == 2:
        return made.to_sparse()
    if kind == "wrapper" and dtype.is_floating_point:
        return TwoTensor(made, made.clone())
    return made


SHAPES = [(), (0,), (1,), (ROWS,), (ROWS, COLS), (COLS, ROWS), (1, 2), (1, Coefficient.COUNT), (ROWS, 2), (2, 3, 4)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool]
DTYPES += [torch.complex64, torch.uint8]
TENSORS = st.builds(
    _tensor,
    st.sampled_from(SHAPES),
    st.sampled_from(DTYPES),
    st.sampled_from(["plain", "meta", "strided", "sparse", "wrapper"]),
)
OTHERS = st.sampled_from(
    [
        *(None, True, -1, 0, 10**30, 2.5, -0.5, float("nan"), float("inf"), "", "x", b"x", [], {}, (), object(), len),
        *([1], ["x"], {"x": 1}, (1, 2, 3), ("a", "b"), (0.9,), {1: torch.ones(2)}, nn.Linear, torch.float32),
        *(Path("nowhere"), {"state": 3, "param_groups": []}, {"state": {}, "param_groups": [3]}),
    ]
)
VALUES = st.one_of(OTHERS, TENSORS, TENSORS.map(lambda t: [t]), TENSORS.map(lambda t: {"w": t}))


def described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{type(value).__name__} {value.dtype} {tuple(value.shape)} {value.layout} on {value.device}"
    if isinstance(value, (list, dict)) and value:
        inner = value[0] if isinstance(value, list) else next(iter(value.values()))
        return f"{type(value).__name__} of {described(inner)}"
    return repr(value)[:80]


def finding(name: str, call: Call, argument: str, value: Any) -> dict[str, str] | None:
    """None where the call went well or the error names the argument."""
    if callable(value) and argument in ("boost", "correction", "loss_fn"):
        return None  # functions may fail as they like
    arguments = call.arguments()
    arguments[argument] = value
    try:
        call.function(**arguments)
    except (ValueError, TypeError, OSError) as error:
        if isinstance(error, OSError) and not isinstance(value, (str, Path, bytes)):
            return {"call": f"{name}({argument}={described(value)})", "error": f"{type(error).__name__}: {error}"}
        words = [argument, (call.names or {}).get(argument, argument)]
        if isinstance(error, OSError) or any(re.search(rf"(?<![a-z]){word}", str(error)) for word in words):
            return None
        return {"call": f"{name}({argument}={described(value)})", "error": f"{type(error).__name__}: {error}"}
    except Exception as error:
        return {"call": f"{name}({argument}={described(value)})", "error": f"{type(error).__name__}: {error}"}
    return None


def main(examples: int, log: Path) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    seen: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        table = calls(Path(folder))
        for call in table.values():  # what is right works
            call.function(**call.arguments())
        chosen = st.sampled_from([(name, argument) for name, call in table.items() for argument in call.arguments()])

        @settings(
            max_examples=examples,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(chosen, VALUES)
        def attempt(which: tuple[str, str], value: Any) -> None:
            name, argument = which
            log.write_text(f"{name}({argument}={described(value)})\n")
            found = finding(name, table[name], argument, value)
            if found is not None and found["call"] not in seen:
                seen.add(found["call"])
                print(json.dumps(found), flush=True)

        attempt()
    print(json.dumps({"done": examples}))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
