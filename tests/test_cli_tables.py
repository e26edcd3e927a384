"""What the command line prints can be read at 80 and at 60 columns; signal-to-noise figures compare across lengths."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

transformers = pytest.importorskip("transformers")

from dba_kernels import GlobalGradient  # noqa: E402
from dba_kernels.cli import inspect_command, plan_command, progress  # noqa: E402
from dba_kernels.cli.demo import report, training  # noqa: E402
from dba_kernels.cli.grids import Grid  # noqa: E402
from dba_kernels.cli.plan_command import batch_plan  # noqa: E402
from dba_kernels.cli.signal_to_noise import advice, per_batch  # noqa: E402
from dba_kernels.cli.sizes import Sizes  # noqa: E402

from .support.cli_inputs import SMALL, run, write_inputs  # noqa: E402

WIDTHS = (80, 60)


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the inputs and ``g.safetensors``: low rank and curvature, so that every column has something."""
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    data = ("--data", folder / "general.jsonl", "--batches", 6, "--rank", 8, "--curvature", 4)
    done = run("collect", "--model", folder / "model", *data, "--out", folder / "g.safetensors", *SMALL)
    assert done.exit_code == 0, done.output
    return folder


def shown(table: Grid, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    table.show(console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    drawn = [line for line in text.splitlines() if line[:1] in "┏┃┡│└"]
    assert drawn and max(map(len, drawn)) <= width
    return text


def words_of(text: str) -> set[str]:
    """Every cell: figures are never folded."""
    return {cell.strip() for line in text.splitlines() for cell in re.split("[│┃]", line)}


def check_readable(table: Grid, width: int) -> None:
    """Every figure stands whole in one cell unless its column is named as left out; keys are whole or folded."""
    text = shown(table, width)
    words = words_of(text)
    (left_out,) = re.findall(r"not shown for lack of room: (.*) \(", text) or [""]
    names = left_out.split(", ") if left_out else []
    kept = [i for i, heading in enumerate(table.values) if heading not in names]
    assert kept, "no figures are left"
    for i in kept:
        assert table.values[i] in words
        for row in table.rows:
            assert row[len(table.keys) + i] in words and row[len(table.keys) + i] != ""
    assert "…" not in text
    for row in table.rows:
        for key in row[: len(table.keys)]:
            assert key in words or (all(len(part) > 8 for part in [key]) and key[:12] in text)


def grids(folder: Path) -> dict[str, Grid]:
    gradient = GlobalGradient.load(folder / "g.safetensors")
    sizes = Sizes({"model.layers.0.weight": (4096, 4096)}, torch.bfloat16, rank=8, curvature=4)
    losses = torch.rand(8)
    ran = training.Run([3.0], [], 123.4, 1.25, 16.0)
    outcomes = {"base": report.Outcome(losses, losses), "AdamW": report.Outcome(losses, losses, ran)}
    outcomes["DBA"] = report.Outcome(losses - 0.1, losses - 0.2, ran)
    return {
        "inspect": inspect_command.tensor_table(gradient),
        "curvature": inspect_command.curvature_table(gradient),
        "parts": plan_command.parts_table(sizes),
        "totals": plan_command.totals_table(sizes),
        "demo": report.losses_table(outcomes, 100, "a title"),
    }


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["inspect", "curvature", "parts", "totals", "demo"])
def test_tables_can_be_read(collected: Path, name: str, width: int) -> None:
    """Protects who has a narrow terminal: no figure is cut or blank, and what is left out is named."""
    check_readable(grids(collected)[name], width)


def test_long_names_are_kept_whole_or_folded() -> None:
    """Protects real models: at 60 columns, names of 60 letters are folded, not cut, beside at least one figure."""
    table = Grid("t", ("tensor",), ("shape", "SNR"), ("shape",))
    name = "language_model.model.layers.10.self_attention.query_projection.weight"
    table.add(name, "4096×4096", "0.123")
    lines = shown(table, 60).splitlines()
    assert "".join(cells[1].strip() for line in lines if len(cells := line.split("│")) > 2) == name
    assert "0.123" in words_of("\n".join(lines)) and "not shown for lack of room: shape" in "\n".join(lines)


def test_an_unreadable_table_is_noticed() -> None:
    """Negative control: rich's own squeezing at 60 columns cuts figures, and the check sees it."""
    from rich.table import Table

    class Squeezed(Grid):
        def show(self, console: Console) -> None:
            table = Table(*self.keys, *self.values)
            for column in table.columns:
                column.no_wrap = True
            for row in self.rows:
                table.add_row(*row)
            console.print(table)

    table = Squeezed("t", ("tensor",), tuple(f"figure {i}" for i in range(8)))
    table.add("weight", *(f"{i}.123456" for i in range(8)))
    with pytest.raises(AssertionError):
        check_readable(table, 60)


@pytest.mark.parametrize("width", WIDTHS)
def test_commands_keep_to_the_width_they_are_told(collected: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Protects pipes and batch systems: COLUMNS decides where there is no terminal, 160 where nothing does."""
    monkeypatch.setenv("COLUMNS", str(width))
    assert progress.wide_console().width == width
    for arguments in (("inspect", collected / "g.safetensors"), ("plan", "--model", collected / "model")):
        result = run(*arguments)
        assert result.exit_code == 0
        assert max(len(line) for line in result.output.splitlines() if line[:1] in "┏┃┡│└") <= width
    monkeypatch.delenv("COLUMNS")
    assert progress.wide_console().width == 160


# --- signal-to-noise --------------------------------------------------------------------------------------------------


def test_signal_to_noise_is_reported_per_batch(collected: Path) -> None:
    """Protects comparisons of files of different lengths: total, number of batches and figure per batch are printed."""
    gradient = GlobalGradient.load(collected / "g.safetensors")
    s = gradient.signal_to_noise
    assert s is not None
    tokens = gradient.provenance.tokens / 6
    said = f"signal-to-noise {s:.3g} after 6 batches, {s / 6:.3g} per batch of about {tokens:,.0f} target tokens"
    assert said in run("inspect", collected / "g.safetensors").output
    table = inspect_command.tensor_table(gradient)
    for row, record in zip(table.rows, gradient.records.values(), strict=True):
        assert record.signal_to_noise is not None
        assert row[-2:] == (f"{record.signal_to_noise:.3g}", f"{record.signal_to_noise / 6:.3g}")
    assert inspect_command.as_dict(gradient)["signal_to_noise_per_batch"] == pytest.approx(s / 6)
    assert per_batch(None, 6) is None
    planned = batch_plan(s, 6, 0.9)
    assert f"{s:.3g}, {s / 6:.3g} per batch" in planned["words"].replace("\n", " ")
    assert planned["signal_to_noise_per_batch"] == pytest.approx(s / 6)


def test_the_figure_per_batch_does_not_grow_with_the_batches(collected: Path, tmp_path: Path) -> None:
    """Protects the meaning of the figure per batch: four times the batches leave it about as it was, unlike the total.

    On data whose signal-to-noise is known: micro-batch gradients μ + noise.
    """
    from dba_kernels import collect_global_gradient

    def measured(batches: int) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(1)
        model = torch.nn.Linear(400, 8, bias=False)
        data = [(1 + 4 * torch.randn(1, 400, generator=generator),) for _ in range(batches)]
        gradient = collect_global_gradient(model, data, loss_fn=lambda m, batch: m(batch[0]).sum())
        total = gradient.signal_to_noise
        assert total is not None
        return total, total / batches

    (few, few_each), (many, many_each) = measured(16), measured(64)
    assert many == pytest.approx(4 * few, rel=0.25) and many_each == pytest.approx(few_each, rel=0.25)
    assert many_each == pytest.approx(1 / 16, rel=0.25)


def test_the_advice_says_which_batches_it_speaks_of() -> None:
    """Protects who follows the advice: numbers of batches are totals, as --batches takes them."""
    from types import SimpleNamespace

    provenance = SimpleNamespace(batches=24, tokens=24 * 500)
    said = advice(SimpleNamespace(signal_to_noise=6.0, provenance=provenance))  # type: ignore[arg-type]
    assert "signal-to-noise 6 after 24 batches, 0.25 per batch of about 500 target tokens" in said
    assert "48 in all (--batches 48) would give 0.96" in said
