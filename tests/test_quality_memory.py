"""The study's second-order memory: factors against per-token gradients, products against dense algebra, AdamW forms.

No model is trained and no data package is read here.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from bench.quality import data, memory, model
from bench.quality.memory import Anchor, Factor
from bench.quality.optimizers import GeneralStatistics, StudyAdamW
from bench.quality.setting import Setting

STEPS = 12
VOCABULARY, WIDTH = 12, 8


class Bigram(torch.nn.Module):
    """Embedding, then output layer: every position is on its own, so that per-token gradients are easy to have."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.embedding(input_ids)))


@pytest.fixture(autouse=True)
def fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact comparisons want fp32 on every machine."""
    monkeypatch.setattr(model, "autocast", lambda device: nullcontext())


def token_gradients(network: Bigram, rows: torch.Tensor, name: str) -> list[torch.Tensor]:
    """The gradient of each predicted token's own loss."""
    gradients = []
    for place in range(rows.shape[1] - 1):
        network.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(rows, False).logits[0, place], rows[0, place + 1])
        loss.backward()
        gradients.append(dict(network.named_parameters())[name].grad.clone())
    return gradients


def test_product_is_the_empirical_fisher_where_the_factors_are_independent() -> None:
    """Where every position has the same input, B Δ A is (1/N) Σ g ⟨g, Δ⟩ over the tokens' gradients g, exactly."""
    network = Bigram()
    rows = torch.tensor([[3, 3, 3, 3, 3, 7]])
    delta = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(1))
    wanted = torch.stack([g * (g * delta).sum() for g in token_gradients(network, rows, "head.weight")]).mean(0)
    terms = memory.truncated(memory.collect(network, [rows]), rank=VOCABULARY)["head.weight"]
    torch.testing.assert_close(memory.product(terms, delta), wanted, rtol=1e-4, atol=1e-6)


def test_a_tied_weight_has_the_term_of_each_use() -> None:
    """An embedding has its tokens' frequencies; the last token predicts nothing and is not among them."""
    rows = torch.tensor([[3, 3, 5, 3, 7]])
    curvature = memory.collect(Bigram(tied=True), [rows, rows])
    assert list(curvature.terms) == ["embedding.weight"]
    roles = [term["rows"].ndim for term in curvature.terms["embedding.weight"]]
    frequencies = [term["rows"] for term in curvature.terms["embedding.weight"] if term["rows"].ndim == 1]
    assert sorted(roles) == [1, 2]
    torch.testing.assert_close(frequencies[0][[3, 5, 7]], torch.tensor([0.75, 0.25, 0.0]))


def test_sampled_labels_ignore_the_data_s_own() -> None:
    """Labels drawn from the model: the factors of two texts that differ only in the last target are the same."""
    network = Bigram()
    texts = (torch.tensor([[3, 4, 5, 6]]), torch.tensor([[3, 4, 5, 9]]))
    sampled, own = ([memory.collect(network, [t], s).terms["head.weight"][0]["rows"] for t in texts] for s in (1, 0))
    torch.testing.assert_close(sampled[0], sampled[1])
    assert (own[0] - own[1]).abs().max() > 1e-3


def dense(factor: Factor, size: int) -> torch.Tensor:
    low = 0 if factor.basis is None else factor.basis @ torch.diag(factor.excess) @ factor.basis.T
    return (torch.diag(factor.rest) if factor.rest.ndim else factor.rest * torch.eye(size)) + low


@pytest.mark.parametrize("diagonal", [False, True])
def test_products_and_the_implicit_step_are_dense_algebra(diagonal) -> None:
    """B Δ A, and (I + c·H)⁻¹ Δ, against the Kronecker matrix; truncation keeps the trace."""
    generator = torch.Generator().manual_seed(0)
    b, a = (torch.randn(n, n, generator=generator) for n in (9, 12))
    b, a = b @ b.T, a @ a.T
    b = b.diagonal().clone() if diagonal else b
    left, right = Factor.truncated(b, 3), Factor.truncated(a, 4)
    dense_left, dense_right = dense(left, 9), dense(right, 12)
    torch.testing.assert_close(dense_right.trace(), a.trace())
    delta = torch.randn(9, 12, generator=generator)
    kronecker = torch.kron(dense_left, dense_right)
    wanted = (kronecker @ delta.flatten()).view_as(delta)
    torch.testing.assert_close(memory.product([(left, right)], delta), wanted, rtol=1e-4, atol=1e-3)
    solved = torch.linalg.solve(torch.eye(len(kronecker)) + 0.3 * kronecker, delta.flatten()).view_as(delta)
    torch.testing.assert_close(memory.damped([(left, right)], delta, 0.3), solved, rtol=1e-3, atol=1e-5)


