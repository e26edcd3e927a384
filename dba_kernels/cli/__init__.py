"""The command line, ``dba-kernels``: each command stands in the module, or the folder, of its name."""

from __future__ import annotations

import click

import dba_kernels

from . import cache_command, collect_command, demo, env_command, finetune_command, inspect_command, plan_command, trial
from .failures import Commands


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(dba_kernels.__version__, prog_name="dba-kernels")
def main() -> None:
    """Dynamic Boosted Annealing: fine-tune on domain data alone, boosted by one stored gradient of the general data.

    Exit status: 0 done, 1 something given cannot be used, 2 wrong usage, 130 stopped by a signal, 70 an error of this
    program, whose traceback DBA_DEBUG=1 shows.
    """


for module in (
    collect_command,
    inspect_command,
    plan_command,
    finetune_command,
    trial,
    demo,
    env_command,
    cache_command,
):
    main.add_command(module.command)
