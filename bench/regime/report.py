"""Markdown tables and the figure from the results on disk. Nothing here runs a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.quality.report import spread, table
from bench.regime import analysis, data, grid
from bench.regime.analysis import Record, Records

ALL = (*data.SEEN, *data.UNSEEN)


def main_table(model: str, domain: str, records: Records) -> str:
    """Each method at its chosen learning rate: losses, change from base, joint score against AL."""
    start = records.get(grid.base(model, domain).key())
    if start is None:
        return "_not run yet_"
    rows: list[list[object]] = [
        ["base model", "", f"{analysis.domain_loss(start):.3f}", *_means([start]), "", "", "", 1]
    ]
    vanilla = _chosen("AL", model, domain, records)
    for method in grid.FAMILIES:
        found = _chosen(method, model, domain, records)
        if not found:
            continue
        joints = np.array([100 * analysis.joint_of(r, start) for r in found])
        cells: list[object] = [method, f"{found[0]['setting']['lr']:g}"]
        cells += [spread(np.array([analysis.domain_loss(r) for r in found])), *_means(found)]
        cells += [f"{np.mean([analysis.general_loss(r) for r in found]) - analysis.general_loss(start):+.3f}"]
        cells += [spread(joints, 1)]
        change = analysis.difference(found, vanilla, ALL) if vanilla and method != "AL" else None
        cells += ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*change) if change else "", len(found)]
        rows.append(cells)
    header = [
        "method",
        "rate",
        f"{domain} loss",
        "general, seen sets",
        "general, unseen sets",
        "general − base",
        "joint",
    ]
    return table([*header, "general − AL's [95 %]", "seeds"], rows)


def _chosen(method: str, model: str, domain: str, records: Records) -> list[Record]:
    setting = analysis.choice(method, model, domain, records)
    return analysis.seeds_of(setting, records) if setting else []


def _means(found: list[Record]) -> list[str]:
    return [f"{np.mean([analysis.general_loss(r, sets) for r in found]):.3f}" for sets in (data.SEEN, data.UNSEEN)]


def matched_table(model: str, domain: str, records: Records) -> str:
    """General loss where each method, at its own best rate, reaches AL's best domain loss plus a margin."""
    al = [r for s in grid.family("AL", model, domain) if (r := records.get(s.key()))]
    if not al:
        return "_not run yet_"
    best = min(map(analysis.domain_loss, al))
    rows = []
    for method in grid.FAMILIES:
        cells = [analysis.general_at(method, model, domain, best + margin, records) for margin in (0.0, 0.02)]
        rows.append([method, *("–" if cell is None else f"{cell:.3f}" for cell in cells)])
    return table(["method", f"domain loss ≤ {best:.3f} (AL's best)", "0.02 nat above"], rows)


def every_run(records: Records) -> str:
    """Raw numbers of every run: nothing is chosen here."""
    rows = []
    for record in sorted(records.values(), key=lambda r: (r["setting"]["domain"], r["setting"]["method"])):
        setting = record["setting"]
        rest = {k: v for k, v in setting.items() if k not in ("model", "domain", "method", "lr", "seed")}
        cells = [setting["model"], setting["domain"], setting["method"], f"{setting['lr']:g}", setting["seed"]]
        cells += [", ".join(f"{k} {v}" for k, v in rest.items()), f"{analysis.domain_loss(record):.3f}"]
        cells += [f"{analysis.loss(record['test'], name):.3f}" for name in ALL]
        rows.append([*cells, record["cost"].get("seconds", ""), record["cost"].get("answer_tokens", "")])
    return table(
        ["model", "domain", "method", "rate", "seed", "options", "domain loss", *ALL, "s", "answer tokens"], rows
    )


def draw(model: str, records: Records, path: Path) -> None:
    """General against domain loss, a curve over the learning rates per method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(grid.TUNED), figsize=(11, 4.2), layout="constrained", squeeze=False)
    for axis, domain in zip(axes[0], grid.TUNED, strict=True):
        for method in grid.MAIN:
            found = [r for s in grid.family(method, model, domain) if (r := records.get(s.key()))]
            points = sorted((analysis.domain_loss(r), analysis.general_loss(r)) for r in found)
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=method)
        if (start := records.get(grid.base(model, domain).key())) is not None:
            axis.axhline(analysis.general_loss(start), color="grey", linewidth=0.8, linestyle=":", label="base model")
        axis.set_xlabel(f"{domain}: held-out answer loss (nats/token)")
        axis.set_ylabel("general: held-out answer loss (nats/token)")
    axes[0][-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(path: Path = analysis.RESULTS) -> None:
    """``report.md`` and ``regime.png`` beside the results."""
    records = analysis.load(path)
    parts = ["# A pretrained model, question answering, and general benchmarks to forget\n"]
    for domain in data.DOMAINS:
        parts += [f"## {domain}\n", main_table("gemma", domain, records) + "\n"]
        if domain in grid.TUNED:
            parts += [matched_table("gemma", domain, records) + "\n"]
    parts += ["## Every run\n", every_run(records) + "\n"]
    path.with_name("report.md").write_text("\n".join(parts), encoding="utf-8")
    draw("gemma", records, path.with_name("regime.png"))
