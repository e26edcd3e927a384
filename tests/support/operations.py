"""Counts what torch is asked to do."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class CountedOperations(TorchDispatchMode):
    """Every torch operation that runs inside: allocations, copies, reads back to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace not in ("profiler", "prim"):  # marks of torch.optim's own, and questions for metadata
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))