def problem() -> tuple[dict[str, torch.nn.Parameter], torch.Tensor, dict[str, list]]:
    generator = torch.Generator().manual_seed(3)
    parameters = {"w": torch.nn.Parameter(torch.randn(6, 5, generator=generator))}
    target = torch.randn(6, 5, generator=generator)
    b, a = (torch.randn(n, n, generator=generator) for n in (6, 5))
    terms = {"w": [(Factor.truncated(b @ b.T, 6), Factor.truncated(a @ a.T, 5))]}
    return parameters, target, terms


def study(weight: float, every: int = 1, form: str = "gradient") -> torch.Tensor:
    parameters, target, terms = problem()
    setting = Setting("recipes", "memory", 0.05, steps=STEPS, memory=1.0, memory_form=form)
    optimizer = StudyAdamW(parameters, setting, None, Anchor(terms, parameters, weight, every))
    for _ in range(STEPS):
        (0.5 * (parameters["w"] - target).square().sum()).backward()
        optimizer.step()
    return parameters["w"].detach()


def oracle(weight: float, every: int = 1) -> torch.Tensor:
    """torch's AdamW on g_D + λ·B δ A, dense."""
    parameters, target, terms = problem()
    parameter, (left, right) = parameters["w"], terms["w"][0]
    origin, b, a = parameter.detach().clone(), dense(left, 6), dense(right, 5)
    optimizer = torch.optim.AdamW([parameter], lr=0.05, weight_decay=0.0)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / STEPS)
        pull = weight * every * b @ (parameter.detach() - origin) @ a if (step + 1) % every == 0 else 0.0
        parameter.grad = (parameter.detach() - target) + pull
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("every", [1, 4])
def test_gradient_form_is_adamw_on_the_anchored_gradient(every) -> None:
    """Eq. 10 before both moments, every k steps k times as strong; λ = 0 is AdamW, λ > 0 is another point."""
    torch.testing.assert_close(study(0.3, every), oracle(0.3, every), rtol=1e-4, atol=1e-5)
    assert (study(0.3, every) - oracle(0.0)).abs().max() > 1e-2


def test_no_weight_is_plain_adamw_in_every_form() -> None:
    """λ = 0 is no anchor whatever the form; the implicit step passes through θ − θ₀ and rounds."""
    plain = study(0.0)
    assert torch.equal(study(0.0, form="momentum"), plain)
    torch.testing.assert_close(study(0.0, form="implicit"), plain)


def test_implicit_step_is_stable_where_the_gradient_form_swings() -> None:
    """A λ far beyond 1/η: the implicit step stays beside θ₀."""
    origin = problem()[0]["w"].detach()
    assert (study(1e6, form="implicit") - origin).abs().max() < 1e-2


def test_predicted_rise_is_half_the_quadratic_form() -> None:
    """½ ⟨δ, H δ⟩ in nats."""
    parameters, _, terms = problem()
    anchor = Anchor(terms, parameters, 1.0, 1)
    delta = torch.ones(6, 5) * 0.1
    with torch.no_grad():
        parameters["w"] += delta
    left, right = terms["w"][0]
    wanted = 0.5 * (delta * (dense(left, 6) @ delta @ dense(right, 5))).sum().item()
    assert anchor.predicted_rise(parameters) == pytest.approx(wanted, rel=1e-4)


def test_shrinkage_keeps_signal_and_drops_noise() -> None:
    """s of eq. 13 per tensor: near 1 for a mean far above its noise, 0 for a mean below it."""
    batches = 50
    means = {"signal": torch.full((100,), 1.0), "noise": torch.full((100,), 0.05)}
    statistics = GeneralStatistics(
        {n: m.clone() for n, m in means.items()}, {n: m**2 + 1 for n, m in means.items()}, 10
    )
    statistics.shrink(batches)
    torch.testing.assert_close(statistics.mean["signal"], means["signal"] * (1 - 1 / (batches - 1)))
    assert statistics.mean["noise"].abs().max() == 0


def test_an_unknown_size_is_refused_by_name() -> None:
    """The variable, what it may be, what it was."""
    assert data.size("0.2M").width < data.size("4M").width
    with pytest.raises(ValueError, match=r"DBA_QUALITY_SIZE.*'7B'"):
        data.size("7B")
