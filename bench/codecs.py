"""Which codecs should hold Adam's moments and ĝ_G?  ``python -m bench.codecs``

What counts is not how well a codec returns a tensor but what it does to the parameter: a second moment that rounds to
0 makes the update explode, one that cannot fall makes it fade. So real gradients of SmolLM2-135M are recorded once,
AdamW is replayed on them with fp64 moments (the truth) and with each codec, and the updates are compared.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench import gradients
from bench.gradients import BETA1, BETA2, EPS, LR, ROWS, STEPS, progress, recording
from dba_kernels.cli.models import cache_dir
from dba_kernels.reference import quantize

# --- codecs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Codec:
    """Stores ``x`` and gives back what it has kept of it; grouped along the last dimension, absmax scale per group.

    Args:
        kind: "power" (``scale · |c|^power``), "softsign", "log" (of exp_avg_sq), "fp8", "bf16", "fp16".
        levels: largest code; codes are signed where ``floor`` is 0.
        floor: smallest code of a value above 0.
        rounding: "nearest" in the codes' own scale, "stochastic" (unbiased in the value), or "clip": nearest, with the
            scale that minimises the squared error of the group in place of absmax.
    """

    kind: str
    levels: int = 127
    power: float = 1.0
    group: int = 64
    scale: torch.dtype = torch.float32
    rounding: str = "nearest"
    floor: int = 0

    @property
    def label(self) -> str:
        shapes = {1.0: "linear", 2.0: "quadratic", 3.0: "cubic", 4.0: "quartic"}
        kind = shapes.get(self.power, f"power {self.power}") if self.kind == "power" else self.kind
        return f"{kind}, no floor" if self.levels == 255 and not self.floor else kind

    @property
    def bytes(self) -> float:
        bits = {7: 4, 127: 8, 255: 8}[self.levels] if self.grouped else 16
        return bits / 8 + (self.scale.itemsize / self.group if self.grouped else 0)

    @property
    def grouped(self) -> bool:
        return self.kind not in ("bf16", "fp16")

    def __call__(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if self.kind == "fp16":
            return x.half().float()
        if self.kind == "bf16":
            return _bfloat16(x, self.rounding, generator)
        cols = x.shape[-1]
        groups = F.pad(x, (0, -cols % self.group)).unflatten(-1, (-1, self.group))
        absmax = groups.abs().amax(-1, keepdim=True)
        best = self._pass(groups, absmax, generator)
        if self.rounding == "clip":
            for ratio in (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55):
                trial = self._pass(groups, absmax * ratio, generator)
                better = (trial - groups).square().sum(-1, keepdim=True) < (best - groups).square().sum(
                    -1, keepdim=True
                )
                best = torch.where(better, trial, best)
        return best.flatten(-2)[..., :cols]

    def _pass(self, groups: torch.Tensor, absmax: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        scale = absmax.to(self.scale).float().clamp_min(torch.finfo(torch.float32).tiny)
        unit = (groups.abs() / scale).clamp(max=1.0)  # a narrow scale may have rounded below absmax
        if self.kind == "fp8":
            return scale * (groups / scale).clamp(-1, 1).mul(448).to(torch.float8_e4m3fn).float() / 448
        code = self._compand(unit) * self.levels
        if self.rounding == "stochastic":
            low = code.floor().clamp(max=self.levels - 1)
            low_value, high_value = self._expand(low / self.levels), self._expand((low + 1) / self.levels)
            share = (unit - low_value) / (high_value - low_value)
            code = low + (torch.rand(share.shape, generator=generator) < share)
        else:
            code = code.round()
        code = torch.where(unit > 0, code.clamp_min(self.floor), 0.0)
        return scale * self._expand(code / self.levels) * groups.sign()

    def _compand(self, unit: torch.Tensor) -> torch.Tensor:
        if self.kind == "softsign":
            return 2 * unit / (1 + unit)
        if self.kind == "log":
            return (1 + unit.clamp_min(2.0**-LOG_OCTAVES).log2() / LOG_OCTAVES).clamp_min(1 / 255)
        return unit ** (1 / self.power)

    def _expand(self, unit_code: torch.Tensor) -> torch.Tensor:
        if self.kind == "softsign":
            return unit_code / (2 - unit_code)
        if self.kind == "log":
            return torch.exp2((unit_code - 1) * LOG_OCTAVES) * (unit_code > 0)
        return unit_code**self.power


LOG_OCTAVES = 28  # range of the logarithmic codec: 2^-28 of the group's largest v, 1.7e-4 of its largest √v


def _bfloat16(x: torch.Tensor, rounding: str, generator: torch.Generator) -> torch.Tensor:
    if rounding == "nearest":
        return x.bfloat16().float()
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, dtype=torch.int32)
    return ((x.contiguous().view(torch.int32) + noise) & -65536).view(torch.float32)


M8, V8 = Codec("power", 127, 2.0), Codec("power", 255, 4.0, floor=1)  # the starting point: both are then varied
EXP_AVG = [replace(M8, power=p) for p in (1.0, 2.0, 3.0)] + [
    Codec("softsign"),
    *(replace(M8, group=g) for g in (32, 128, 256)),
    *(replace(M8, scale=d) for d in (torch.bfloat16, torch.float16)),
    replace(M8, rounding="stochastic"),
    Codec("bf16"),
    Codec("bf16", rounding="stochastic"),
]
EXP_AVG_SQ = [replace(V8, power=p) for p in (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)] + [
    replace(V8, power=2.0, floor=0),
    replace(V8, floor=0),
    Codec("log", 255, floor=1),
    *(replace(V8, group=g) for g in (32, 128, 256)),
    *(replace(V8, scale=d) for d in (torch.bfloat16, torch.float16)),
    replace(V8, power=2.0, rounding="stochastic"),
    replace(V8, rounding="stochastic"),
    Codec("log", 255, floor=1, rounding="stochastic"),
    Codec("bf16"),
    Codec("bf16", rounding="stochastic"),
]
INT8, INT4 = Codec("power", 127, 2.0), Codec("power", 7, 2.0)
GLOBAL = [
    Codec("bf16"),
    Codec("fp16"),
    *(Codec("fp8", group=g) for g in (32, 64, 128, 256)),
    *(replace(INT8, power=p) for p in (1.0, 1.5, 2.0, 2.5, 3.0)),
    *(replace(INT8, group=g) for g in (32, 128, 256)),
    replace(INT8, scale=torch.bfloat16),
    *(replace(INT8, rounding=r) for r in ("stochastic", "clip")),
    *(replace(INT4, power=p) for p in (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)),
    *(replace(INT4, group=g) for g in (16, 32, 128, 256)),
    replace(INT4, scale=torch.bfloat16),
    *(replace(INT4, rounding=r) for r in ("stochastic", "clip")),
]
ROUNDINGS = (("nearest", "nearest"), ("nearest", "stochastic"), ("stochastic", "stochastic"))

# --- replay -----------------------------------------------------------------------------------------------------------

Codecs = tuple[Codec | None, Codec | None, Codec | None]  # of exp_avg, exp_avg_sq, ĝ_G; None keeps fp64


@dataclass(frozen=True)
class Run:
    """Which of the recorded gradients are replayed, in which order, on every ``stride``-th of the kept rows."""

    title: str
    order: tuple[int, ...]
    stride: int
    boosted: bool = False
    shrink: float = 1.0  # factor by which the gradients have shrunk at the end

    def grads(self, record: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        return record[f"grad/{name}"][:, :: self.stride]


def _shuffled(steps: int) -> tuple[int, ...]:
    return tuple(torch.randint(0, STEPS, (steps,), generator=torch.Generator().manual_seed(0)).tolist())


RECORDED = Run(f"{STEPS} steps as recorded", tuple(range(STEPS)), 1)
LONG = Run("1,000 steps, recorded gradients in random order", _shuffled(1000), 16)
SHRINKING = Run("1,000 steps, gradients shrinking to a tenth", _shuffled(1000), 16, shrink=0.1)
BOOSTED = Run(f"{STEPS} steps, boosted", tuple(range(STEPS)), 1, boosted=True)


def replay(
    run: Run, grads: torch.Tensor, global_grad: torch.Tensor, codecs: Codecs, dtype: torch.dtype
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The last eight updates m̂/(√v̂+ε) of AdamW and the displacement Σ η_t·update, in fp64 when nothing is coded."""
    exp_avg_codec, exp_avg_sq_codec, global_codec = codecs
    generator = torch.Generator().manual_seed(0)
    if global_codec:
        global_grad = global_codec(global_grad, generator)
    global_grad = global_grad.to(dtype)
    m, v, moved = (torch.zeros(grads.shape[1:], dtype=dtype) for _ in range(3))
    late, total = [], len(run.order)
    for step, index in enumerate(run.order):
        grad = grads[index].to(dtype) * run.shrink ** (step / total)
        if run.boosted:
            gamma = min(0.5, 200 / total * (1 - step / total))
            grad = gamma * global_grad + (1 - gamma) * grad
        m.lerp_(grad, 1 - BETA1)
        v.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
        update = m / (1 - BETA1 ** (step + 1)) / ((v / (1 - BETA2 ** (step + 1))).sqrt() + EPS)
        moved.add_(update, alpha=LR * (1 - step / total))
        if step >= total - 8:
            late.append(update)
        if exp_avg_codec:
            m = exp_avg_codec(m, generator)
        if exp_avg_sq_codec:
            v = exp_avg_sq_codec(v, generator)
    return late, moved


