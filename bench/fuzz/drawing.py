"""Drawing a run: which command, which options, which input is spoilt, and how."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .mutations import mutate
from .seeds import COLLECT, DATA, FINETUNE, SMALL

Options = dict[str, tuple[str, ...]]

NUMBERS = ("0", "-1", "1", "2", "3.5", "nan", "inf", "1e400", "10000000000000000000000", "", "x", "9223372036854775807")
COMMON: Options = {
    "--length": ("8", "16", "100", "257", "4096", *NUMBERS),
    "--seed": ("1", "4611686018427387904", *NUMBERS),
    "--field": ("text", "id", "messages", "conversations", "", "\ud800"),
    "--loss-on": ("assistant", "all", "none"),
    "--dtype": ("auto", "fp32", "bf16", "mixed", "fp64"),
    "--device": ("cpu", "meta", "cuda", "cuda:7", "toaster", ""),
    "--batch": ("1", "3", "64", *NUMBERS),
}
MORE: dict[str, Options] = {
    "collect": {
        "--format": ("fp32", "int4", "fp8_e4m3", "none", "int3"),
        "--rank": ("1", "4", "500", *NUMBERS),
        "--curvature": ("1", "4", *NUMBERS),
        "--snapshot-every": ("1", "2", *NUMBERS),
        "--batches": ("1", "2", "50", *NUMBERS),
        **COMMON,
    },
    "finetune": {
        "--lr": ("1e-3", "1e30", "1e-300", *NUMBERS),
        "--warmup": ("1", "3", "4", *NUMBERS),
        "--weight-decay": ("0.1", "1e300", *NUMBERS),
        "--max-grad-norm": ("0.1", "1e-300", "1e300", *NUMBERS),
        "--micro-batch": ("1", *NUMBERS),
        "--boost": ("auto", "paper", "0.3", "much", *NUMBERS),
        "--boost-max": ("0.1", *NUMBERS),
        "--correction": ("cosine", "none", "agem", "pcgrad"),
        "--anchor": ("auto", "1.0", "1e300", *NUMBERS),
        "--anchor-every": ("1", "3", "500", *NUMBERS),
        "--state-format": ("fp32", "bf16", "int8"),
        "--param-format": ("auto", "native", "split8", "split16", "master"),
        "--eval-every": ("1", *NUMBERS),
        "--eval-batches": ("1", *NUMBERS),
        "--save-every": ("1", "2", *NUMBERS),
        **COMMON,
    },
    "plan": {
        "--dtype": ("fp32", "bf16", "fp64"),
        "--rank": NUMBERS,
        "--curvature": NUMBERS,
        "--cosine": ("0.5", "1", *NUMBERS),
    },
    "inspect": {},
    "try": {
        "--tokens": ("8000", "100", *NUMBERS),
        "--seeds": ("3", *NUMBERS),
        "--lr": ("1e-3", "1e30", "1e-300", *NUMBERS),
        "--curvature": ("2", "500", *NUMBERS),
        "--global-gradient": ("g.safetensors", "curved.safetensors", "chat.jsonl", "model", ""),
        **COMMON,
    },
    "cache": {},
    "demo": {
        "--steps": ("1", "2"),
        "--lr": ("1e-3", "1e30", *NUMBERS),
        "--boost": ("0.1", *NUMBERS),
        "--format": ("fp32", "int4", "int3"),
        "--state-format": ("fp32", "int8"),
        "--batch-size": ("1", "3", *NUMBERS),
        "--length": ("8", "4096", *NUMBERS),
        "--evaluation-blocks": ("2", *NUMBERS),
        "--seed": NUMBERS,
    },
}
MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "generation_config.json")
STATE_FILES = ("metrics.jsonl", "checkpoints/newest", "checkpoints/newest", "checkpoints/oldest")


@dataclass
class Case:
    """One run.

    Args:
        argv: for ``dba-kernels``.
        out: what it is asked to write; None where it prints.
        target: the spoilt input, relative to the case's folder; "" for none.
        how: it was spoilt.
        drawn: how many options were drawn; with none and nothing spoilt the run must succeed.
        existed: whether ``out`` was there before.
    """

    command: str
    argv: list[str]
    out: Path | None
    target: str = ""
    how: str = ""
    drawn: int = 0
    existed: bool = False
    resumes: bool = field(default=False)

    def __str__(self) -> str:
        spoilt = f"  [{self.target}: {self.how}]" if self.target else ""
        return " ".join(a if a.isprintable() and a else repr(a) for a in self.argv) + spoilt


def draw(number: int, seed: int, seeds: Path, folder: Path) -> Case:
    """Case ``number``, its files in ``folder``; the same for the same seed."""
    drawn = random.Random(f"{seed} {number}")
    shutil.copytree(seeds, folder, copy_function=os.link, ignore=shutil.ignore_patterns("half", "whole"))
    make = drawn.choices(list(SHARES), list(SHARES.values()))[0]
    case = make(drawn, seeds, folder)
    if case.command in MORE and not case.resumes:
        for option, values in MORE[case.command].items():
            if drawn.random() < (0.04 if len(MORE[case.command]) > 8 else 0.15):
                case.argv += [option, drawn.choice(values)]
                case.drawn += 1
    inputs = _inputs(case, folder)
    if inputs and drawn.random() < 0.7:
        path = drawn.choice(inputs)
        case.target, case.how = str(path.relative_to(folder)), mutate(drawn, path)
    return case


def _inputs(case: Case, folder: Path) -> list[Path]:
    """Files that the case reads: the model's, and those that its arguments name."""
    named = [Path(argument) for argument in case.argv if argument.startswith(str(folder)) and Path(argument).is_file()]
    found = 2 * named + [folder / "model" / name for name in MODEL_FILES if case.command not in ("inspect", "cache")]
    if case.resumes and case.out is not None:
        files = sorted((case.out / "checkpoints").iterdir())
        places = {"checkpoints/newest": files[-1], "checkpoints/oldest": files[0]}
        found += 4 * [places.get(name, case.out / name) for name in STATE_FILES]
    return [path for path in found if path.is_file()]


