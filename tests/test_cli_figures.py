"""Figures: axes name their units, the uncertain has error bars, neutral values have lines, legends cover nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from dba_kernels import GlobalGradient
from dba_kernels.cli import models
from dba_kernels.cli.demo import report, training
from dba_kernels.cli.figures import run_figure, short_name
from dba_kernels.cli.gradient_figure import gradient_figure, place_of


def metric(gamma: float) -> dict[str, float]:
    kinds = {f"{name}_{part}": 0.5 for name in ("cosine", "correction") for part in ("mean", "min", "max")}
    return {"gamma": gamma, **kinds}


def run_lines() -> list[dict[str, Any]]:
    first = {"step": 0, "eval_loss": 3.0, "general_eval_loss": 3.1, "eval_losses": [3.0], "general_eval_losses": [3.1]}
    steps = [{"step": i, "loss": 3.0 - 0.1 * i, "lr": 1e-5, **metric(0.5)} for i in (1, 2, 3, 4)]
    for line in steps[1::2]:
        line |= {"eval_loss": 2.9, "eval_change": -0.1, "eval_change_error": 0.02}
        line |= {"general_eval_loss": 3.2, "general_eval_change": 0.1, "general_eval_change_error": 0.03}
    return [first, *steps]


def axes_by_title(figure: Any) -> dict[str, Any]:
    return {axes.get_title().partition("\n")[0]: axes for axes in figure.axes}


def level_lines(axes: Any) -> set[float]:
    """Heights of the lines that run across the axes."""
    return {line.get_ydata()[0] for line in axes.lines if list(line.get_xdata()) == [0, 1]}


def check_every_axis_is_named(figure: Any) -> None:
    for axes in figure.axes:
        assert axes.get_ylabel(), axes.get_title()
        assert "loss" not in axes.get_ylabel() or "nats/token" in axes.get_ylabel()


def check_legends_cover_nothing(figure: Any) -> None:
    """Drawn, no legend's box touches the box of any axes."""
    figure.canvas.draw()
    legends = [axes.get_legend() for axes in figure.axes if axes.get_legend()] + figure.legends
    assert legends
    for legend in legends:
        box = legend.get_window_extent()
        assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes)


def test_the_figure_of_a_run() -> None:
    """Protects the reader of a run's figure: units, held-out changes with error bars, α = 1 and φ = 0."""
    figure = run_figure(run_lines(), "title")
    check_every_axis_is_named(figure)
    check_legends_cover_nothing(figure)
    axes = axes_by_title(figure)
    changes = axes["held-out change from the start"]
    assert [container.get_label().split(",")[0] for container in changes.containers] == ["domain", "general"]
    (_, _, (bars,)) = changes.containers[0].lines
    lengths = [segment[1][1] - segment[0][1] for segment in bars.get_segments()]
    assert lengths == pytest.approx([0.0, 0.04, 0.04])
    assert 1.0 in level_lines(axes["correction of the update"]) and 0.0 in level_lines(axes["domain · global gradient"])
    plain = run_figure([{"step": 1, "loss": 3.0, "lr": 1e-5}], "title")  # AdamW, nothing measured
    assert {"loss per target token", "learning rate"} == set(axes_by_title(plain))


def test_a_legend_over_the_data_is_noticed() -> None:
    """Negative control: matplotlib's own place for a legend is inside the axes."""
    figure = run_figure(run_lines(), "title")
    figure.axes[0].legend(loc="upper right")
    with pytest.raises(AssertionError):
        check_legends_cover_nothing(figure)


def test_the_figure_of_the_demo_shows_differences_and_errors() -> None:
    """Protects the demo's figure: training curves that coincide are subtracted, held-out changes have error bars."""
    blocks = torch.rand(12, generator=torch.Generator().manual_seed(0))
    other = torch.rand(12, generator=torch.Generator().manual_seed(1))
    adamw = training.Run(losses=[3.0, 2.9, 2.8])
    dba = training.Run(losses=[3.0, 2.899, 2.797], metrics=[metric(0.5)] * 3)
    outcomes = {"base": report.Outcome(blocks, blocks), "AdamW": report.Outcome(other, other, adamw)}
    outcomes["DBA"] = report.Outcome(other - 0.1, other - 0.2, dba)
    figure = report.demo_figure(outcomes, "title")
    check_every_axis_is_named(figure)
    check_legends_cover_nothing(figure)
    axes = axes_by_title(figure)
    difference = axes["DBA − AdamW, same batches"]
    assert list(difference.lines[0].get_ydata()) == pytest.approx([0.0, -0.001, -0.003]) and 0.0 in level_lines(
        difference
    )
    held_out = axes["held-out loss (general)"]
    assert [label.get_text() for label in held_out.get_xticklabels()] == ["AdamW", "DBA"]
    mean, error = report.paired(other - 0.2, blocks)
    (points, _, (bars,)) = held_out.containers[1].lines
    assert points.get_ydata()[0] == pytest.approx(mean)
    (segment,) = bars.get_segments()
    assert segment[1][1] - segment[0][1] == pytest.approx(2 * error)


def test_the_figure_of_a_gradient_has_layers_on_its_x_axis() -> None:
    """Protects ``inspect --plot``: layers, not numbers of tensors, are on the x axis; the few others by name."""
    names = [f"model.layers.{i}.{kind}.weight" for i in range(30) for kind in ("mlp.up_proj", "self_attn.q_proj")]
    names = ["model.embed_tokens.weight", *names, "model.norm.weight"]
    figure = gradient_figure(GlobalGradient.from_tensors({name: torch.randn(8, 8) for name in names}))
    check_every_axis_is_named(figure)
    check_legends_cover_nothing(figure)
    last = figure.axes[-1]
    labels = [label.get_text() for label in last.get_xticklabels()]
    assert (
        labels[:2] == ["embed_tokens", "norm"]
        and labels[2:5] == ["0", "2", "4"]
        and last.get_xlabel().startswith("layer")
    )
    first = figure.axes[0].lines[0]
    assert list(first.get_xdata()) == [2.0 + i for i in range(30)]  # one kind of tensor, a point a layer
    assert [text.get_text() for text in figure.legends[0].texts] == ["up_proj.weight", "q_proj.weight"]
    assert place_of("transformer.h.11.attn.c_attn.weight") == (11, "c_attn.weight")
    assert place_of("lm_head.weight")[0] is None


def test_titles_name_no_folder_of_the_cache() -> None:
    """Protects titles: of a converted model they keep its name, of a path its last part."""
    cached = models.cache_dir() / "models" / "SmolLM2-135M.Q4_1-97724192-1795796107"
    assert short_name(str(cached)) == "SmolLM2-135M.Q4_1"
    assert short_name("org/name-7b") == "name-7b" and short_name("./tuned/") == "tuned"
