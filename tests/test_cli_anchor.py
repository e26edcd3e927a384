"""Curvature and anchor on the command line: collect, inspect, plan and finetune on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from safetensors.torch import load_file

from dba_kernels import GlobalGradient

from .support.cli_inputs import SMALL, run, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def collect(inputs: Path, out: Path, *more: str | int) -> str:
    options = ("--data", inputs / "general.jsonl", "--batches", 4, "--out", out, *SMALL, *more)
    result = run("collect", "--model", inputs / "model", *options)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def memory(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("memory") / "memory.safetensors"
    output = collect(inputs, out, "--format", "none", "--curvature", 8)
    assert "H        rank 8" in output and "calibration" in output
    return out


def test_collect_keeps_the_curvature_alone(inputs: Path, memory: Path) -> None:
    """Protects ``--format none --curvature``: a file without ĝ_G, which the same command finds finished, and which a
    command of another rank refuses."""
    gg = GlobalGradient.load(memory)
    assert len(gg) == 0 and gg.curvature_records
    assert "finished already" in collect(inputs, memory, "--format", "none", "--curvature", 8)
    options = ("--data", inputs / "general.jsonl", "--batches", 4, "--out", memory, *SMALL, "--format", "none")
    other = run("collect", "--model", inputs / "model", *options, "--curvature", 4)
    assert other.exit_code != 0 and "expected --curvature 4, got 8" in other.output
    nothing = run("collect", "--model", inputs / "model", *options[:5], memory.with_name("x.safetensors"), *options[6:])
    assert nothing.exit_code != 0 and "nothing would be kept" in nothing.output


def test_inspect_shows_it(memory: Path) -> None:
    """Protects ``inspect``: the energy that the rank keeps of every factor, as a table and as JSON."""
    shown = run("inspect", memory, "--verify")
    assert shown.exit_code == 0, shown.output
    assert "curvature of the general loss" in shown.output and "calibration" in shown.output
    described = json.loads(run("inspect", memory, "--json").output)
    assert all(0 < entry["energy"] <= 1 for entry in described["curvature"].values())


def test_plan_counts_it(inputs: Path) -> None:
    """Protects ``plan --curvature``: θ₀ and the factors are part of every total."""
    without, with_it = (
        json.loads(run("plan", "--model", inputs / "model", *more, "--json").output)
        for more in ((), ("--curvature", 8))
    )
    extra = with_it["totals"][0]["bytes"] - without["totals"][0]["bytes"]
    assert without["anchor"] == 0 and extra == with_it["anchor"] > 2 * with_it["parameters"]


def test_finetune_is_held(inputs: Path, memory: Path, tmp_path: Path) -> None:
    """Protects ``finetune --anchor``: the predicted rise is in every line of the metrics, and smaller the larger λ."""
    rises = []
    for strength in ("1", "1000"):
        out = tmp_path / strength
        options = ("--data", inputs / "general.jsonl", "--steps", 4, "--lr", "1e-3", "--out", out, *SMALL)
        result = run(
            "finetune", "--model", inputs / "model", *options, "--global-gradient", memory, "--anchor", strength
        )
        assert result.exit_code == 0, result.output
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert all("predicted_rise" in line and "anchor_ratio" in line for line in lines if "loss" in line)
        rises.append(lines[-1]["predicted_rise"])
    assert 0 < rises[1] < rises[0]


def test_the_anchor_acts_in_every_kth_step(inputs: Path, memory: Path, tmp_path: Path) -> None:
    """Protects ``finetune --anchor-every``: with K = 2 the second step of two is anchored; it belongs to the run."""
    base = load_file(inputs / "model" / "model.safetensors")
    moved = {}
    for every in ("1", "2", "3"):
        out = tmp_path / every
        options = ("--data", inputs / "general.jsonl", "--steps", 2, "--lr", "1e-3", "--out", out, *SMALL)
        anchored = ("--global-gradient", memory, "--anchor", "1e4", "--anchor-every", every)
        result = run("finetune", "--model", inputs / "model", *options, *anchored)
        assert result.exit_code == 0, result.output
        assert json.loads((out / "run.json").read_text())["settings"]["anchor_every"] == int(every)
        tuned = load_file(out / "model.safetensors")
        moved[every] = sum(float((tuned[name] - base[name]).square().sum()) for name in base)
    assert moved["2"] < 0.9 * moved["3"]  # K = 3 is never due in two steps


def test_a_wrong_anchor_is_refused(inputs: Path, memory: Path, tmp_path: Path) -> None:
    """Protects the option: neither a number nor "auto", or no file to take the curvature from."""
    options = ("--data", inputs / "general.jsonl", "--steps", 4, "--out", tmp_path / "out", *SMALL)
    for more, message in (
        (("--anchor", "firm", "--global-gradient", memory), "--anchor: expected a number or 'auto', got 'firm'"),
        (("--anchor", "3"), "--anchor: needs --global-gradient"),
        (("--anchor-every", "3"), "--anchor-every: needs --global-gradient"),
    ):
        result = run("finetune", "--model", inputs / "model", *options, *more)
        assert result.exit_code != 0 and message in result.output
