"""The anchor's definition: H Δ against autograd and brute force over tokens, in fp64, with negative controls."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dba_kernels.curvature import CurvatureSums
from dba_kernels.factors import Curvature, DiagonalFactor, KroneckerTerm, LowRankFactor
from dba_kernels.formats import EncodedTensor
from dba_kernels.reference import anchor

ROWS, COLS, RANK = 7, 11, 3


def random_factor(size: int, rank: int = RANK, seed: int = 0) -> LowRankFactor:
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    u = u[:, :rank].float()
    sigma = torch.rand(rank, generator=generator) + 0.5
    return LowRankFactor(EncodedTensor("fp32", tuple(u.shape), u), sigma, 0.25)


def random_curvature() -> Curvature:
    """A tied embedding's: an output map and an input map, whose left factor is diagonal."""
    frequencies = torch.rand(ROWS, generator=torch.Generator().manual_seed(5))
    terms = (
        KroneckerTerm(random_factor(ROWS, seed=1), random_factor(COLS, seed=2)),
        KroneckerTerm(DiagonalFactor(frequencies), random_factor(COLS, seed=3)),
    )
    return Curvature(terms)


def delta_of(*shape: int, seed: int = 9) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quadratic_gradient(curvature: Curvature, delta: torch.Tensor) -> torch.Tensor:
    """Autograd's derivative of ½ Σ ⟨Δ, B Δ A⟩, from dense matrices."""
    delta = delta.clone().requires_grad_()
    dense = [(anchor.dense_factor(term.left), anchor.dense_factor(term.right)) for term in curvature.terms]
    energy = torch.stack([(delta * (left @ delta @ right)).sum() for left, right in dense]).sum() / 2
    return torch.autograd.grad(energy, delta)[0]


def test_hessian_product_is_the_derivative_of_the_quadratic_form() -> None:
    """Protects eq. 11 with low-rank, isotropic and diagonal parts, and the sum over tied maps."""
    curvature, delta = random_curvature(), delta_of(ROWS, COLS)
    torch.testing.assert_close(
        anchor.hessian_product(curvature, delta), quadratic_gradient(curvature, delta), rtol=1e-12, atol=1e-13
    )


def test_swapped_factors_are_noticed() -> None:
    """Negative control: with A and B swapped the same check fails."""
    delta = delta_of(ROWS, ROWS)
    right = Curvature((KroneckerTerm(random_factor(ROWS, seed=1), random_factor(ROWS, seed=2)),))
    swapped = Curvature((KroneckerTerm(random_factor(ROWS, seed=2), random_factor(ROWS, seed=1)),))
    assert not torch.allclose(anchor.hessian_product(swapped, delta), quadratic_gradient(right, delta), rtol=1e-2)


def test_diagonal_and_identity() -> None:
    """Protects parameters of no linear map: an elementwise H, or one number for all elements."""
    delta, weights = delta_of(ROWS), torch.rand(ROWS)
    assert torch.equal(anchor.hessian_product(Curvature(diagonal=weights), delta), weights.double() * delta)
    assert torch.equal(anchor.hessian_product(Curvature(diagonal=torch.tensor(2.0)), delta), 2.0 * delta)


def test_predicted_rise_is_half_the_quadratic_form() -> None:
    """Protects ½⟨δ, Hδ⟩, by Euler's identity: the gradient of a quadratic form times δ is twice its value."""
    curvature, delta = random_curvature(), delta_of(ROWS, COLS)
    expected = 0.5 * (delta * quadratic_gradient(curvature, delta)).sum()
    torch.testing.assert_close(anchor.predicted_rise(curvature, delta), expected, rtol=1e-12, atol=0.0)


# --- the factors are those of the loss --------------------------------------------------------------------------------


class Factorial(nn.Module):
    """One linear map, and a loss whose output gradients are chosen: every input meets every output gradient, so that
    inputs and output gradients are independent and K-FAC is exact."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Linear(COLS, ROWS, bias=False, dtype=torch.float64)
        inputs, pulls = torch.randn(5, COLS, dtype=torch.float64), torch.randn(4, ROWS, dtype=torch.float64)
        self.inputs, self.pulls = inputs.repeat_interleave(4, dim=0), pulls.repeat(5, 1)  # [20, …]

    def forward(self) -> torch.Tensor:
        """The loss of every token, ``[20]``."""
        return (self.map(self.inputs) * self.pulls).sum(dim=1)


def collected(model: Factorial, targets: int | None = None) -> Curvature:
    sums = CurvatureSums(model, dict(model.named_parameters()), rank=COLS)
    handles = sums.attach()
    losses = model()
    sums.begin(len(losses) if targets is None else targets)
    losses.mean().backward()
    for handle in handles:
        handle.remove()
    return dict(sums.curvatures("fp32"))["map.weight"]


def brute_force(model: Factorial, delta: torch.Tensor) -> torch.Tensor:
    """(1/N) Σ_n ⟨g_n, Δ⟩ g_n over the tokens' own gradients."""
    grads = [torch.autograd.grad(loss, model.map.weight, retain_graph=True)[0] for loss in model()]
    return torch.stack([(g * delta).sum() * g for g in grads]).mean(dim=0)


def test_collected_curvature_is_the_fisher_matrix_where_kfac_is_exact() -> None:
    """Protects eq. 11's definition and its factor N, through the hooks, against a brute-force sum over tokens."""
    model, delta = Factorial(), delta_of(ROWS, COLS)
    product = anchor.hessian_product(collected(model), delta)
    torch.testing.assert_close(product, brute_force(model, delta), rtol=1e-5, atol=1e-6)


def test_brute_force_notices_what_is_wrong() -> None:
    """Negative controls: a missing factor N, and δ from another base, are each seen."""
    model, delta = Factorial(), delta_of(ROWS, COLS)
    expected = brute_force(model, delta)
    for curvature, displacement in (
        (collected(model, targets=1), delta),
        (collected(model), delta - 0.1 * model.map.weight.detach()),
    ):
        product = anchor.hessian_product(curvature, displacement)
        assert not torch.allclose(product, expected, rtol=1e-2, atol=1e-3)


def test_reference_factors_agree_with_the_hooks() -> None:
    """Protects the dense definition: the same A and B from it and from what hooks have summed."""
    model = Factorial()
    a, b = anchor.kronecker_factors(model.inputs, model.pulls, targets=20)
    (term,) = collected(model).terms
    torch.testing.assert_close(anchor.dense_factor(term.right), a, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(anchor.dense_factor(term.left), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("signal", "noise", "expected"),
    [(4.0, 1.0, 0.75), (1.0, 2.0, 0.0), (-1.0, 2.0, 0.0), (None, None, 1.0), (5.0, 0.0, 1.0), (0.0, 0.0, 1.0)],
)
def test_shrinkage(signal: float | None, noise: float | None, expected: float) -> None:
    """Protects eq. 13: nothing where noise hides the signal, all where there is none or nobody knows."""
    assert anchor.shrinkage(signal, noise) == expected


def test_shrinkage_is_more_careful_than_the_least_squares_factor() -> None:
    """Protects the reason for eq. 13: never above the factor that is nearest the true mean in expectation."""
    for ratio in (0.5, 1.1, 6.8, 55.0):
        assert anchor.shrinkage(ratio, 1.0) <= ratio / (1 + ratio)
