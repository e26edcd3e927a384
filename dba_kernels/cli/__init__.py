"""The command line: ``dba-kernels env`` and ``dba-kernels demo``."""

from __future__ import annotations

import click

import dba_kernels

from . import demo, env


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(dba_kernels.__version__, prog_name="dba-kernels")
def main() -> None:
    """Dynamic Boosted Annealing: fine-tune on domain data alone, boosted by one stored gradient of the general data."""


main.add_command(demo.command)
main.add_command(env.command)
