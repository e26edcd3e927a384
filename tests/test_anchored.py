"""The anchored step: λHδ against the definition in fp64, every backend and format against the reference, blocks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dba_kernels import anchored, ops
from dba_kernels.anchored import AnchoredTensor, AnchorStep
from dba_kernels.backends import select, use_backend
from dba_kernels.distributed import Sharding
from dba_kernels.factors import Curvature, DiagonalFactor, KroneckerTerm, LowRankFactor
from dba_kernels.formats import EncodedTensor, LowRankTensor, matrix_shape
from dba_kernels.reference import anchor, quantize, remainder
from dba_kernels.reference import step as reference
from dba_kernels.stepdata import Coefficient, TensorBatch
from dba_kernels.threads import map_on_threads

from .support.cases import Case, build, clone, pairwise_matrix
from .support.step_agreement import assert_same_param, assert_same_state, largest_terms

SHAPES = ((40, 128), (5, 205), (7, 777), (1, 63))
FLAT = ((63,), (1025,), ())
ANCHOR = 3.0
CASES = [dataclasses.replace(case, shapes=SHAPES) for case in pairwise_matrix()]


def factor(size: int, generator: torch.Generator, rank: int) -> LowRankFactor:
    rank = min(size, rank)
    u, _ = torch.linalg.qr(torch.randn(size, rank, generator=generator))
    encoded = EncodedTensor("fp32", (size, rank), u.contiguous())
    return LowRankFactor(encoded, torch.rand(rank, generator=generator) + 0.5, 0.2)


def curvature_of(shape: tuple[int, ...], generator: torch.Generator, rank: int) -> Curvature:
    """One map, a tied embedding's two, or a diagonal."""
    if len(shape) < 2:
        return Curvature(diagonal=torch.rand(shape, generator=generator))
    rows, cols = matrix_shape(shape)
    terms = [KroneckerTerm(factor(rows, generator, rank), factor(cols, generator, rank))]
    if rows % 2:
        terms.append(
            KroneckerTerm(DiagonalFactor(torch.rand(rows, generator=generator)), factor(cols, generator, rank))
        )
    return Curvature(tuple(terms))


def anchored_of(batch: TensorBatch, rank: int = 6) -> list[AnchoredTensor]:
    generator = torch.Generator().manual_seed(3)
    formats = batch.param_format, batch.state_format, batch.global_format
    found = []
    for tensors in batch.tensors:
        shape = tuple(tensors.param.shape)
        origin = (tensors.param.float() + 0.02 * torch.randn(shape, generator=generator)).to(tensors.param.dtype)
        found.append(AnchoredTensor(tensors, formats, origin, curvature_of(shape, generator, rank)))
    return found


def run(batch: TensorBatch, grads: list[torch.Tensor], table: torch.Tensor, backend: str) -> AnchorStep:
    step = AnchorStep(anchored_of(batch), Sharding(()))
    step.run(grads, table, ANCHOR, backend)
    return step


def exact_delta(whole: AnchoredTensor) -> torch.Tensor:
    tensors, kind = whole.tensors, whole.formats[0]
    value = tensors.param if kind == "native" else remainder.join(tensors.param, tensors.remainder, kind)
    return value.double() - whole.origin.double()


