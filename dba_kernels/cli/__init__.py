"""The command line: ``dba-kernels collect``, ``inspect``, ``plan``, ``finetune``, ``demo`` and ``env``."""

from __future__ import annotations

import click

import dba_kernels

from . import collect, demo, env, finetune, inspect, plan


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(dba_kernels.__version__, prog_name="dba-kernels")
def main() -> None:
    """Dynamic Boosted Annealing: fine-tune on domain data alone, boosted by one stored gradient of the general data."""


for module in (collect, inspect, plan, finetune, demo, env):
    main.add_command(module.command)
