"""``python -m bench.gpu``: the driver survives what its sections do, the comparison accepts what a GPU may compute."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import driver
from bench.gpu.driver import Options, Section

ROOT = Path(__file__).resolve().parent.parent
PATIENT = Options(simulate=False, budget=60.0, stall=20.0)


def section(function: str = "run", timeout: float = 20.0) -> Section:
    return Section(f"fake {function}", "tests.support.gpu_sections", timeout, function)


def run(tmp_path: Path, chosen: list[Section], options: Options = PATIENT) -> dict[str, Any]:
    """The report's sections, as the file has them."""
    output = tmp_path / "report.json"
    driver.run_all(chosen, options, output, lambda name, found: None)
    return json.loads(output.read_text())["sections"]


def planted(fault: str, stall: float = 20.0) -> Options:
    return Options(simulate=False, budget=60.0, stall=stall, plant={"fake run": fault})


def test_figures_and_what_is_absent(tmp_path):
    """A row's figures are kept; what a machine does not have is no failure."""
    found = run(tmp_path, [section()])["fake run"]
    assert found["status"] == "passed"
    assert found["figures"] == {"figures": {"answer": 42}, "last": {"answer": 42}}
    assert found["skipped"] == {"absent": "no such thing here"}
    assert found["checked"] == 3


def test_an_error_in_a_row_is_a_failed_check(tmp_path):
    """It names the check and the place, and the rows after it run."""
    found = run(tmp_path, [section("one_row_fails")])["fake one_row_fails"]
    assert found["status"] == "failed"
    assert found["failures"] == {"wrong": "ValueError: this one is wrong (gpu_sections.py:15)"}
    assert list(found["figures"]) == ["figures", "last"]


@pytest.mark.parametrize(
    ("fault", "stall", "reason"),
    [
        ("fail", 20.0, "AssertionError: a planted failure"),
        ("signal", 20.0, "died by SIGSEGV"),
        ("hang", 10.0, "hangs: nothing for 10 s"),
        ("device", 20.0, "CUDA error: an illegal memory access"),
    ],
)
def test_a_fault_costs_one_check(tmp_path, fault, stall, reason):
    """It is reported, the section goes on behind it in a fresh process, and the next section is whole."""
    found = run(tmp_path, [section(), section("one_row_fails")], planted(fault, stall))
    first = found["fake run"]
    assert first["status"] == "failed"
    assert list(first["failures"]) == ["planted"]
    assert reason in first["failures"]["planted"]
    assert list(first["figures"]) == ["figures", "last"]
    assert found["fake one_row_fails"]["checked"] == 3


def test_a_section_that_cannot_begin(tmp_path):
    """It is not tried for ever."""
    found = run(tmp_path, [section("dies_at_once"), section("raises")])
    assert found["fake dies_at_once"]["failures"] == {"accident 1": "between checks: died by SIGKILL"}
    assert found["fake raises"]["status"] == "failed"
    assert "outside of any check" in found["fake raises"]["log"]


def test_the_budget_ends_the_run(tmp_path):
    """What is left over is said to be not run; the file has been written all the same."""
    found = run(tmp_path, [section()], Options(simulate=False, budget=1.0, stall=20.0))
    assert found["fake run"] == {"status": "not run", "why": "the time budget was spent"}


def test_the_file_is_rewritten_after_every_section(tmp_path):
    """Whoever kills the run keeps what was found so far."""
    output, seen = tmp_path / "report.json", []
    driver.run_all(
        [section(), section("one_row_fails")],
        PATIENT,
        output,
        lambda name, found: seen.append(list(json.loads(output.read_text())["sections"])),
    )
    assert seen == [["fake run"], ["fake run", "fake one_row_fails"]]


BARE = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"rich", "pytest", "click", "transformers", "hypothesis", "matplotlib", "scipy"}:
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Refuse())
import importlib
from bench.gpu.driver import SECTIONS
assert "torch" not in sys.modules, "the driver imports torch"
for section in SECTIONS:
    assert callable(getattr(importlib.import_module(f"bench.gpu.{section.module}"), section.function))
"""


def in_interpreter(*command: str, timeout: float = 1200.0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = (sys.executable, *command)
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=timeout)


def test_nothing_must_be_installed():
    """Every section can be imported with torch, triton, numpy and safetensors alone; the driver needs none of them."""
    result = in_interpreter("-c", BARE)
    assert result.returncode == 0, result.stderr[-2000:]


APPROXIMATE = """
import sys, torch
torch.set_num_threads(1)
from bench.gpu.approximate import draw
draw(float(sys.argv[1]))
from bench.gpu import kernels
from tests.support.cases import size_cases, pairwise_matrix
def failures(wrong=None):
    found = 0
    for k, case in enumerate([*size_cases()[:4], *pairwise_matrix()[::16]]):
        try:
            kernels.check_step(case, k % 2, wrong)
        except AssertionError as error:
            found += 1
            print(case, error, file=sys.stderr)
    return found
print(failures(), failures("STEP_SIZE") if sys.argv[1] == "1" else 0)
"""


def test_tolerances_cover_what_a_gpu_may_compute():
    """Roots and quotients off by as much as PTX allows pass; a coefficient off by a percent does not."""
    result = in_interpreter("-c", APPROXIMATE, "1")
    assert result.stdout.split() == ["0", "8"], result.stdout + result.stderr[-2000:]


def test_tolerances_notice_larger_errors():
    """Negative control: eight times as much does not pass."""
    result = in_interpreter("-c", APPROXIMATE, "8")
    assert int(result.stdout.split()[0]) >= 4, result.stdout + result.stderr[-500:]
