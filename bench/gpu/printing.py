"""The report as text, short enough for a terminal that keeps the last few thousand characters."""

from __future__ import annotations

from typing import Any

SHOWN = 12
"""Failures of a section that are printed; the file has all of them."""


def print_section(name: str, found: dict[str, Any]) -> None:
    """One line when a section has ended."""
    if found["status"] == "not run":
        print(f"{name:12} not run: {found['why']}", flush=True)
        return
    counts = f"{found['checked']} checks, {len(found['failures'])} failed"
    skipped = f", {len(found['skipped'])} skipped" if found["skipped"] else ""
    accidents = f"; {'; '.join(found['accidents'])}" if "accidents" in found else ""
    print(f"{name:12} {found['status']} in {found['seconds']:.0f} s: {counts}{skipped}{accidents}", flush=True)


def print_summary(report: dict[str, Any]) -> int:
    """Tables of figures, then everything that failed; returns how much that is."""
    sections = report["sections"]
    if not report["simulated"]:
        print_bandwidths(sections.get("speed", {}).get("figures", {}))
        print_steps(sections.get("steps", {}).get("figures", {}) | sections.get("peers", {}).get("figures", {}))
        print_choices(sections.get("what if", {}).get("figures", {}))
        for name, figures in sections.get("quiet", {}).get("figures", {}).items():
            print(f"{name}: {figures}")
    else:
        print("simulated: every section ran, its times are not shown")
    failed = 0
    for name, found in sections.items():
        failures = found.get("failures", {})
        failed += len(failures) + (found["status"] == "not run")
        for check, why in list(failures.items())[:SHOWN]:
            print(f"FAILED {name}: {check}: {why[:300]}")
        if len(failures) > SHOWN:
            print(f"FAILED {name}: and {len(failures) - SHOWN} more")
    return failed


def print_bandwidths(figures: dict[str, dict[str, Any]]) -> None:
    copy = figures.get("copy", {}).get("GB/s")
    print(f"\n{'kernel, 67 M elements':60} {'us/M':>7} {'GB/s':>6} {'% copy':>6}  predicted")
    for name, row in figures.items():
        share = f"{100 * row['GB/s'] / copy:6.0f}" if copy else ""
        time = f"{row['us per M']:7.2f}" if "us per M" in row else f"{'':7}"
        predicted = "; ".join(f"{gpu} {text}" for gpu, text in row.get("predicted", {}).items())
        print(f"{name[:60]:60} {time} {row['GB/s']:6.0f} {share}  {predicted}")


def print_steps(figures: dict[str, dict[str, float]]) -> None:
    print(f"\n{'optimizer step, microseconds':72} {'host':>7} {'device':>8} {'graph':>8} {'GB/s':>6}")
    for name, row in figures.items():
        cells = [f"{row[key]:8.1f}" if key in row else f"{'':8}" for key in ("device us", "graph us")]
        rate = f"{row['GB/s']:6.0f}" if "GB/s" in row else ""
        print(f"{name[:72]:72} {row['host us']:7.1f} {' '.join(cells)} {rate}")


def print_choices(figures: dict[str, dict[str, Any]]) -> None:
    print("\nother choices, us per million parameters")
    for name, row in figures.items():
        cells = [f"{value:.2f}" if isinstance(value, float) else str(value)[:40] for value in row.values()]
        print(f"{name[:30]:30} {'  '.join(cells)}")
    if figures:
        print(f"{'(in the order of)':30} {'; '.join(next(iter(figures.values())))}")
