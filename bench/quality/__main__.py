"""``python -m bench.quality``: run a stage of the grid, or everything, and write the report.

python -m bench.quality --core            the named core: one domain, the main methods, three seeds
python -m bench.quality --stage sweep     one stage; interrupt and repeat at will, finished runs are kept
python -m bench.quality --report          tables and figures from the results on disk
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import time
from pathlib import Path

from bench.quality.setting import Setting


def execute(name: str, settings: list[Setting], workers: int, limit: float, folder: Path) -> None:
    """Run what is still lacking of ``settings``; takes no new run after ``limit`` minutes."""
    import torch

    from bench.quality import data, grid, model, results, training

    torch.set_num_threads(workers)
    model.train_base()
    done = results.done(data.DOMAINS, model.base_digest(), folder)
    pending = grid.trainings(settings, done)
    print(f"{name}: {len(settings)} settings, {len(pending)} trainings to do", flush=True)
    if any(s.needs_general() for group in pending for s in group):
        training.base_statistics(model.load_base(), Setting("recipes", "", 0.0))  # once, before the workers share it
    began = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        queue = iter(pending)
        flying = [pool.apply_async(training.run, (group,)) for group in itertools.islice(queue, workers)]
        finished = 0
        while flying:
            ready = next((run for run in flying if run.ready()), None)
            if ready is None:
                time.sleep(0.2)
                continue
            flying.remove(ready)
            records = ready.get()
            results.append(records, folder)
            finished += 1
            spent = (time.monotonic() - began) / 60
            left = spent / finished * (len(pending) - finished)
            setting = records[0]["setting"]
            losses = " ".join(f"{side} {records[0][side]['valid_loss']:.3f}" for side in ("domain", "general"))
            print(
                f"{finished}/{len(pending)} {setting['domain']} {setting['method']} lr {setting['lr']:g}: "
                f"{losses}; {left:.0f} min left",
                flush=True,
            )
            if spent < limit and (group := next(queue, None)) is not None:
                flying.append(pool.apply_async(training.run, (group,)))


def main() -> None:
    from bench.quality import data, report, results, stages

    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__.split("\n")[0])
    parser.add_argument("--core", action="store_true", help="the named core, then the report")
    parser.add_argument("--stage", choices=("core", *stages.STAGES), help="one stage of the grid")
    parser.add_argument("--report", action="store_true", help="only write the report")
    parser.add_argument("--reach", action="store_true", help="how far from the base model the global gradient holds")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after this time")
    parser.add_argument("--output", type=Path, help="folder of results and report (default: results/ beside this file)")
    arguments = parser.parse_args()
    if arguments.reach:
        from bench.quality import reach

        print(reach.table())
        return
    # The core is there to be reproduced: it runs beside the committed results, which only choose its settings.
    folder = arguments.output or (data.cache_folder() / "core" if arguments.core else results.FOLDER)
    chosen = [arguments.stage] if arguments.stage else stages.STAGES
    if arguments.core or arguments.report:
        chosen = ["core"] if arguments.core else []
    for stage in chosen:
        execute(stage, stages.stage(stage), arguments.workers, arguments.minutes, folder)
    report.write(folder, folder)


if __name__ == "__main__":
    main()
