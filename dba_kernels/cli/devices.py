"""Which device a command runs on, and in which precision."""

from __future__ import annotations

import torch

from .output import InputError


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """bf16 where the machine has wide bf16 arithmetic (any GPU, AVX-512 CPUs); None: fp32 throughout."""
    wide = device.type != "cpu" or torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.bfloat16 if wide else None


def choose_device(name: str | None, local_rank: int) -> torch.device:
    default = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name or default)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device: expected a device that torch can use, got {name!r}: {reason}") from error
    return device
