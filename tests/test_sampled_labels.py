"""``sampled_label_loss``: labels that the model draws, for the true Fisher matrix; what they depend on."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from bench.models import llama
from dba_kernels import collect_global_gradient, ops
from dba_kernels.collect import sampled_label_loss

LIKELY = torch.tensor([0.5, 0.25, 0.15, 0.1])


class Fixed(nn.Module):
    """A decoder that predicts the same distribution everywhere, and remembers the labels that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(LIKELY.log())
        self.labels: torch.Tensor | None = None

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> types.SimpleNamespace:
        logits = self.logits.expand(*input_ids.shape, -1)
        if labels is None:
            return types.SimpleNamespace(logits=logits)
        self.labels = labels
        targets = labels[:, 1:].flatten()
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=-100)
        return types.SimpleNamespace(logits=logits, loss=loss)


def ids(seed: int, rows: int = 8, length: int = 64, words: int = 4) -> torch.Tensor:
    return torch.randint(0, words, (rows, length), generator=torch.Generator().manual_seed(seed))


def drawn(input_ids: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
    model = Fixed()
    sampled_label_loss(model, {"input_ids": input_ids, **more})
    assert model.labels is not None
    return model.labels


def test_labels_are_drawn_from_the_models_distribution() -> None:
    """Frequencies of 20,000 labels are the model's probabilities within four standard errors; the data's are not."""
    labels = torch.cat([drawn(ids(seed))[:, 1:].flatten() for seed in range(40)])
    error = (LIKELY * (1 - LIKELY) / labels.numel()).sqrt()
    found = torch.bincount(labels, minlength=4) / labels.numel()
    assert ((found - LIKELY).abs() < 4 * error).all()
    own = torch.bincount(torch.cat([ids(seed)[:, 1:].flatten() for seed in range(40)]), minlength=4) / labels.numel()
    assert ((own - LIKELY).abs() > 4 * error).any()  # control


def test_the_draw_depends_on_the_batch_alone() -> None:
    """A resumed collection draws the same labels whatever came before; other text has other labels."""
    torch.manual_seed(1)
    first = drawn(ids(0))
    torch.manual_seed(2)
    torch.rand(3)
    assert torch.equal(first, drawn(ids(0))) and not torch.equal(first, drawn(ids(1)))


def test_masked_positions_stay_masked() -> None:
    """Padding and prompts draw nothing, and the number of drawn labels is returned."""
    labels = ids(0).clone()
    labels[:, :40] = -100
    batch = {"input_ids": ids(0), "labels": labels}
    _, count = sampled_label_loss(Fixed(), batch)
    assert count == 8 * 24
    assert torch.equal(drawn(**batch)[:, :40], labels[:, :40]) and (drawn(**batch)[:, 40:] >= 0).all()
    assert torch.equal(batch["labels"], labels)  # the caller's tensor is not written


def test_the_output_layers_factor_is_the_true_fishers() -> None:
    """Of logits z, E[∂z²] over the model's own labels is p (1 − p): what is collected, and with the data's is not."""
    torch.manual_seed(0)
    model = llama(vocab_size=6, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    with torch.no_grad():
        model.lm_head.weight.mul_(40.0)  # far from uniform
    batches = [{"input_ids": ids(seed, words=6), "labels": ids(seed, words=6)} for seed in range(24)]

    def diagonal(loss_fn: object) -> torch.Tensor:
        gg = collect_global_gradient(model, batches, loss_fn, format=None, curvature=6)  # type: ignore[arg-type]
        (term,) = gg.curvature("lm_head.weight").terms
        u = ops.decode(term.left.u, "reference")
        return (u * u * term.left.sigma).sum(1) + term.left.rest

    with torch.no_grad():
        p = torch.cat([model(input_ids=b["input_ids"]).logits[:, :-1].softmax(-1).flatten(0, 1) for b in batches])
    exact = (p * (1 - p)).mean(0)
    torch.testing.assert_close(diagonal(sampled_label_loss), exact, rtol=0.12, atol=0.0)
    assert ((diagonal(None) / exact - 1).abs() > 0.3).any()  # control: the data's own labels


@pytest.mark.parametrize(("batch", "message"), [({"labels": ids(0)}, "input_ids"), (ids(0), "input_ids")])
def test_a_batch_without_input_is_refused(batch: object, message: str) -> None:
    """The error says what a batch must hold."""
    with pytest.raises(ValueError, match=message):
        sampled_label_loss(Fixed(), batch)