@dataclass(frozen=True)
class Score:
    """Relative errors of the late updates and the displacement; cosine and relative length of the displacement."""

    update: float
    displacement: float
    cosine: float
    length: float
    stored: float = 0.0
    stored_cosine: float = 1.0


def score(late: list[torch.Tensor], moved: torch.Tensor, true_late: list[torch.Tensor], true: torch.Tensor) -> Score:
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(late, true_late, strict=True)]
    cosine = (torch.dot(moved.flatten().double(), true.flatten()) / (moved.double().norm() * true.norm())).item()
    return Score(
        update=math.sqrt(sum(e * e for e in errors) / len(errors)),
        displacement=((moved - true).norm() / true.norm()).item(),
        cosine=cosine,
        length=(moved.double().norm() / true.norm()).item(),
    )


# --- tables -----------------------------------------------------------------------------------------------------------

SECTIONS: tuple[tuple[str, Run, list[Codecs]], ...] = (
    ("exp_avg", RECORDED, [(codec, None, None) for codec in EXP_AVG]),
    ("exp_avg_sq", RECORDED, [(None, codec, None) for codec in EXP_AVG_SQ]),
    ("exp_avg", LONG, [(codec, None, None) for codec in EXP_AVG]),
    ("exp_avg_sq", LONG, [(None, codec, None) for codec in EXP_AVG_SQ]),
    ("exp_avg_sq", SHRINKING, [(None, codec, None) for codec in EXP_AVG_SQ]),
    ("both moments", LONG, [(replace(M8, rounding=a), replace(V8, rounding=b), None) for a, b in ROUNDINGS]),
    ("ĝ_G", BOOSTED, [(None, None, codec) for codec in GLOBAL]),
)


