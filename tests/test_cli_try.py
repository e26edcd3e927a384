"""``dba-kernels try``: parts that share nothing, a budget that is kept, a verdict that claims no more than it can."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from dba_kernels import GlobalGradient  # noqa: E402
from dba_kernels.cli.output import InputError  # noqa: E402
from dba_kernels.cli.text import Corpus  # noqa: E402
from dba_kernels.cli.trial import try_command  # noqa: E402
from dba_kernels.cli.trial.figure import trial_figure  # noqa: E402
from dba_kernels.cli.trial.parts import Budget, split  # noqa: E402
from dba_kernels.cli.trial.runs import AL, BOOSTED, HALF, REMEMBERED, REPLAY  # noqa: E402
from dba_kernels.cli.trial.verdict import Interval, general_at, in_words  # noqa: E402

from .support.cli_inputs import SMALL, run, sentences, write_inputs, write_jsonl  # noqa: E402

BASE = (3.0, 3.0)


def points_where(dba_general: list[float], dba_domain: float = 2.6) -> dict[str, list[tuple[float, float]]]:
    """Three seeds: AL learns 0.4 of the domain and forgets 0.2, half of both at half the rate; DBA as given."""
    return {
        "base": [BASE] * 3,
        AL: [(2.6, 3.2), (2.61, 3.205), (2.59, 3.195)],
        HALF: [(2.8, 3.1)] * 3,
        BOOSTED: [(dba_domain, general) for general in dba_general],
    }


@pytest.mark.parametrize(
    ("general", "verdict"),
    [
        ([3.08, 3.09, 3.07], "A global gradient helps here: general loss 0.1"),
        ([3.32, 3.33, 3.31], "A global gradient harms here: general loss 0.1"),
        ([3.1, 3.4, 3.12], "A global gradient makes no difference that this budget can show"),
    ],
)
def test_the_verdict_is_what_the_runs_show(general: list[float], verdict: str) -> None:
    """Protects who acts on the verdict: help and harm need an interval without 0; noise of the same size is neither."""
    table, differences, verdicts = try_command.conclude(points_where(general))
    assert verdicts[-1].startswith(verdict), verdicts
    assert "nats/token" in verdicts[-1] and "±" in verdicts[-1]
    assert [row[0] for row in table.rows] == [AL, HALF, BOOSTED]
    assert differences[BOOSTED].sure == ("no difference" not in verdict)


def test_general_loss_is_compared_at_equal_domain_loss() -> None:
    """Protects against praise for learning less: a method on AL's own path makes no difference, wherever it stops."""
    path = [BASE, (2.8, 3.1), (2.6, 3.2)]
    assert general_at(2.7, path) == pytest.approx(3.15)
    assert general_at(2.9, path) == pytest.approx(3.05)
    assert general_at(2.5, path) == pytest.approx(3.25)  # on along the last stretch
    assert general_at(3.5, path) == 3.0
    on_path = points_where([3.1, 3.1, 3.1], dba_domain=2.8)
    assert try_command.conclude(on_path)[1][BOOSTED].mean == pytest.approx(0.0, abs=1e-3)
    ahead = points_where([3.1, 3.1, 3.1], dba_domain=2.6)  # control: the same general loss at AL's domain loss helps
    assert try_command.conclude(ahead)[1][BOOSTED].mean == pytest.approx(-0.1, abs=1e-2)


def test_no_verdict_where_al_learned_nothing_and_harm_where_the_method_did_not() -> None:
    """Protects against verdicts from runs that were too short to learn anything."""
    nothing = Interval(-0.01, 0.05)
    assert "No verdict" in in_words("It", Interval(-0.2, 0.01), nothing, nothing)
    learned = Interval(-0.4, 0.05)
    assert "harms here: the domain is not learned" in in_words("It", Interval(-0.2, 0.01), Interval(0.0, 0.1), learned)


def test_the_interval_is_students() -> None:
    """Protects the ±: 95 % of Student's t over few seeds, not a standard error."""
    interval = Interval.of([1.0, 2.0, 3.0])
    assert interval.mean == 2.0 and interval.half == pytest.approx(4.303 / 3**0.5)
    assert not Interval.of([1.0, -1.0]).sure


def test_parts_share_no_document(tmp_path: Path) -> None:
    """Protects held-out losses: every document is in exactly one part; too few documents are refused by name."""
    corpus = Corpus([str(write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in sentences(23, 0)]))])
    train, held_out = split(corpus, 3, 0, "--domain")
    indices = [index for part in (*train, *held_out) for index in part.indices]
    assert sorted(indices) == list(range(23)) and all(len(part) for part in (*train, *held_out))
    assert train[1].document(0) == corpus.document(train[1].indices[0])
    with pytest.raises(InputError, match="--domain: expected at least 24 documents, 2 for each of 12 runs, got 23"):
        split(corpus, 12, 0, "--domain")


