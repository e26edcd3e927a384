"""``bench.native_counts``: the bytes are the formats' own, and instructions are told apart."""

from __future__ import annotations

import pytest

pytest.importorskip("pytest_benchmark")

from bench import native_counts
from bench.bench_step import OWN, Row
from dba_kernels import backends


@pytest.mark.parametrize("row", OWN, ids=lambda row: row.name)
def test_bytes_are_those_that_the_step_benchmark_states(row: Row) -> None:
    """Counted from the optimizer's own tensors, they are the figure by which bandwidths are computed."""
    if backends.why_not("native"):
        pytest.skip("the native library was not built here: no C++ compiler")
    assert native_counts.moved_bytes(native_counts.held_bytes(row)) == pytest.approx(row.bytes, rel=1e-3)


@pytest.mark.parametrize(
    ("instruction", "kind"),
    [
        ("vdivps %zmm1,%zmm2,%zmm3", "divide"),
        ("vsqrtps %zmm1,%zmm2", "root"),
        ("vrsqrt14ps %zmm1,%zmm2", "estimate"),
        ("vmovups (%rdi,%rax,4),%zmm1", "load"),
        ("vmovups %zmm1,(%rdi,%rax,4)", "store"),
        ("vmovaps %zmm1,%zmm2", "move"),
        ("vfmadd213ps %zmm1,%zmm2,%zmm3", "arithmetic"),
        ("vcvtdq2ps %zmm1,%zmm2", "convert"),
        ("add $0x40,%rax", "scalar"),
    ],
)
def test_instructions_are_told_apart(instruction: str, kind: str) -> None:
    """Divisions and roots, which bind, are not counted among the cheap ones."""
    assert native_counts.kind_of(instruction) == kind