def measure(bar: Progress) -> dict[str, dict[str, Score]]:
    """Key of run and codecs → tensor → score. What was measured before is read back from the cache."""
    source = b"".join(Path(file).read_bytes() for file in (__file__, gradients.__file__))  # other code, other results
    path = cache_dir() / "studies" / f"codecs-{hashlib.sha256(source).hexdigest()[:12]}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    todo = [(run, codecs) for _, run, rows in SECTIONS for codecs in rows if _key(run, codecs) not in known]
    record = recording() if todo else {}
    torch.set_num_threads(1)  # the tensors are small: a second thread costs more than it brings
    truths: dict[tuple[Run, str], tuple[list[torch.Tensor], torch.Tensor]] = {}
    for run, codecs in bar.track(todo, description="replaying AdamW"):
        scores = {}
        for name in ROWS:
            inputs = run.grads(record, name), record[f"global/{name}"][:: run.stride]
            if (run, name) not in truths:
                truths[run, name] = replay(run, *inputs, (None, None, None), torch.float64)
            result = score(*replay(run, *inputs, codecs, torch.float32), *truths[run, name])
            if codecs[2]:
                kept = codecs[2](inputs[1], torch.Generator().manual_seed(0))
                error = (kept - inputs[1]).norm() / inputs[1].norm()
                cosine = F.cosine_similarity(kept.double().flatten(), inputs[1].double().flatten(), dim=0)
                result = replace(result, stored=error.item(), stored_cosine=cosine.item())
            scores[name] = asdict(result)
        known[_key(run, codecs)] = scores
        scratch = path.with_suffix(".partial")
        scratch.write_text(json.dumps(known))
        scratch.replace(path)
    return {key: {name: Score(**values) for name, values in scores.items()} for key, scores in known.items()}


