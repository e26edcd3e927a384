"""``dba-kernels demo``: a real model, fine-tuned with AdamW and with DBA side by side."""

from .comparison import command

__all__ = ["command"]
