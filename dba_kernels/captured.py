"""CUDA graphs: whether one is being captured, and what it uses, which must outlive everything else.

A replay reads and writes the addresses of its capture, whatever has become of the objects that owned them. Nothing says
when a graph dies, so what a capture uses is kept for good: some kilobytes of tables, and the state that it updates.
"""

from __future__ import annotations

from typing import Any

import torch

_kept: list[Any] = []


def capturing(device: torch.device) -> bool:
    """Whether work for ``device`` is being recorded instead of being run."""
    # A build without CUDA can still hold fake CUDA tensors, and has no such question to ask.
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def keep(*used: Any) -> None:
    """Keep what the graph that is being captured uses."""
    _kept.extend(used)