def test_the_budget_is_kept() -> None:
    """Protects the budget: what is planned reads no more tokens than were given; too few are refused with the number
    that would do."""
    budget = Budget.of(1_000_000, 1024, arms=5, seeds=4, collects=True)
    read = 1024 * (5 * 4 * budget.steps + budget.collected + 2 * 4 * 6 * budget.held_out / 3)
    assert 0.8e6 < read <= 1e6
    with pytest.raises(InputError, match=r"expected at least 234,058 .* got 100,000") as refused:
        Budget.of(100_000, 1024, arms=5, seeds=4, collects=True)
    assert "--batch" in str(refused.value.message)
    assert Budget.of(234_058, 1024, arms=5, seeds=4, collects=True).steps == 8


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One whole command with the memory; its folder and what it printed."""
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    data = ("--general", folder / "general.jsonl", "--domain", folder / "chat.jsonl")
    how = ("--tokens", 8 * 64 * 12 * 10 // 7 + 200, "--seeds", 2, "--batch", 2, "--curvature", 4, "--lr", 5e-4)
    result = run("try", "--model", folder / "model", *data, *how, "--out", folder / "out", *SMALL)
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_the_command_ends_in_a_verdict(tried: tuple[Path, str]) -> None:
    """Protects the command: all methods run from one base, files say what the screen says, the verdict comes last."""
    folder, printed = tried
    results = json.loads((folder / "out" / "results.json").read_text())
    assert set(results["losses"]) == {"base", AL, HALF, BOOSTED, REMEMBERED, REPLAY}
    assert all(len(points) == 2 for points in results["losses"].values())
    assert printed.rstrip().splitlines()[-1] == results["verdict"][-1]
    assert results["budget"]["steps"] == 8 and "8 steps of 2 x 32 tokens" in printed
    losses = results["losses"]
    for seed in range(2):
        assert len({tuple(points[seed]) for points in losses.values()}) == 6  # each method makes a difference
    assert "per batch of about" in printed and "note     lr: 0.0005 is large" in printed
    stored = GlobalGradient.load(folder / "out" / "global_gradient.safetensors")
    assert stored.provenance.batches == results["budget"]["collected"] and stored.curvature_records
    assert (folder / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_stored_gradient_is_used_and_bad_options_are_refused(tried: tuple[Path, str], tmp_path: Path) -> None:
    """Protects the user's time: what cannot work is refused before anything is computed."""
    folder, _ = tried
    data = ("--model", folder / "model", "--general", folder / "general.jsonl", "--domain", folder / "chat.jsonl")
    stored = ("--global-gradient", folder / "out" / "global_gradient.safetensors")
    for more, message in (
        (("--tokens", 100), "--tokens: expected at least"),
        ((*stored, "--curvature", 4), "--curvature: leave it out with --global-gradient"),
        (("--seeds", 15, "--tokens", 10**9), "--domain: expected at least 30 documents"),
    ):
        result = run("try", *data, *more, "--out", tmp_path / "out", *SMALL)
        assert result.exit_code == 1 and message in result.output, result.output
        assert not (tmp_path / "out").exists()


def test_a_rate_at_which_runs_diverge_is_refused(tried: tuple[Path, str], tmp_path: Path) -> None:
    """No verdict is given on losses that are not finite: the message names the rate, and no results are left."""
    folder, _ = tried
    data = ("--model", folder / "model", "--general", folder / "general.jsonl", "--domain", folder / "chat.jsonl")
    out = tmp_path / "out"
    stored = ("--global-gradient", folder / "out" / "global_gradient.safetensors")
    result = run("try", *data, *stored, "--lr", "1e30", "--tokens", 20_000, "--seeds", 2, "--out", out, *SMALL)
    assert result.exit_code == 1, result.output
    assert "--lr: expected a rate at which every method learns, got 1e+30" in result.output
    assert not (out / "results.json").exists()


def test_the_figure_names_units_and_shows_the_intervals() -> None:
    """Protects the reader of the figure: units on both axes, an error bar for each method, a line at no difference."""
    points = points_where([3.08, 3.09, 3.07])
    figure = trial_figure(points, try_command.conclude(points)[1])
    left, right = figure.axes
    assert (
        "nats/token" in left.get_xlabel() and "nats/token" in left.get_ylabel() and "nats/token" in right.get_ylabel()
    )
    assert len(left.containers) == 3 and len(right.containers) == 1
    assert any(list(line.get_ydata()) == [0.0, 0.0] for line in right.lines)
