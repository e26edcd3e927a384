"""``python -m bench.regime``: run a stage of the study, or everything, and write the report.

python -m bench.regime --core             one model, two domains, the main methods, one seed
python -m bench.regime --stage rates      one stage; interrupt and repeat at will, finished runs are kept
python -m bench.regime --report           tables and figure from the committed results
"""

from __future__ import annotations

import time
from pathlib import Path

import click

from bench import jsonl
from bench.regime import analysis, grid, report


def execute(name: str, path: Path, minutes: float, accuracy: bool) -> None:
    """Run what is still missing of a stage; starts no new run after ``minutes``."""
    from bench.regime.training import Study

    studies: dict[str, Study] = {}
    records = analysis.load(path)
    settings = grid.stage(name, records)
    pending = grid.trainings(settings, records)
    click.echo(f"{name}: {len(settings)} settings, {len(pending)} trainings to do")
    began = time.monotonic()
    for count, group in enumerate(pending, 1):
        if (time.monotonic() - began) / 60 > minutes:
            break
        model = group[0].model
        if model not in studies:
            studies = {model: Study(model)}  # one model in memory at a time
        for record in studies[model].run(group, accuracy):
            jsonl.append(path, record)
            setting = record["setting"]
            both = f"domain {analysis.domain_loss(record):.3f}, general {analysis.general_loss(record):.3f}"
            left = (time.monotonic() - began) / 60 / count * (len(pending) - count)
            click.echo(
                f"{count}/{len(pending)} {setting['domain']}, {setting['method']}, lr {setting['lr']:g}, "
                f"seed {setting['seed']}: {both}; {left:.0f} min left"
            )


@click.command(help=(__doc__ or "").split("\n")[0])
@click.option("--core", is_flag=True, help="Two domains, the main methods, one rate and seed, losses only.")
@click.option("--stage", "chosen", type=click.Choice(grid.STAGES), help="One stage of the grid.")
@click.option("--report", "only_report", is_flag=True, help="Only write the report.")
@click.option("--minutes", default=float("inf"), help="Start no run after this time.")
@click.option("--accuracy/--no-accuracy", default=True, show_default=True, help="Also choose among options (slower).")
@click.option("--output", type=click.Path(path_type=Path), default=analysis.RESULTS, help="Results, as JSON lines.")
def main(core: bool, chosen: str | None, only_report: bool, minutes: float, accuracy: bool, output: Path) -> None:
    stages = ("core",) if core else (chosen,) if chosen else () if only_report else grid.STAGES
    for stage in stages:
        execute(stage, output, minutes, accuracy and not core)
    report.write(output)


if __name__ == "__main__":
    main()