def _key(run: Run, codecs: Codecs) -> str:
    return f"{run.title}: {codecs}"


def _stored(format: str) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: quantize.decode(quantize.encode(x, format))


STOCHASTIC_BF16 = Codec("bf16", rounding="stochastic")
SHIPPED: tuple[dict[Codec, Callable[[torch.Tensor], torch.Tensor] | None], ...] = (
    {M8: lambda x: quantize.decode_exp_avg(*quantize.encode_exp_avg(x), x.shape), Codec("bf16"): None},
    {V8: lambda x: quantize.decode_exp_avg_sq(*quantize.encode_exp_avg_sq(x), x.shape), STOCHASTIC_BF16: None},
    {
        Codec("bf16"): _stored("bf16"),
        Codec("fp16"): _stored("fp16"),
        Codec("fp8"): _stored("fp8_e4m3"),
        INT8: _stored("int8"),
        INT4: _stored("int4"),
    },
)
"""What the library uses for exp_avg, exp_avg_sq and ĝ_G (rows marked *); its own codecs where they stand alone."""


def compare_with_library() -> str:
    """Whether the rows marked * are what the library does, on the recorded ĝ_G and its square."""
    record, generator = recording(), torch.Generator().manual_seed(0)
    worst = 0.0
    for place, codecs in enumerate(SHIPPED):
        for codec, library in codecs.items():
            for name in ROWS if library else ():
                x = record[f"global/{name}"]
                x = x.square() if place == 1 else x
                worst = max(worst, ((codec(x, generator) - library(x)).norm() / x.norm()).item())
    return f"* the library's codecs; this study's own differ from them by at most {worst:.0e} (relative, on ĝ_G)"


def main() -> None:
    with progress() as bar:
        scores = measure(bar)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(
        "update error: of the last eight updates m̂/(√v̂+ε); moved error, cosine, length: of the displacement;\n"
        "all against fp64 moments, mean over the tensors; worst: the largest moved error of one tensor"
    )
    for what, run, rows in SECTIONS:
        table = Table(title=f"{what}: {run.title}", title_justify="left")
        for heading in ("format", "group", "scale", "rounding", "B/param"):
            table.add_column(heading)
        measures = ["ĝ_G error", "ĝ_G cosine"] * (what == "ĝ_G") + ["update error", "moved error", "cosine", "length"]
        for heading in [*measures, "worst"]:
            table.add_column(heading, justify="right")
        table.add_column("worst tensor")
        for codecs in rows:
            table.add_row(*_cells(codecs, scores[_key(run, codecs)], stored=what == "ĝ_G"))
        console.print(table)
    console.print(compare_with_library())


def _cells(codecs: Codecs, scores: dict[str, Score], stored: bool) -> list[str]:
    used = [codec for codec in codecs if codec]
    shipped = " *" if all(codec in known for codec, known in zip(codecs, SHIPPED, strict=True) if codec) else ""
    mean = {f.name: sum(getattr(s, f.name) for s in scores.values()) / len(scores) for f in fields(Score)}
    worst, tensor = max((s.displacement, name) for name, s in scores.items())
    numbers = [f"{mean['update']:.4f}", f"{mean['displacement']:.4f}", f"{mean['cosine']:.5f}", f"{mean['length']:.4f}"]
    return [
        " + ".join(codec.label for codec in used) + shipped,
        str(used[0].group) if used[0].grouped else "–",
        str(used[0].scale).removeprefix("torch.") if used[0].grouped else "–",
        " + ".join(codec.rounding for codec in used),
        f"{sum(codec.bytes for codec in used):.3f}",
        *([f"{mean['stored']:.4f}", f"{mean['stored_cosine']:.5f}"] if stored else []),
        *numbers,
        f"{worst:.4f}",
        tensor.removeprefix("model.").removesuffix(".weight"),
    ]


if __name__ == "__main__":
    main()
