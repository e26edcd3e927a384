"""The one-pass sketch against the dense eigen-decomposition: flat, decaying and rank-deficient spectra, and sums."""

from __future__ import annotations

import pytest
import torch

from dba_kernels.sketch import OVERSAMPLING, eigenpairs, project, signs, with_rest

SIZE, RANK = 200, 24
SPECTRA = {
    "flat": torch.ones(SIZE, dtype=torch.float64),
    "fast": 0.8 ** torch.arange(SIZE, dtype=torch.float64),
    "slow": (1 + torch.arange(SIZE, dtype=torch.float64)).reciprocal(),
    "deficient": (torch.arange(SIZE) < 10).double(),
    "empty": torch.zeros(SIZE, dtype=torch.float64),
}
CPU = torch.device("cpu")


def samples(spectrum: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Vectors ``[n, n]`` whose sum of x xᵀ has exactly this spectrum."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))
    mixing, _ = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))
    return mixing @ (spectrum.sqrt().unsqueeze(1) * basis.T)


def sketched(x: torch.Tensor) -> torch.Tensor:
    return (x.T @ project(x, RANK + OVERSAMPLING)).float()


@pytest.mark.parametrize("name", SPECTRA)
def test_error_within_the_theorem(name: str) -> None:
    """Protects the approximation: trace-norm error at most (1 + r/(p−1)) times the best rank-r error, with rounding."""
    spectrum = SPECTRA[name]
    x = samples(spectrum)
    u, values = eigenpairs(sketched(x), RANK, float(spectrum.sum()))
    error = torch.linalg.svdvals(x.T @ x - (u * values) @ u.T).sum()
    bound = (1 + RANK / (OVERSAMPLING - 1)) * spectrum[RANK:].sum() + 1e-5 * spectrum.sum()
    assert error <= bound


@pytest.mark.parametrize("name", SPECTRA)
def test_trace_is_kept_and_nothing_is_negative(name: str) -> None:
    """Protects eq. 12: rank r and the isotropic rest have the trace of the whole, and all eigenvalues are ≥ 0."""
    spectrum = SPECTRA[name]
    u, values = eigenpairs(sketched(samples(spectrum)), RANK, float(spectrum.sum()))
    sigma, rest = with_rest(values, SIZE, float(spectrum.sum()))
    assert float(sigma.sum()) + SIZE * rest == pytest.approx(float(spectrum.sum()), rel=1e-5, abs=1e-12)
    assert rest >= 0 and float((sigma + rest).min()) >= -1e-12
    filled = u[:, values > 0]
    torch.testing.assert_close(filled.T @ filled, torch.eye(filled.shape[1], dtype=u.dtype), rtol=0, atol=1e-9)


def test_a_wrong_projection_is_noticed() -> None:
    """Negative control: a sketch made with other signs breaks the bound that the right ones keep."""
    spectrum = SPECTRA["fast"]
    x = samples(spectrum)
    wrong = (x.T @ (x @ signs(SIZE, RANK + OVERSAMPLING, CPU, x.dtype).flip(0))).float()
    u, values = eigenpairs(wrong, RANK, float(spectrum.sum()))
    error = torch.linalg.svdvals(x.T @ x - (u * values) @ u.T).sum()
    assert error > 0.1 * spectrum.sum()


def test_sketches_add_up() -> None:
    """Protects linearity, which batches, ranks and continued collections rely on."""
    x = samples(SPECTRA["slow"])
    whole = x.T @ project(x, RANK)
    parts = sum(part.T @ project(part, RANK) for part in x.split(37))
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-13)


def test_signs_are_fixed() -> None:
    """Protects files collected in parts on several machines: the same signs whatever size is asked for, known bits."""
    omega = signs(5000, 40, CPU)
    assert torch.equal(omega[:3, :8], signs(3, 40, CPU)[:, :8])
    assert set(omega.unique().tolist()) == {-1.0, 1.0}
    bits = (omega[:4, :16] > 0).long() @ (2 ** torch.arange(16))
    assert bits.tolist() == [27798, 7522, 14471, 38349]


def test_signs_are_as_good_as_random() -> None:
    """Protects the theorem's assumption: rows and columns are balanced and uncorrelated, as random signs are."""
    omega = signs(4096, 80, CPU)
    gram = omega.T @ omega / 4096
    assert (gram - torch.eye(80)).abs().max() < 0.09  # 5.8 standard deviations of 3,160 pairs
    assert omega.mean(dim=0).abs().max() < 0.09
    neighbours = (omega[1:] * omega[:-1]).mean(dim=0)
    assert neighbours.abs().max() < 0.09
