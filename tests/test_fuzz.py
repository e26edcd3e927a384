"""The fuzzer of the command line: it draws the same runs from the same seed, and notices what it is there to notice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from bench.fuzz import drawing, judging

ROOT = Path(__file__).resolve().parent.parent
RUNS = 20


def test_some_runs_have_no_finding() -> None:
    """Protects against raw tracebacks and partial files: a few drawn runs of every kind end as they must."""
    command = [sys.executable, "-m", "bench.fuzz", "--runs", str(RUNS), "--seed", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"seed 3: {RUNS} runs, ") and last.endswith(", 0 with findings")
    assert "succeeded" in done.stdout and "refused" in done.stdout  # both were drawn


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    """Files of the right names; drawing does not read what they hold."""
    folder = tmp_path / "seeds"
    files = [*drawing.DATA, "g.safetensors", "curved.safetensors", "g.snapshot.safetensors", "half/metrics.jsonl"]
    files += [f"model/{name}" for name in drawing.MODEL_FILES] + [f"half/checkpoints/step-{i}.pt" for i in (3, 4)]
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"a": [1, 2], "b": {"c": "d"}}\n' * 4)
    return folder


def test_a_seed_draws_the_same_runs(seeds: Path, tmp_path: Path) -> None:
    """Protects who repeats a finding: the same seed and number, the same command and spoilt bytes."""

    def drawn(number: int, seed: int, name: str) -> tuple[str, list[bytes]]:
        folder = tmp_path / name / "run"
        case = drawing.draw(number, seed, seeds, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        return str(case).replace(str(folder), ""), [path.read_bytes() for path in files]

    for number in range(30):
        assert drawn(number, 0, f"a{number}") == drawn(number, 0, f"b{number}")
    assert any(drawn(number, 0, f"c{number}") != drawn(number, 1, f"d{number}") for number in range(5))
    assert (seeds / "general.jsonl").read_text().count("\n") == 4  # the seed set itself stays whole


@pytest.mark.parametrize(
    ("status", "said", "late", "words"),
    [
        (99, "Traceback (most recent call last):\nKeyError: 'x'", False, "status 99, KeyError: 'x'"),
        (70, "Error: KeyError", False, "status 70"),
        (-11, "", False, "status -11"),
        (1, "", False, "status 1 without a message"),
        (1, "Error: no", False, "refused though nothing was wrong"),
        (0, "", True, "no end within"),
        (0, "", False, "status 0 without what was asked for"),
    ],
)
def test_wrong_ends_are_findings(tmp_path: Path, status: int, said: str, late: bool, words: str) -> None:
    """Negative control: each kind of wrong end is noticed, and a right one is none."""
    case = drawing.Case("finetune", ["finetune"], tmp_path / "out")
    found = judging.findings(case, judging.End(status, said, "", 1.0, late), tmp_path, tmp_path)
    assert len(found) == 1 and found[0].startswith(words), found
    spoilt = drawing.Case("finetune", ["finetune"], tmp_path / "out", "a.jsonl", "cut")
    assert judging.findings(spoilt, judging.End(1, "Error: no", "", 1.0, False), tmp_path, tmp_path) == []


def test_what_is_left_behind_is_a_finding(tmp_path: Path) -> None:
    """Negative control: temporary files, an empty folder of results, and a file of a failed run are noticed."""
    refused = judging.End(1, "Error: no", "", 1.0, False)
    case = drawing.Case("finetune", [], tmp_path / "out", "a.jsonl", "cut")
    (tmp_path / "out").mkdir()
    assert judging.findings(case, refused, tmp_path, tmp_path) == ["an empty folder of results was left"]
    (tmp_path / "out" / ".x.0.partial").write_text("")
    assert judging.findings(case, refused, tmp_path, tmp_path) == ["left out/.x.0.partial"]
    (tmp_path / "out" / ".x.0.partial").unlink()
    (tmp_path / "g.safetensors").write_text("")
    case = drawing.Case("collect", [], tmp_path / "g.safetensors", "a.jsonl", "cut")
    assert judging.findings(case, refused, tmp_path, tmp_path) == ["a file was written by a run that failed"]
