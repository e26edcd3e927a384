"""``dba-kernels try``: whether a global gradient helps this model on this domain."""

from .try_command import command

__all__ = ["command"]
