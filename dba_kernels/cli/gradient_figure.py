"""The figure of ``dba-kernels inspect``: norm, error and signal-to-noise of a global gradient, layer by layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dba_kernels import GlobalGradient

from .figures import new_figure
from .signal_to_noise import ENOUGH, expected_cosine

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS, MARKERS = 10, "ox^sDv"


def place_of(name: str) -> tuple[int | None, str]:
    """Layer of a parameter (the first number in its name; None outside the layers), and its kind within a layer."""
    parts = name.split(".")
    layer = next((int(part) for part in parts if part.isdigit()), None)
    words = [part for part in parts if not part.isdigit()]
    return layer, ".".join(words[-2:])


def gradient_figure(gradient: GlobalGradient) -> Figure:
    """Root mean square, relative error, and the cosine that the signal-to-noise promises, over the layers.

    Tensors outside the layers stand at the left, one tick each, in the order of the file.
    """
    from matplotlib import colormaps

    places = {name: place_of(name) for name in gradient.records}
    outside = [name for name, (layer, _) in places.items() if layer is None]
    layers = sorted({layer for layer, _ in places.values() if layer is not None})
    at = {name: float(i) for i, name in enumerate(outside)}
    at |= {name: float(len(outside) + layers.index(layer)) for name, (layer, _) in places.items() if layer is not None}
    figure = new_figure(gradient.path.name if gradient.path else "global gradient", 13, 9)
    axes = list(figure.subplots(3, 1, sharex=True))
    kinds: dict[str, list[str]] = {}
    for name, (layer, kind) in places.items():
        if layer is not None:
            kinds.setdefault(kind, []).append(name)
    for i, (kind, names) in enumerate(kinds.items()):
        style = {"color": colormaps["tab10"](i % COLOURS), "marker": MARKERS[i // COLOURS % len(MARKERS)]}
        _draw(axes, gradient, names, at, label=kind, markersize=4, linewidth=0.6, **style)
    for name in outside:
        _draw(axes, gradient, [name], at, color="black", marker="*", markersize=7)
    axes[0].set(yscale="log", ylabel="root mean square\n(nats/token per unit of weight)", title="stored gradient")
    axes[1].set(ylabel="relative error\n(share of 1)", ylim=(0, None), title="what compression costs")
    axes[2].set(ylabel="expected cosine\n√(s / (1 + s))", ylim=(0, 1.05), title="with the gradient of endless data")
    axes[2].axhline(ENOUGH, color="black", linewidth=0.8, linestyle=":", label=f"enough: {ENOUGH:g}")
    axes[2].text(0.995, ENOUGH, f"enough: {ENOUGH:g}", transform=axes[2].get_yaxis_transform(), ha="right", va="top")
    _label_layers(axes[2], outside, layers)
    if kinds:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize="x-small", title="tensor")
    return figure


def _draw(axes: list[Axes], gradient: GlobalGradient, names: list[str], at: dict[str, float], **style: object) -> None:
    """One line of points on each of the axes, a point a tensor."""
    records = [gradient.records[name] for name in names]
    rms = [math.sqrt(r.squared_norm / max(math.prod(r.shape), 1)) for r in records]
    errors = [r.relative_error for r in records]
    cosines = [math.nan if r.signal_to_noise is None else expected_cosine(r.signal_to_noise) for r in records]
    for axis, values in zip(axes, (rms, errors, cosines), strict=True):
        axis.plot([at[name] for name in names], values, **style)  # type: ignore[arg-type]


def _label_layers(axis: Axes, outside: list[str], layers: list[int]) -> None:
    """Ticks: the tensors outside the layers by name, upright, then layer numbers, at most about 20 of them."""
    every = max(1, math.ceil(len(layers) / 20))
    shown = range(0, len(layers), every)
    names = [".".join(name.removesuffix(".weight").split(".")[-1:]) for name in outside]
    places = [*range(len(outside)), *(len(outside) + i for i in shown)]
    axis.set_xticks(places, [*names, *(str(layers[i]) for i in shown)])
    for tick in axis.get_xticklabels()[: len(outside)]:
        tick.set(rotation=45, ha="right")
    axis.set_xlabel("layer" + ("  (left: tensors outside the layers)" if outside else ""))
