"""Every tolerance of the agreement tests, each with its reason. Other tests state their bounds where they compare."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FP32_ULP = 2.0**-23
NARROW_STEP = {torch.bfloat16: (2.0**-7, 2.0**-133), torch.float16: (2.0**-10, 2.0**-24)}
"""Spacing of the narrow dtypes: relative to the value at most, and absolute among subnormals."""
SPLIT8_STEP = {torch.bfloat16: (2.0**-15, 2.0**-141), torch.float16: (2.0**-17, 2.0**-31)}
"""Spacing of a weight with its 8-bit remainder."""
FP16_SPLIT16_FLOOR = 2.0**-39
"""Unit of fp16's 16-bit remainder at the smallest exponent: below 2**-16 the pair is coarser than fp32."""


@dataclass(frozen=True)
class Tolerance:
    """``bound`` in the unit of the entry."""

    bound: float
    reason: str


TOLERANCES = {
    "fp32": Tolerance(4, "ulps of the largest term: 2-4 roundings, fused or not; cancellation is not counted"),
    "narrow": Tolerance(1, "steps of the stored dtype: an fp32 difference may cross a rounding boundary"),
    "boundary": Tolerance(1e-3, "share of elements that an fp32 difference may push across a rounding boundary"),
    "code": Tolerance(1, "codes: a value on the boundary between two codes may take either"),
    "scale": Tolerance(8, "ulps: a scale is a maximum of fp32 results, times one constant"),
    "random": Tolerance(4 / 256, "share of elements: 4 of the 256 fp32 ulps in a unit of split8 may cross its cut"),
    "sum": Tolerance(2.0**-18, "of the sum of absolute terms: products in fp32, summed by a tree over one block"),
    "ranks": Tolerance(
        1e-4, "of the displacement: gradients summed in another order; Adam divides small ones by themselves"
    ),
    "ranks, int8": Tolerance(
        2e-3, "of the displacement: besides, a code on a boundary moves an element by some percent"
    ),
    "table": Tolerance(1e-12, "relative: float64 arithmetic in another order"),
}


def assert_fp32(
    name: str, actual: torch.Tensor, expected: torch.Tensor, largest_term: torch.Tensor, floor: float = 2.0**-126
) -> None:
    """``|actual − expected|`` within a few fp32 ulps of ``largest_term``, element by element."""
    error = (actual.double() - expected.double()).abs()
    limit = TOLERANCES["fp32"].bound * FP32_ULP * largest_term.double().abs() + floor
    _fail_where(name, error > limit, actual, expected)


def assert_narrow(
    name: str,
    actual: torch.Tensor,
    expected: torch.Tensor,
    largest_term: torch.Tensor,
    step: tuple[float, float],
    share: str = "boundary",
) -> None:
    """Equal up to one ``step`` (relative, absolute) of the stored format, and that only where rounding was close."""
    error = (actual.double() - expected.double()).abs()
    slack = TOLERANCES["fp32"].bound * FP32_ULP * largest_term.double().abs() + 2.0**-126
    relative, absolute = step
    limit = TOLERANCES["narrow"].bound * (relative * expected.double().abs() + absolute) + slack
    _fail_where(name, error > limit, actual, expected)
    _few(name, error > slack, share)


def assert_codes(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Integer codes: at most one apart, in at most 0.1 % of the elements (one element is always allowed)."""
    apart = (actual.to(torch.int32) - expected.to(torch.int32)).abs()
    _fail_where(name, apart > TOLERANCES["code"].bound, actual, expected)
    _few(name, apart > 0, "boundary")


def _few(name: str, differs: torch.Tensor, share: str) -> None:
    allowed = max(1, int(TOLERANCES[share].bound * differs.numel()))
    count = int(differs.sum())
    assert count <= allowed, f"{name}: {count} of {differs.numel()} elements differ, at most {allowed} may"


def _fail_where(name: str, wrong: torch.Tensor, actual: torch.Tensor, expected: torch.Tensor) -> None:
    wrong = wrong | (actual.isnan() ^ expected.isnan() if actual.is_floating_point() else False)
    if wrong.any():
        i = int(wrong.flatten().nonzero()[0])
        got, want = actual.flatten()[i].item(), expected.flatten()[i].item()
        counts = f"{int(wrong.sum())} of {wrong.numel()} wrong"
        raise AssertionError(f"{name}: {counts}, first at {i}: {got!r}, expected {want!r}")
