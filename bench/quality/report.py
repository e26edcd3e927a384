"""Markdown tables and figures from the results on disk. Nothing here runs a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bench.quality import analysis, choose, data, grid, results, training
from bench.quality.analysis import Point, Weights
from bench.quality.results import Record
from bench.quality.setting import Setting

RIVALS = ("AL", "replay", "WiSE-FT")  # whom every method meets at equal domain loss
LEVELS = grid.LRS  # the domain losses that AL reaches at these learning rates


def options_text(setting: Setting) -> str:
    """A setting's fields besides the domain, the seed and the method's name, as the tables show them."""
    fields = setting.fields()
    shown = [f"lr {setting.lr:g}", "constant" if not setting.anneal else ""]
    shown += [f"{n} {v:g}" if isinstance(v, float) else f"{n} {v}" for n, v in fields.items()
              if n not in ("domain", "method", "lr", "seed", "anneal")]  # fmt: skip
    return ", ".join(filter(None, shown))


def spread(values: np.ndarray, digits: int = 3, sign: str = "") -> str:
    """Mean ± standard deviation over seeds; no ± for a single seed."""
    text = f"{values.mean():{sign}.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {values.std(ddof=1):.{digits}f}"


def row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def table(header: list[str], rows: list[list[object]]) -> str:
    return "\n".join([row(header), row(["---"] * len(header)), *map(row, rows)])


def chosen_table(domain: str, records: dict[str, Record], weights: Weights) -> str:
    """Each method at its chosen setting: raw losses, change from base, joint score against vanilla."""
    start = analysis.point(grid.base(domain), records, weights)
    vanilla_setting = choose.choice("AdamW", domain)
    if start is None or vanilla_setting is None:
        return "_not run yet_"
    vanilla = analysis.point(vanilla_setting, records, weights)
    rows: list[list[object]] = [
        ["base model", "", f"{start.domain_loss[0]:.3f}", f"{start.general_loss[0]:.3f}", "", "", "", 1, ""]
    ]
    for method in grid.FAMILIES:
        setting = choose.choice(method, domain)
        found = analysis.point(setting, records, weights) if setting else None
        if setting is None or found is None or vanilla is None:
            continue
        seeds = min(len(found.joint), len(vanilla.joint))
        relative = 100 * (found.joint[:seeds] / vanilla.joint[:seeds] - 1)
        change = found.general_loss - start.general_loss[0]
        tried = [s.key() in records for s in grid.family(method, domain)]
        counts = [len(found.joint), f"{sum(tried)}/{len(tried)}"]
        scores = [spread(100 * found.joint, 2), spread(relative, 1, "+"), *counts]
        both = [spread(found.domain_loss), spread(found.general_loss), f"{change.mean():+.3f}"]
        rows.append([method, options_text(setting), *both, *scores])
    header = [
        "method",
        "chosen setting",
        "domain loss",
        "general loss",
        "change",
        "joint %",
        "vs AdamW %",
        "seeds",
        "tried",
    ]
    return table(header, rows)


def summary_table(domains: list[str], source: Path) -> str:
    """The swept methods at their chosen settings on every domain: losses, and the joint score against vanilla."""
    rows: list[list[object]] = []
    loaded = {domain: (results.load(domain, source), Weights.of(domain)) for domain in domains}
    for method in (*grid.SWEPT, "replay, one to one"):
        cells: list[object] = [method]
        for domain, (records, weights) in loaded.items():
            chosen, vanilla = choose.choice(method, domain), choose.choice("AdamW", domain)
            own = analysis.point(chosen, records, weights) if chosen else None
            other = analysis.point(vanilla, records, weights) if vanilla else None
            start = analysis.point(grid.base(domain), records, weights)
            if own is None or other is None or start is None:
                cells += ["–", "–", "–"]
                continue
            seeds = min(len(own.joint), len(other.joint))
            cells += [
                spread(own.domain_loss, 2),
                spread(own.general_loss - start.general_loss[0], 2, "+"),
                spread(100 * (own.joint[:seeds] / other.joint[:seeds] - 1), 1, "+"),
            ]
        if set(cells[1:]) != {"–"}:
            rows.append(cells)
    header = ["method"] + [
        f"{d}: {what}" for d in domains for what in ("domain loss", "general Δ", "joint vs AdamW, %")
    ]
    return table(header, rows)


def targets(domain: str, records: dict[str, Record], weights: Weights) -> dict[str, float]:
    """The domain losses at which methods are compared: where AL stands at three learning rates."""
    found = {}
    for lr in LEVELS:
        at = analysis.point(Setting(domain, "AL", lr, steps=grid.STEPS), records, weights, (0,))
        if at is not None:
            found[f"AL at {lr:g}"] = float(at.domain_loss.mean())
    return found


def matched_table(domain: str, records: dict[str, Record], weights: Weights) -> str:
    """General loss at equal domain loss, minus AL's, with its paired 95 % interval; negative is better than AL."""
    levels = targets(domain, records, weights)
    if not levels:
        return "_not run yet_"
    reference = {n: analysis.best_matched("AL", domain, records, t, weights) for n, t in levels.items()}
    rows: list[list[object]] = []
    for method in (*grid.FAMILIES, *grid.SENSITIVITY):
        cells: list[object] = [method]
        for name, target in levels.items():
            general = analysis.best_matched(method, domain, records, target, weights)
            against = reference[name]
            if general is None or against is None:
                cells.append("–")
                continue
            mean, low, high = analysis.interval(general - against, weights.general)
            cells.append(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
        if any(cell != "–" for cell in cells[1:]):
            rows.append(cells)
    return table(["method", *(f"domain loss {t:.2f} ({n})" for n, t in levels.items())], rows)


def paired_table(domain: str, records: dict[str, Record], weights: Weights) -> str:
    """Every setting minus AL at the same learning rate, steps and seeds: same data in the same order."""
    rows: list[list[object]] = []
    for method in (*grid.FAMILIES, *grid.SENSITIVITY):
        for setting in grid.family(method, domain):
            pair = setting, Setting(domain, "AL", setting.lr, steps=setting.steps)
            both = [
                seed for seed in grid.SEEDS if {dataclasses.replace(s, seed=seed).key() for s in pair} <= records.keys()
            ]
            if pair[0].key() == pair[1].key() or not both:
                continue
            own, al = (analysis.point(s, records, weights, tuple(both)) for s in pair)
            _, low, high = analysis.interval(own.general - al.general, weights.general)
            differences = (spread(getattr(own, s) - getattr(al, s), 3, "+") for s in ("domain_loss", "general_loss"))
            rows.append([method, options_text(setting), *differences, f"[{low:+.3f}, {high:+.3f}]", len(both)])
    return table(["method", "setting", "domain loss − AL's", "general loss − AL's", "95 % interval", "seeds"], rows)


def prediction_table(domain: str, records: dict[str, Record], weights: Weights) -> str:
    """The general loss' rise from the base model as the second-order memory foretold it, and as it came."""
    start = analysis.point(grid.base(domain), records, weights)
    rows: list[list[object]] = []
    for record in records.values():
        training_record, setting = record["training"], Setting(**record["setting"])
        if start is None or training_record.get("predicted_rise") is None or setting.interpolate != 1:
            continue
        kappa = training_record["anchor"] / setting.memory
        rise = np.average(analysis.losses(record, "general"), weights=weights.general) - start.general_loss[0]
        foretold = kappa * training_record["predicted_rise"]
        rows.append([options_text(setting), setting.seed, f"{kappa:.1f}", f"{foretold:.3f}", f"{rise:.3f}"])
    return table(["setting", "seed", "κ", "κ·½⟨δ, Hδ⟩", "measured rise"], rows) if rows else ""


def duel_table(domain: str, records: dict[str, Record], weights: Weights) -> str:
    """DBA at its chosen setting against its rivals at the same domain loss."""
    setting = choose.choice("DBA", domain)
    own = analysis.point(setting, records, weights, (0,)) if setting else None
    if own is None:
        return "_not run yet_"
    rows: list[list[object]] = []
    for rival in RIVALS:
        general = analysis.best_matched(rival, domain, records, float(own.domain_loss.mean()), weights)
        if general is not None:
            mean, low, high = analysis.interval(own.general - general, weights.general)
            rows.append([rival, f"{mean:+.3f}", f"[{low:+.3f}, {high:+.3f}]"])
    head = f"domain loss {own.domain_loss.mean():.3f}: DBA's general loss minus the rival's"
    return table(["rival", head, "95 % interval"], rows)


def tokens(setting: Setting) -> tuple[int, int]:
    """Tokens through forward and backward: of one run, and of the collection that runs of one base model share."""
    sequences = setting.steps * training.BATCH / (1 - setting.replay)
    collection = setting.batches * training.BATCH * data.SEQUENCE if setting.needs_general() else 0
    again = collection if setting.refresh > 1 else 0
    return round(sequences * data.SEQUENCE) + again, collection


def cost_table(domain: str, records: dict[str, Record]) -> str:
    """What a method costs by construction (tokens, bytes), and the seconds its chosen run took on this machine."""
    rows: list[list[object]] = []
    for method in grid.FAMILIES:
        chosen = choose.choice(method, domain)
        if chosen is None or chosen.key() not in records:
            continue
        run, collection = tokens(chosen)
        lr = chosen.lr / grid.SHIFT.get(method, 1.0)
        searched = {s.training().key(): tokens(s.training())[0] for s in grid.family(method, domain, (lr,))}
        stored, resident = extra_bytes(chosen)
        seconds = records[chosen.key()]["training"]["seconds"]
        search = f"{sum(searched.values()):,} ({len(searched)} runs)"
        rows.append([method, f"{run:,}", f"{collection:,}", search, f"{stored:g}", f"{resident:g}", f"{seconds:.0f}"])
    header = ["method", "tokens, one run", "collection, once", "tokens, all its options at one rate",
              "stored B/param", "resident B/param", "seconds, chosen run"]  # fmt: skip
    return table(header, rows)


def search_cost(domain: str, records: dict[str, Record]) -> str:
    """One run of DBA against the search that replay needs for its ratio, at one learning rate, in tokens."""
    chosen = choose.choice("DBA", domain)
    if chosen is None or chosen.key() not in records:
        return ""
    run, collection = tokens(chosen)
    search = sum(tokens(s)[0] for s in grid.family("replay", domain, (chosen.lr,)))
    return (
        f"DBA's one run costs {run / search:.0%} of the tokens of replay's search over "
        f"{len(grid.FAMILIES['replay'])} ratios, {(run + collection) / search:.0%} with the collection."
    )


def extra_bytes(setting: Setting) -> tuple[float, float]:
    """Bytes per parameter beyond AdamW's: in a file, and in memory between steps, with every tensor in fp32."""
    stored = resident = 0.0
    if setting.boost > 0 or setting.correction != "none":
        stored, resident = 4.0, 4.0
    if setting.seed_v:
        stored += 4.0  # becomes v itself
    if setting.anchor > 0:
        resident += 4.0 if setting.metric == "uniform" else 8.0  # θ₀, and the metric
        stored += 0.0 if setting.metric == "uniform" else 4.0
    if setting.interpolate < 1:
        stored += 4.0  # θ₀, needed once, at the end
    return stored, resident


def figure(path: Path, domains: list[str], source: Path) -> None:
    """Pareto plot per domain: domain loss against general loss, one line per method over the learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {"AdamW": "C7", "AL": "k", "DBA": "C3", "replay": "C0", "WiSE-FT": "C2", "seeded v": "C1",
             "anchor, Fisher": "C4", "DBA, small boost": "C6", "memory": "C8", "memory + WiSE-FT": "C9"}  # fmt: skip
    figure, axes = pyplot.subplots(1, len(domains), figsize=(5 * len(domains), 4.2), squeeze=False)
    for axis, domain in zip(axes[0], domains, strict=True):
        records, weights = results.load(domain, source), Weights.of(domain)
        for method, colour in shown.items():
            front = frontier(method, domain, records, weights)
            if front:
                axis.plot(*zip(*front, strict=True), "o-", color=colour, label=method, markersize=3, linewidth=1)
        axis.set(xlabel=f"{domain}: held-out loss (nats)", ylabel="general: held-out loss (nats)", title=domain)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def frontier(method: str, domain: str, records: dict[str, Record], weights: Weights) -> list[tuple[float, float]]:
    """Settings of a family that no other of the family beats on both losses, by domain loss."""
    points: list[Point] = [p for s in grid.curve(method, domain) if (p := analysis.point(s, records, weights, (0,)))]
    pairs = sorted((float(p.domain_loss.mean()), float(p.general_loss.mean())) for p in points)
    kept: list[tuple[float, float]] = []
    for domain_loss, general_loss in pairs:
        if not kept or general_loss < kept[-1][1]:
            kept.append((domain_loss, general_loss))
    return kept


def write(folder: Path, source: Path = results.FOLDER) -> None:
    """``report.md`` and ``pareto.png`` in ``folder`` from the results in ``source``, and the report on the terminal."""
    present = [d for d in data.DOMAINS if results.load(d, source)]
    if not present:
        print("no results yet")
        return
    parts = ["# Small-model study\n"]
    parts += ["Chosen settings, mean ± standard deviation over seeds; general Δ is the change from the base model:\n"]
    parts += [summary_table(present, source), ""]
    for domain in present:
        records, weights = results.load(domain, source), Weights.of(domain)
        parts += [f"## {domain}: {len(records)} results\n", chosen_table(domain, records, weights), ""]
        parts += ["General loss at equal domain loss, minus AL's (best option of each family, 95 % paired interval):\n"]
        parts += [matched_table(domain, records, weights), ""]
        parts += ["The same learning rate, steps and seeds as AL (± over seeds, interval over documents):\n"]
        parts += [paired_table(domain, records, weights), "", duel_table(domain, records, weights), ""]
        parts += [prediction_table(domain, records, weights), ""]
        parts += [cost_table(domain, records), "", search_cost(domain, records), ""]
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(parts)
    (folder / "report.md").write_text(text, encoding="utf-8")
    figure(folder / "pareto.png", present, source)
    print(text)
    print(f"written: {folder / 'report.md'}, {folder / 'pareto.png'}")
