"""What hooks sum of a model's linear maps: which positions count, every kind of map, sums over parts."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from dba_kernels.curvature import CurvatureSums
from dba_kernels.factors import Curvature, DiagonalFactor
from dba_kernels.reference import anchor

from .support.linear_maps import IGNORED, WIDTH, WORDS, Batch, Tiny, batches_of, copy_of, loss_of


def make_sums(model: Tiny, rank: int = 32) -> CurvatureSums:
    return CurvatureSums(model, {n: p for n, p in model.named_parameters() if p.requires_grad}, rank)


def feed(sums: CurvatureSums, model: Tiny, batches: list[Batch], loss_fn: Callable = loss_of) -> None:
    handles = sums.attach()
    for batch in batches:
        model.zero_grad()
        loss, targets = loss_fn(model, batch)
        sums.begin(targets)
        loss.backward()
        for name, param in model.named_parameters():
            if param.grad is not None:
                sums.add_grad(name, param.grad)
        sums.end()
    for handle in handles:
        handle.remove()


def collected(model: Tiny, batches: list[Batch], **options: int) -> dict[str, Curvature]:
    sums = make_sums(model, **options)
    feed(sums, model, batches)
    return dict(sums.curvatures("fp32"))


def exact_factors(model: Tiny, batches: list[Batch], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of one map in fp64, over all batches, from autograd's gradients of the map's output."""
    model, inputs, grads, targets = copy_of(model).double(), [], [], 0
    for batch in batches:
        loss, count = loss_of(model, batch)
        x, y = model.seen[name]
        inputs.append((nn.functional.one_hot(x, WORDS).double() if name == "embed" else x.detach()).flatten(0, 1))
        grads.append(torch.autograd.grad(loss * count, y)[0].flatten(0, 1))
        targets += count
    return anchor.kronecker_factors(torch.cat(inputs), torch.cat(grads), targets)


def assert_factors(curvature: Curvature, at: int, left: torch.Tensor, right: torch.Tensor, rtol: float = 1e-4) -> None:
    term = curvature.terms[at]
    for got, want in ((anchor.dense_factor(term.left), left), (anchor.dense_factor(term.right), right)):
        torch.testing.assert_close(got, want, rtol=rtol, atol=rtol * float(want.abs().max()))


def test_every_kind_of_map() -> None:
    """Protects A and B of linear, transposed, embedding and tied maps: as many positions as have a gradient count."""
    model, batches = Tiny(), batches_of()
    found = collected(model, batches)
    a, b = exact_factors(model, batches, "up")
    assert_factors(found["up.weight"], 0, b, a)
    a, b = exact_factors(model, batches, "down")
    assert_factors(found["down.weight"], 0, a, b)
    assert len(found["embed.weight"].terms) == 2
    a, b = exact_factors(model, batches, "embed")
    assert isinstance(found["embed.weight"].terms[0].left, DiagonalFactor)
    assert_factors(found["embed.weight"], 0, a, b)
    a, b = exact_factors(model, batches, "head")
    assert_factors(found["embed.weight"], 1, b, a)


def test_frozen_parameters_have_none() -> None:
    """Protects frozen layers: they are left out, and what lies before them is seen."""
    found = collected(Tiny(), batches_of(1))
    assert "frozen.weight" not in found and "head.weight" not in found
    assert found["up.weight"].terms


def test_parameters_of_no_linear_map() -> None:
    """Protects norms, biases (elementwise) and stacked experts (their mean): N g² per micro-batch, weighed by N."""
    model, batches = Tiny(), batches_of()
    found = collected(model, batches)
    squares: dict[str, list[torch.Tensor]] = {name: [] for name in ("norm.weight", "up.bias", "experts")}
    total = 0
    exact = copy_of(model).double()
    for batch in batches:
        exact.zero_grad()
        loss, targets = loss_of(exact, batch)
        loss.backward()
        total += targets
        for name, terms in squares.items():
            terms.append((targets * exact.get_parameter(name).grad).square())
    for name, terms in squares.items():
        want = sum(terms) / total
        want = want.mean() if name == "experts" else want
        torch.testing.assert_close(found[name].diagonal.double(), want, rtol=1e-4, atol=1e-9)


def test_padding_and_prompts_do_not_count() -> None:
    """Protects masks: tokens that no target depends on change nothing, whatever they are; targets change something."""
    model, batches = Tiny(), batches_of(1)
    found = collected(model, batches)["up.weight"]
    (ids, labels) = batches[0]
    padded = ids.clone()
    padded[0, 6:], padded[1, 7] = 1, 2
    assert_factors(collected(model, [(padded, labels)])["up.weight"], 0, *map(anchor.dense_factor, factors(found)))
    changed = ids.clone()
    changed[0, 3] += 1
    with pytest.raises(AssertionError):
        assert_factors(
            collected(model, [(changed % WORDS, labels)])["up.weight"], 0, *map(anchor.dense_factor, factors(found))
        )