def boosted_by_definition(
    batch: TensorBatch, grads: list[torch.Tensor], table: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """a·g_D + λHδ by the definition, in fp64, and a table that takes it for the gradient."""
    unit = table.clone()
    unit[:, Coefficient.GRAD_WEIGHT] = 1.0
    boosted = []
    for whole, grad in zip(anchored_of(batch), grads, strict=True):
        weighted = table[whole.tensors.index, Coefficient.GRAD_WEIGHT] * grad.double()
        boosted.append(anchor.anchored_gradient(weighted, whole.curvature, exact_delta(whole), ANCHOR))
    return boosted, unit


@pytest.mark.parametrize("backend", ["triton", "native"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_backend_and_format(case: Case, backend: str) -> None:
    """Protects eq. 10 on every backend × state × parameter format: one step agrees with the reference's."""
    expected, grads, table = build(case)
    batch = clone(expected)
    boosted, unit = boosted_by_definition(expected, grads, table)
    boosted = [b.float() for b in boosted]
    terms = [largest_terms(expected, boosted, unit, i) for i in range(len(grads))]
    run(expected, grads, table, "reference")
    run(batch, grads, table, backend)
    for i, term in enumerate(terms):
        assert_same_state(batch, expected, i, term)
        assert_same_param(batch, expected, i, term["param"])


@pytest.mark.parametrize("shapes", [SHAPES, FLAT], ids=["matrices", "vectors"])
@pytest.mark.parametrize("kind", ["native", "split16", "split8", "master"])
def test_reference_step_follows_the_definition(kind: str, shapes: tuple) -> None:
    """Protects the factored product and δ of the exact parameter: the moments of the reference are the definition's."""
    dtype = torch.float32 if kind == "native" else torch.bfloat16
    batch, grads, table = build(Case(dtype, kind, "fp32", "none", torch.float32, shapes, seed=4))
    boosted, unit = boosted_by_definition(batch, grads, table)
    before = clone(batch)
    run(batch, grads, table, "reference")
    reference.step(before, [b.float() for b in boosted], unit)
    for got, want, pull in zip(batch.tensors, before.tensors, boosted, strict=True):
        largest = float(pull.abs().max()) if pull.numel() else 0.0
        torch.testing.assert_close(got.exp_avg, want.exp_avg, rtol=1e-5, atol=1e-6 * largest)


def test_a_forgotten_remainder_is_noticed() -> None:
    """Negative control: δ of the 16-bit weight alone moves the moments by more than the check above allows."""
    batch, grads, table = build(Case(torch.bfloat16, "split16", "fp32", "none", torch.float32, SHAPES, seed=4))
    boosted, unit = boosted_by_definition(batch, grads, table)
    before = clone(batch)
    for tensors in batch.tensors:
        tensors.remainder.zero_()
    run(batch, grads, table, "reference")
    reference.step(before, [b.float() for b in boosted], unit)
    got, want, pull = batch.tensors[0].exp_avg, before.tensors[0].exp_avg, boosted[0]
    assert not torch.allclose(got, want, rtol=1e-5, atol=1e-6 * float(pull.abs().max()))


@pytest.mark.parametrize("kind", ["native", "split8"])
def test_blocks_are_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects large tensors: cut into blocks of rows they end where they do whole, random rounding included."""
    dtype = torch.float32 if kind == "native" else torch.bfloat16
    whole, grads, table = build(Case(dtype, kind, "int8", "int8", torch.float32, SHAPES, seed=7))
    blocks = clone(whole)
    run(whole, grads, table, "reference")
    monkeypatch.setattr(anchored, "BLOCK", 512)
    run(blocks, grads, table, "reference")
    for i in range(len(SHAPES)):
        got, want = blocks.tensors[i], whole.tensors[i]
        torch.testing.assert_close(got.param.float(), want.param.float(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(got.exp_avg.float(), want.exp_avg.float(), rtol=0, atol=1)  # codes on a boundary
        torch.testing.assert_close(got.exp_avg_scale, want.exp_avg_scale, rtol=1e-5, atol=1e-9)


def test_low_rank_global_gradient_joins() -> None:
    """Protects ĝ_G stored low rank under an anchor: the same step as with its dense product."""
    batch, grads, table = build(Case(torch.float32, "native", "fp32", "fp32", torch.float32, SHAPES[:3], seed=8))
    low = clone(batch)
    for tensors, other in zip(batch.tensors, low.tensors, strict=True):
        stored = quantize.decode(tensors.global_grad)
        u, sigma, v = quantize.truncated_svd(stored, 3)
        u, v = (EncodedTensor("fp32", tuple(t.shape), t.contiguous()) for t in (u, v))
        other.global_grad = ops.bind(LowRankTensor(tuple(stored.shape), u, sigma, v), torch.device("cpu"))
        dense = (u.codes * sigma) @ v.codes.T
        tensors.global_grad = EncodedTensor("fp32", tuple(stored.shape), dense)
    low.global_format = "lowrank"
    run(batch, grads, table, "reference")
    run(low, grads, table, "reference")
    for got, want in zip(low.tensors, batch.tensors, strict=True):
        torch.testing.assert_close(got.exp_avg, want.exp_avg, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(got.param, want.param, rtol=1e-6, atol=1e-6)


def test_figures() -> None:
    """Protects what metrics() is made of: ‖λHδ‖² and ½⟨δ, Hδ⟩ of the weights as they are."""
    batch, _, _ = build(Case(torch.float32, "native", "fp32", "none", torch.float32, SHAPES, seed=9))
    square = energy = 0.0
    for whole in anchored_of(batch):
        delta = exact_delta(whole)
        product = anchor.hessian_product(whole.curvature, delta)
        square += float((ANCHOR * product).square().sum())
        energy += float(anchor.predicted_rise(whole.curvature, delta))
    figures = AnchorStep(anchored_of(batch), Sharding(())).figures(ANCHOR)
    assert figures == pytest.approx([square, energy], rel=1e-5)


def test_skipped_step_changes_nothing() -> None:
    """Protects skipping: with the table's flag set, an anchored step leaves every tensor as it was."""
    batch, grads, table = build(Case(torch.bfloat16, "split16", "int8", "int8", torch.bfloat16, SHAPES, seed=2))
    before = clone(batch)
    table[:, Coefficient.SKIP] = 1.0
    grads[0].fill_(torch.nan)
    run(batch, grads, table, "reference")
    for got, want in zip(batch.tensors, before.tensors, strict=True):
        assert torch.equal(got.param, want.param) and torch.equal(got.exp_avg, want.exp_avg)


@pytest.mark.parametrize("threads", [2, 3])
def test_same_bits_with_any_number_of_threads(threads: int) -> None:
    """Protects reproducibility: the products of an anchored step do not depend on the number of threads."""
    results = []
    for count in (1, threads):
        shapes = ((576, 576), (300, 1536), (3000, 576))  # the last in two blocks
        batch, grads, table = build(Case(torch.float32, "native", "fp32", "int8", torch.float32, shapes, seed=6))
        step = AnchorStep(anchored_of(batch, rank=64), Sharding(()))
        torch.set_num_threads(count)
        try:
            step.run(grads, table, ANCHOR)
        finally:
            torch.set_num_threads(1)
        results.append([t.param for t in batch.tensors] + [t.exp_avg for t in batch.tensors])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_threads_give_what_a_loop_gives() -> None:
    """Protects map_on_threads: order, the caller's backend, no gradients, one torch thread each, and errors."""
    weight = torch.ones(3, requires_grad=True)

    def ask(i: int) -> tuple[int, str, bool, int]:
        return i, select("auto", "cpu", torch.float32), (weight * i).requires_grad, torch.get_num_threads()

    def fail(i: int) -> None:
        if i == 1:
            raise ValueError("the second")

    torch.set_num_threads(2)
    try:
        with use_backend("reference"):
            found = map_on_threads(ask, range(5), torch.device("cpu"))
        with pytest.raises(ValueError, match="the second"):
            map_on_threads(fail, range(5), torch.device("cpu"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert found == [(i, "reference", False, 1) for i in range(5)]