def _collect(drawn: random.Random, seeds: Path, folder: Path) -> Case:
    out = folder / "new" / "out.safetensors"
    argv = ["collect", "--model", str(folder / "model"), "--data", str(folder / drawn.choice(DATA)), *COLLECT]
    if again := drawn.random() < 0.25:  # onto what is there: finished, or to be extended
        out = folder / "g.safetensors"
        argv[4] = str(seeds / "general.jsonl")  # as the file says
        argv += drawn.choice((["--batches", "5"], ["--drop-snapshot"], []))
    return Case("collect", [*argv, "--out", str(out)], out, existed=again)


def _finetune(drawn: random.Random, seeds: Path, folder: Path) -> Case:
    out = folder / "new" / "out"
    argv = ["finetune", "--model", str(folder / "model"), "--data", str(folder / drawn.choice(DATA)), *FINETUNE]
    if drawn.random() < 0.6:
        argv += ["--global-gradient", str(folder / drawn.choice(("g.safetensors", "curved.safetensors")))]
    if drawn.random() < 0.4:
        argv += ["--eval-data", str(folder / drawn.choice(DATA))]
    return Case("finetune", [*argv, "--out", str(out)], out)


def _resume(drawn: random.Random, seeds: Path, folder: Path) -> Case:
    """Of a run that was stopped before it wrote its model; whatever is spoilt, it must end in the same bits or refuse.

    It names the seed set's own files, as the run that it goes on with did.
    """
    out = folder / "half"
    shutil.copytree(seeds / "half", out)
    argv = ["finetune", "--model", str(seeds / "model"), "--data", str(seeds / "domain.txt"), *FINETUNE]
    argv += ["--global-gradient", str(seeds / "g.safetensors"), "--out", str(out), "--resume"]
    return Case("finetune", argv, out, existed=True, resumes=True)


def _inspect(drawn: random.Random, seeds: Path, folder: Path) -> Case:
    name = drawn.choice(("g.safetensors", "g.safetensors", "curved.safetensors", "g.snapshot.safetensors"))
    argv = ["inspect", str(folder / name)]
    for option, share in (("--json", 0.4), ("--verify", 0.7)):
        argv += [option] if drawn.random() < share else []
    out = None
    if drawn.random() < 0.3:
        out = folder / drawn.choice(("plot.png", "plot.txt", "none/plot.png", "model"))
        argv += ["--plot", str(out)]
    existed = out is not None and out.exists()
    return Case("inspect", argv, out, drawn=int(bool(out) or "snapshot" in name), existed=existed)


def _plan(drawn: random.Random, seeds: Path, folder: Path) -> Case:
    model = folder / "model"
    argv = ["plan", "--model", str(drawn.choice((model, model / "config.json")))]
    argv += ["--global-gradient", str(folder / "g.safetensors")] if drawn.random() < 0.4 else []
    argv += ["--json"] if drawn.random() < 0.5 else []
    return Case("plan", argv, None)


def _demo(drawn: random.Random, seeds: Path, folder: Path) -> Case:
    out = folder / "new" / "demo"
    texts = ["--general", str(folder / drawn.choice(DATA)), "--domain", str(folder / drawn.choice(DATA))]
    sizes = ["--steps", "2", "--batch-size", "2", "--length", "16", "--evaluation-blocks", "2"]
    argv = ["demo", "--model", str(folder / "model"), *texts, *sizes, "--out", str(out)]
    if drawn.random() < 0.3:
        argv += ["--global-gradient", str(folder / "g.safetensors")]
    return Case("demo", argv, out)


def _try(drawn: random.Random, seeds: Path, folder: Path) -> Case:
    out = folder / "new" / "try"
    many = [name for name in DATA if name != "domain.txt"]  # each run has documents of its own
    texts = ["--general", str(folder / drawn.choice(many)), "--domain", str(folder / drawn.choice(many))]
    sizes = ["--tokens", "16000", "--seeds", "2", "--batch", "2", *SMALL]
    return Case("try", ["try", "--model", str(folder / "model"), *texts, *sizes, "--out", str(out)], out)


def _cache(drawn: random.Random, seeds: Path, folder: Path) -> Case:
    """Of a cache with entries of every kind, one of them a link to a folder that is not the cache's."""
    models = folder / "cache" / "dba_kernels" / "models"
    models.mkdir(parents=True)
    entries: tuple[Callable[[Path], object], ...] = (
        lambda path: shutil.copytree(folder / "model", path),
        lambda path: path.write_bytes(b"x"),
        lambda path: path.symlink_to(folder / "model"),
        lambda path: path.symlink_to("nowhere"),
        os.mkfifo,
        Path.mkdir,
        lambda path: (path.mkdir(), (path / "closed").mkdir(mode=0)),
    )
    for i, make in enumerate(drawn.sample(entries, drawn.randrange(len(entries)))):
        make(drawn.choice((models, models.parent)) / f"entry\n{i}")
    return Case("cache", ["cache", *(["--clear"] if drawn.random() < 0.6 else [])], None)


SHARES = {_collect: 23, _finetune: 28, _resume: 14, _inspect: 11, _plan: 9, _demo: 6, _try: 6, _cache: 3}
"""How often each kind of run is drawn, in percent."""