def factors(curvature: Curvature) -> tuple:
    return curvature.terms[0].left, curvature.terms[0].right


def test_parts_of_the_data_add_up() -> None:
    """Protects ranks and continued collections: sums of parts are the sums of the whole, to rounding."""
    model, batches = Tiny(), batches_of(5)
    whole, first, second = make_sums(model, rank=2), make_sums(model, rank=2), make_sums(model, rank=2)
    feed(whole, model, batches)
    feed(first, model, batches[:2])
    feed(second, model, batches[2:])
    for name, tensor in first.tensors().items():
        torch.testing.assert_close(tensor + second.tensors()[name], whole.tensors()[name], rtol=1e-4, atol=1e-5)


def test_sums_go_on_to_the_same_bits() -> None:
    """Protects resumption: sums copied after two batches and fed the rest are bit for bit those of one go."""
    model, batches = Tiny(), batches_of(5)
    whole, first, second = make_sums(model), make_sums(model), make_sums(model)
    feed(whole, model, batches)
    feed(first, model, batches[:2])
    for name, tensor in second.tensors().items():
        tensor.copy_(first.tensors()[name])
    feed(second, model, batches[2:])
    assert all(torch.equal(tensor, whole.tensors()[name]) for name, tensor in second.tensors().items())


def test_memory_grows_with_the_rank_alone() -> None:
    """Protects (in + out)·(r + p) numbers per map: nothing of the size in² or out²."""
    linear = nn.Linear(700, 900, bias=False)
    sums = CurvatureSums(linear, dict(linear.named_parameters()), rank=4)
    assert sum(t.numel() for t in sums.tensors().values()) == (700 + 900) * (4 + 16) + 5


def test_bf16_model() -> None:
    """Protects 16-bit models: sums stay in fp32 and are near the fp64 ones of the same weights."""
    model, batches = Tiny().bfloat16(), batches_of()
    sums = make_sums(model)
    feed(sums, model, batches)
    assert {t.dtype for t in sums.tensors().values()} <= {torch.float32, torch.float64}
    a, b = exact_factors(model, batches, "up")
    assert_factors(dict(sums.curvatures("fp32"))["up.weight"], 0, b, a, rtol=0.05)


def test_scaled_embedding() -> None:
    """Protects embeddings that multiply their output: d is the gradient of what the weight's row gives."""
    plain, scaled = nn.Embedding(WORDS, WIDTH), Gemma3TextScaledWordEmbedding(WORDS, WIDTH, 0, embed_scale=3.0)
    scaled.weight = plain.weight
    ids, products = torch.arange(8).reshape(1, 8) + 1, []
    for embedding, factor in ((plain, 3.0), (scaled, 1.0)):
        sums = CurvatureSums(embedding, dict(embedding.named_parameters()), rank=WIDTH)
        sums.attach()
        sums.begin(8)
        ((embedding(ids) * factor).sin().sum() / 8).backward()
        products.append(anchor.hessian_product(dict(sums.curvatures("fp32"))["weight"], plain.weight.detach()))
    torch.testing.assert_close(products[1], products[0], rtol=1e-4, atol=1e-5)


def test_non_finite_is_dropped_from_that_map_alone() -> None:
    """Protects the sums from one bad micro-batch: the map that saw it keeps its sums and counts the drop."""
    model, batches = Tiny(), batches_of(2)
    sums, clean = make_sums(model), make_sums(model)
    feed(clean, model, batches[:1])
    feed(sums, model, batches[:1])
    with torch.no_grad():
        model.norm.weight[0] = torch.inf
    feed(sums, model, batches[1:])
    kept, dropped = clean.maps["up.weight"][0], sums.maps["up.weight"][0]
    assert torch.equal(kept.outputs, dropped.outputs) and torch.equal(kept.inputs, dropped.inputs)
    assert float(dropped.scalars[4]) == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_every_position_once(reentrant: bool) -> None:
    """Protects recomputed forward passes: the same sums with activations kept and recomputed."""

    def recomputed(model: Tiny, batch: Batch) -> tuple[torch.Tensor, int]:
        def body(x: torch.Tensor) -> torch.Tensor:
            return model.norm(x + model.down(model.frozen(model.up(x)).tanh()))

        x = model.embed(batch[0])
        x = checkpoint(body, x, use_reentrant=reentrant) if model.recompute else body(x)
        logits = model.head(x).flatten(0, 1)
        return cross_entropy(logits, batch[1].flatten(), ignore_index=IGNORED), int((batch[1] != IGNORED).sum())

    results = []
    for recompute in (False, True):
        model = Tiny()
        model.recompute = recompute
        sums = make_sums(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            feed(sums, model, batches_of(2), recomputed)
        results.append(sums.tensors())
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-5, atol=1e-7)
