"""``dba-kernels try``: whether a global gradient helps this model on this domain."""

from .comparison import command

__all__ = ["command"]
