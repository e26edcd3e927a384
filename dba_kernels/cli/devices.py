"""Which device a command runs on, and in which precision."""

from __future__ import annotations

import torch

from .output import InputError


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """bf16 where the machine multiplies it faster than fp32: any GPU, CPUs with AVX512-BF16 or AMX; None: fp32."""
    # AVX-512 alone is not enough: torch emulates bf16 there, three times slower than fp32.
    wide = device.type != "cpu" or any(
        getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
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
