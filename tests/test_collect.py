"""Collection: the fp64 mean, untouched weights, interruptions, what is dropped, and the noise estimate."""

from __future__ import annotations

import copy
import itertools
import math
import os
import signal
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from dba_kernels import GlobalGradient
from dba_kernels.collect import GlobalGradientCollector, collect_global_gradient
from dba_kernels.sums import GradientSums, signal_and_noise
from dba_kernels.tensor_files import as_bytes

from .support.ranks import run_ranks
from .support.toy import Batch, Toy, batches_of, token_loss

ROOT = Path(__file__).resolve().parent.parent


def micro_gradients(
    model: nn.Module, batches: list, loss_fn: Callable = token_loss, train: bool = False
) -> tuple[dict[str, list[torch.Tensor]], list[int]]:
    """Every micro-batch's gradient in fp64 by autograd alone, and its number of tokens."""
    exact = copy.deepcopy(model).double().train(train)
    params = {name: p for name, p in exact.named_parameters() if p.requires_grad}
    grads: dict[str, list[torch.Tensor]] = {name: [] for name in params}
    tokens = []
    for batch in batches:
        loss, count = loss_fn(exact, batch)
        found = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        for (name, p), grad in zip(params.items(), found, strict=True):
            grads[name].append(torch.zeros_like(p) if grad is None else grad)
        tokens.append(count)
    return grads, tokens


def weighted_mean(grads: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    return sum(w * g for w, g in zip(weights, grads, strict=True)) / sum(weights)


def worst_error(gg: GlobalGradient, expected: dict[str, torch.Tensor]) -> float:
    """Largest norm-wise relative error over the tensors."""
    assert set(gg) == set(expected)
    return max(float((gg[n].double() - e).norm() / e.norm()) for n, e in expected.items())


# --- the mean ---------------------------------------------------------------------------------------------------------


def test_equals_the_fp64_mean() -> None:
    """Protects eq. 1: norm-wise within 1e-6 per tensor of the fp64 mean over tokens, with tied, frozen and sometimes
    unused parameters and a model left in training mode. The unweighted mean and dropout are both far off."""
    model, batches = Toy().train(), batches_of()
    gg = collect_global_gradient(model, batches, token_loss, "fp32")
    grads, tokens = micro_gradients(model, batches)
    assert "head.weight" not in gg and "frozen.weight" not in gg and len(set(tokens)) > 4
    assert worst_error(gg, {n: weighted_mean(g, tokens) for n, g in grads.items()}) < 1e-6
    assert gg.provenance.tokens == sum(tokens) and gg.provenance.weighting == "tokens"
    assert worst_error(gg, {n: weighted_mean(g, [1.0] * len(g)) for n, g in grads.items()}) > 1e-2
    noisy, _ = micro_gradients(model, batches, train=True)
    assert worst_error(gg, {n: weighted_mean(g, tokens) for n, g in noisy.items()}) > 1e-1


def test_batch_weighting() -> None:
    """Protects the option, and the loss function that counts nothing: both give the plain mean over micro-batches."""
    model, batches = Toy(), batches_of()
    grads, _ = micro_gradients(model, batches)
    expected = {n: weighted_mean(g, [1.0] * len(g)) for n, g in grads.items()}
    by_option = collect_global_gradient(model, batches, token_loss, "fp32", weighting="batch")
    uncounted = collect_global_gradient(model, batches, lambda m, b: token_loss(m, b)[0], "fp32")
    assert worst_error(by_option, expected) < 1e-6 and worst_error(uncounted, expected) < 1e-6
    assert by_option.provenance.weighting == uncounted.provenance.weighting == "batch"
    assert by_option.provenance.tokens > 0 and uncounted.provenance.tokens == 0


def test_many_small_gradients_do_not_stagnate() -> None:
    """Protects the exact sum: 1,000 bf16 gradients, where a bf16 running sum is off by more than 10 %."""
    model = nn.Linear(40, 110, bias=False).to(torch.bfloat16)
    g = torch.Generator().manual_seed(0)
    batches = [1 + 0.1 * torch.randn(1, 40, generator=g).bfloat16() for _ in range(1000)]
    loss_fn = lambda m, x: (m(x).sum(), 1)  # noqa: E731
    gg = collect_global_gradient(model, batches, loss_fn, "fp32")
    exact = torch.stack([x.double() for x in batches]).mean(dim=0).expand(110, 40)
    assert float((gg["weight"].double() - exact).norm() / exact.norm()) < 1e-6
    running = torch.zeros(1, 40, dtype=torch.bfloat16)
    for x in batches:
        running += x
    assert float((running.double() / 1000 - exact[:1]).norm() / exact[:1].norm()) > 0.1


def test_hugging_face_model() -> None:
    """Protects the default loss: a decoder with tied embeddings, padding and ignored labels, against its own logits
    and a hand-written mean over the target tokens; counting the first label too would be another mean."""
    pytest.importorskip("transformers")
    from bench.models import llama

    torch.manual_seed(0)
    model = llama(vocab_size=96, num_key_value_heads=2, tie_word_embeddings=True, attention_dropout=0.3)
    g = torch.Generator().manual_seed(1)
    batches = []
    for rows, length, padding in ((2, 9, 0), (3, 7, 3), (1, 12, 5), (2, 5, 2)):
        ids = torch.randint(0, 96, (rows, length), generator=g)
        mask = torch.ones_like(ids)
        if padding:
            mask[0, -padding:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})

    def by_hand(exact: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        logits = exact(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        keep = targets != -100
        picked = logits.log_softmax(dim=-1).gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
        return -(picked * keep).sum() / keep.sum(), int(keep.sum())

    gg = collect_global_gradient(model.train(), batches, format="fp32")
    grads, tokens = micro_gradients(model, batches, by_hand)
    assert gg.provenance.tokens == sum(tokens) == 16 + 15 + 6 + 6
    assert "lm_head.weight" not in gg and "model.embed_tokens.weight" in gg
    assert worst_error(gg, {n: weighted_mean(x, tokens) for n, x in grads.items()}) < 3e-6  # fp32 backward passes
    wrong = [int((b["labels"] != -100).sum()) for b in batches]
    assert worst_error(gg, {n: weighted_mean(x, wrong) for n, x in grads.items()}) > 1e-3
    gg.check_model(model.named_parameters())
    rounded = collect_global_gradient(model, batches, format="fp32", autocast_dtype=torch.bfloat16)
    errors = [float((rounded[n] - gg[n]).norm() / gg[n].norm()) for n in gg]
    assert 1e-4 < max(errors) < 0.1 and model.training


def test_formats_are_those_of_from_tensors() -> None:
    """Protects the end of the pass: a compressed collection is the compressed exact mean."""
    model, batches = Toy(), batches_of()
    exact = collect_global_gradient(model, batches, token_loss, "fp32")
    for format, rank in (("int8", None), ("int4", None), ("bf16", 5)):
        gg = collect_global_gradient(model, batches, token_loss, format, rank)
        assert gg.digest == GlobalGradient.from_tensors(dict(exact), format, rank).digest
    assert gg.digest != exact.digest


# --- the model is left alone ------------------------------------------------------------------------------------------


def test_model_is_left_as_it_was() -> None:
    """Protects the base model: weights and buffers bit for bit, each module's mode, gradients and hooks."""
    model = Toy().train()
    model.hidden.eval()
    model.embed.weight.grad = torch.full_like(model.embed.weight, 7.0)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    gg = collect_global_gradient(model, batches_of(), token_loss, "fp32")
    assert all(bytes(as_bytes(t)) == bytes(as_bytes(state[n])) for n, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(model.embed.weight.grad, torch.full_like(model.embed.weight, 7.0))
    assert gg["embed.weight"].abs().max() < 1
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters() if p.requires_grad)
    token_loss(model, batches_of()[0])[0].backward()  # in training mode, buffers do move: the comparison above sees it
    assert not torch.equal(model.norm.running_mean, state["norm.running_mean"])


def test_moving_weights_are_noticed() -> None:
    """Protects "zero learning rate": an optimizer step meanwhile is an error at the next micro-batch, or at the end."""
    for last in (False, True):
        model = Toy()
        collector = GlobalGradientCollector(model)
        with pytest.raises(RuntimeError, match=r"'hidden.weight': expected untouched weights, got 1 writes"), collector:
            for batch in batches_of(2):
                collector.backward(*token_loss(model, batch))
                if not last or collector.consumed == 2:
                    with torch.no_grad():
                        model.hidden.weight.mul_(1.0)


def test_restored_after_an_error() -> None:
    """Protects the user's session: modes, gradients and hooks come back when the loss function raises."""
    model = Toy().train()

    def broken(model: nn.Module, batch: Batch) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_global_gradient(model, batches_of(), broken)
    assert all(m.training for m in model.modules())
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters() if p.requires_grad)


def test_gradients_are_released_as_they_are_consumed() -> None:
    """Protects memory: in a deep model no two layers' gradients exist at once; plain backward keeps all of them."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(12)))
    held: list[int] = []

    def count(module: nn.Module, *_: object) -> None:
        held.append(sum(p.grad is not None for p in model.parameters()))

    for layer in model:
        layer.register_full_backward_hook(count)
    x = torch.randn(4, 16, requires_grad=True)
    collect_global_gradient(model, [x], lambda m, x: m(x).square().mean())
    assert len(held) == 12 and max(held) <= 2
    held.clear()
    model(x).square().mean().backward()
    assert max(held) >= 20


def test_sums_are_given_up_as_they_are_compressed() -> None:
    """Protects memory at the end: when the k-th mean is taken, the k − 1 sums before it are gone."""
    params = {f"{i}": torch.zeros(5, 5) for i in range(10)}
    sums = GradientSums(params)
    for i in range(10):
        sums.add(i, torch.ones(5, 5), 2.0)
    sums.commit(2.0)
    alive = [weakref.ref(total) for total in sums.totals]
    for k, (name, mean) in enumerate(sums.means({})):
        assert name == f"{k}" and torch.equal(mean, torch.ones(5, 5))
        del mean
        assert sum(ref() is not None for ref in alive) == 10 - k


# --- what is dropped --------------------------------------------------------------------------------------------------


class Fragile(nn.Module):
    """``gate`` has an infinite gradient, with a finite loss, wherever its input is 0."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(8, 8)
        self.gate = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor, gate_input: torch.Tensor) -> torch.Tensor:
        return self.body(x).square().mean() + (gate_input * self.gate).sqrt().mean()


def fragile_batches() -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    g = torch.Generator().manual_seed(0)
    batches = [(torch.randn(4, 8, generator=g), torch.rand(8, generator=g) + 0.1, 2 + i) for i in range(6)]
    batches[1][0][2, 3] = math.nan  # the loss
    batches[3][1][5] = 0.0  # the gradient of gate alone
    batches[4][0][0, 0] = math.inf
    return batches


def test_non_finite_losses_and_gradients_are_dropped() -> None:
    """Protects the mean: a bad loss costs the micro-batch, a bad gradient that tensor alone, weights included; both are
    counted and warned about. Keeping the dropped weight in the divisor would be off by a third."""
    loss_fn = lambda m, b: (m(b[0], b[1]), b[2])  # noqa: E731
    batches = fragile_batches()
    with pytest.warns(UserWarning, match=r"left out 2 of 6 .* non-finite gradients of 1 tensors .*'gate': 1 times"):
        gg = collect_global_gradient(Fragile(), batches, loss_fn, "fp32")
    grads, tokens = micro_gradients(Fragile(), [(b[0].double(), b[1].double(), b[2]) for b in batches], loss_fn)
    body, gate = [0, 2, 3, 5], [0, 2, 5]
    pick = lambda name, keep: [grads[name][i] for i in keep]  # noqa: E731
    expected = {n: weighted_mean(pick(n, body), [tokens[i] for i in body]) for n in ("body.weight", "body.bias")}
    expected["gate"] = weighted_mean(pick("gate", gate), [tokens[i] for i in gate])
    assert worst_error(gg, expected) < 1e-6
    wrong = expected["gate"] * sum(tokens[i] for i in gate) / sum(tokens[i] for i in body)
    assert float((gg["gate"] - wrong).norm() / wrong.norm()) > 0.3
    assert (gg.provenance.dropped_batches, gg.provenance.batches, gg.provenance.tokens) == (2, 4, 2 + 4 + 5 + 7)
    assert {n: r.dropped for n, r in gg.records.items()} == {"gate": 1, "body.weight": 0, "body.bias": 0}


def test_nothing_usable_is_an_error() -> None:
    """Protects against an empty or useless result; each error says what was seen."""
    model = Toy()
    with pytest.raises(ValueError, match=r"batches: expected at least one .* got 0: 0 empty, 0 not finite"):
        collect_global_gradient(model, [], token_loss)
    with pytest.raises(ValueError, match=r"got 2: 2 empty, 0 not finite"):
        collect_global_gradient(model, [1, 2], lambda m, b: (m.embed.weight.sum() * math.nan, 0))
    with pytest.raises(ValueError, match=r"got 3: 0 empty, 3 not finite; check the data and the loss"):
        collect_global_gradient(model, [1, 2, 3], lambda m, b: m.embed.weight.sum() * math.nan)
    bad_gate = [(torch.ones(4, 8), torch.zeros(8), 1)]
    with pytest.raises(ValueError, match=r"parameter 'gate': expected a finite gradient, got none; freeze it"):
        collect_global_gradient(Fragile(), bad_gate, lambda m, b: (m(b[0], b[1]), b[2]))


def test_bad_arguments() -> None:
    """Protects the call; one error each, before any batch is read."""

    def unread() -> Iterator[Batch]:
        raise AssertionError("a batch was read")
        yield

    model = Toy()
    for options, message in (
        ({"format": "int3"}, r"format: expected one of .* got 'int3'"),
        ({"rank": 49}, r"rank: expected .* got 49; the largest rank that saves bytes is 47, for 'hidden.weight'"),
        ({"weighting": "sum"}, "weighting: expected one of 'tokens', 'batch'; got 'sum'"),
        ({"snapshot_every": 0}, "snapshot_every: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            collect_global_gradient(model, unread(), token_loss, **options)
    with pytest.raises(ValueError, match="expected parameters that require gradients, got none; unfreeze"):
        collect_global_gradient(Toy().requires_grad_(False), unread(), token_loss)
    with pytest.raises(ValueError, match=r"got \['input_ids'\]; add labels, or give loss_fn"):
        collect_global_gradient(model, [{"input_ids": torch.ones(1, 2)}])
    with pytest.raises(ValueError, match="got Tensor; add labels, or give loss_fn"):
        collect_global_gradient(model, [torch.ones(2)])
    with pytest.raises(ValueError, match="tokens: expected a number for every micro-batch or for none"):
        mixed = lambda m, b: token_loss(m, b) if len(b[0]) % 2 else token_loss(m, b)[0]  # noqa: E731
        collect_global_gradient(model, batches_of(), mixed)
    with pytest.raises(ValueError, match="tokens: expected at least 0, got -3"):
        collect_global_gradient(model, batches_of(), lambda m, b: (token_loss(m, b)[0], -3))


def test_misuse_in_a_loop_of_ones_own() -> None:
    """Protects the collector: backward elsewhere, twice or half-way, a batch left out, and use after the end."""
    model, batches = Toy(), batches_of(3)
    collector = GlobalGradientCollector(model)
    with pytest.raises(RuntimeError, match="expected to be called within 'with collector:'"):
        collector.backward(*token_loss(model, batches[0]))
    with collector:
        with pytest.raises(RuntimeError, match=r"expected collector.backward\(loss\), got another backward"):
            token_loss(model, batches[0])[0].backward()
        with pytest.raises(RuntimeError, match=r"batch 0: expected one call of backward\(\), got 0"):
            for _ in collector.remaining(batches):
                pass
        collector.backward(*token_loss(model, batches[0]))
    collector.finish()
    with pytest.raises(RuntimeError, match="the collector is finished"):
        collector.finish()
    broken = GlobalGradientCollector(model)
    with broken:
        with pytest.raises(ValueError, match="loss: expected one that depends on the model's parameters"):
            broken.backward(torch.ones(()))
        loss, tokens = token_loss(model, batches[0])
        loss.register_hook(lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            broken.backward(loss, tokens)
        with pytest.raises(RuntimeError, match="failed half-way; make a new collector"):
            broken.backward(*token_loss(model, batches[0]))


def test_partial_gradients_are_refused() -> None:
    """Protects ‖g_i‖²: reentrant checkpointing gives a shared weight its gradient in pieces, and is refused; the
    other kind collects the same gradient as no checkpointing."""
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 8), torch.randn(4, 8, requires_grad=True)

    def twice(reentrant: bool | None) -> Callable:
        def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
            for _ in range(2):
                x = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
            return x.square().mean()

        return loss_fn

    plain = collect_global_gradient(layer, [x], twice(None), "fp32")
    assert torch.equal(collect_global_gradient(layer, [x], twice(False), "fp32")["weight"], plain["weight"])
    with pytest.raises(RuntimeError, match=r"expected one complete gradient .* use_reentrant=False"):
        collect_global_gradient(layer, [x], twice(True))


# --- noise ------------------------------------------------------------------------------------------------------------


def test_noise_estimate_is_unbiased() -> None:
    """Protects the derivation: over 20,000 draws with unequal weights and noises, the means of both estimates are the
    true values within four standard errors; ‖ĝ‖² itself, the naive signal, misses by dozens."""
    g = torch.Generator().manual_seed(0)
    mu = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, 5.0, 3.0, 1.0], dtype=torch.float64)
    deviations = torch.tensor([1.0, 0.2, 0.7, 2.0, 0.1], dtype=torch.float64)
    draws = 20_000
    noise = torch.randn(draws, 5, 3, generator=g, dtype=torch.float64) * deviations[:, None]
    gradients = mu + noise
    means_sq = ((weights[:, None] * gradients).sum(dim=1) / weights.sum()).square().sum(dim=1)
    weighted = (weights**2 * gradients.square().sum(dim=2)).sum(dim=1)
    total, total_sq = float(weights.sum()), float(weights.square().sum())
    estimates = torch.tensor(
        [signal_and_noise(m, total, total_sq, q) for m, q in zip(means_sq.tolist(), weighted.tolist(), strict=True)]
    )
    truth = torch.stack((mu.square().sum(), (weights**2 * 3 * deviations**2).sum() / total**2))
    standard_error = estimates.double().std(dim=0) / draws**0.5
    assert ((estimates.double().mean(dim=0) - truth).abs() < 4 * standard_error).all()
    assert means_sq.mean() - truth[0] > 24 * means_sq.std() / draws**0.5
    assert signal_and_noise(4.0, 7.0, 49.0, 4.0 * 49) == (None, None)  # one micro-batch


def test_noise_estimate_with_token_weights() -> None:
    """Protects the weights in the estimate: the collector's signal is the weighted mean inner product of different
    micro-batches' gradients, and signal + noise = ‖ĝ‖²; with the weights left out it is another number."""
    model, batches = Toy(), batches_of()
    gg = collect_global_gradient(model, batches, token_loss, "fp32")
    grads, tokens = micro_gradients(model, batches)

    def mean_of_pairs(products: torch.Tensor, weights: torch.Tensor) -> float:
        pairs = torch.outer(weights, weights).fill_diagonal_(0)
        return float((products * pairs).sum() / pairs.sum())

    for name, record in gg.records.items():
        stacked = torch.stack(grads[name]).flatten(1)
        signal = mean_of_pairs(stacked @ stacked.T, torch.tensor(tokens, dtype=torch.float64))
        tolerance = 1e-5 * record.squared_norm
        assert record.signal == pytest.approx(signal, abs=tolerance)
        assert record.signal + record.noise == pytest.approx(record.squared_norm, abs=tolerance)
        unweighted = mean_of_pairs(stacked @ stacked.T, torch.ones(len(tokens), dtype=torch.float64))
        assert abs(record.signal - unweighted) > 100 * tolerance


def test_noise_estimate_agrees_with_split_halves() -> None:
    """Protects the estimate in the file against 400 random splits of the data. Inner products over squared norms of the
    halves agree to 0.02; so does the mean cosine of matrices (a bias of 12 elements is too short: its mean of ratios is
    not the ratio of means). The cosine that ‖ĝ‖² against the mean ‖g_i‖² would suggest does not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 12))
    target = torch.randn(12, 12)
    g = torch.Generator().manual_seed(1)
    inputs = [torch.randn(4, 12, generator=g) for _ in range(64)]
    loss_fn = lambda m, x: (m(x) - x @ target.to(x.dtype)).square().mean()  # noqa: E731
    gg = collect_global_gradient(model, inputs, loss_fn, "fp32")
    grads, _ = micro_gradients(model, [x.double() for x in inputs], lambda m, x: (loss_fn(m, x), 1))
    for name, record in gg.records.items():
        stacked = torch.stack(grads[name]).flatten(1)
        dots, norms, cosines = [], [], []
        for _ in range(400):
            order = torch.randperm(64, generator=g)
            first, second = stacked[order[:32]].mean(dim=0), stacked[order[32:]].mean(dim=0)
            dots.append(float(first @ second))
            norms.append(float(first @ first + second @ second) / 2)
            cosines.append(float(nn.functional.cosine_similarity(first, second, dim=0)))
        measured = sum(dots) / sum(norms)
        assert 0.2 < measured < 0.97  # neither noise nor signal alone
        assert record.split_half_cosine == pytest.approx(measured, abs=0.02)
        if name.endswith("weight"):
            assert record.split_half_cosine == pytest.approx(sum(cosines) / len(cosines), abs=0.02)
        naive = record.squared_norm / float(stacked.square().sum(dim=1).mean())
        assert abs(naive - measured) > 0.2
    total = sum(r.signal for r in gg.records.values()) / sum(r.noise for r in gg.records.values())
    assert gg.signal_to_noise == pytest.approx(total, rel=1e-12)


# --- interruptions ----------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from tests.support.toy import Toy, batches_of, token_loss
from dba_kernels.collect import collect_global_gradient
how, snapshot = sys.argv[1:]
sync = os.fsync
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
def batches():
    for i, batch in enumerate(batches_of()):
        if i == 5 and how == "between":
            kill()
        if i == 5 and how == "writing":
            os.fsync = kill  # the snapshot after batch 6 is half made
        yield batch
collect_global_gradient(Toy(), batches(), token_loss, "int8", data="toy", snapshot_path=snapshot, snapshot_every=2)
"""


@pytest.mark.parametrize("how", ["between", "writing"])
def test_killed_and_resumed(tmp_path: Path, how: str) -> None:
    """Protects hours of collection: SIGKILL between batches or while a snapshot is written, then the same call again,
    also from an iterator, gives the same file byte for byte; other data give another file and are refused on resume."""
    snapshot = tmp_path / "snapshot.safetensors"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, how, str(snapshot)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert snapshot.exists()
    with pytest.raises(ValueError, match="expected the 4 batches of the interrupted collection, got others"):
        collect_global_gradient(Toy(), batches_of(seed=1), token_loss, data="toy", snapshot_path=snapshot)
    seen = []
    model = Toy()
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    options = {"data": "toy", "snapshot_path": snapshot, "snapshot_every": 2}
    resumed = collect_global_gradient(model, iter(batches_of()), token_loss, "int8", **options)
    assert len(seen) == 4  # of 8
    whole = collect_global_gradient(Toy(), batches_of(), token_loss, "int8", data="toy")
    other = collect_global_gradient(Toy(), batches_of(seed=1), token_loss, "int8", data="toy")
    content = [gg.save(tmp_path / f"{i}.safetensors").read_bytes() for i, gg in enumerate((resumed, whole, other))]
    assert content[0] == content[1] != content[2]
    assert [p.name for p in tmp_path.glob(".*")] == []  # what the killed writer left


def test_snapshots_of_something_else_are_refused(tmp_path: Path) -> None:
    """Protects against continuing another collection: model, settings, fewer data, and damage."""
    path = tmp_path / "snapshot.safetensors"
    options = {"snapshot_path": path, "snapshot_every": 3}
    collect_global_gradient(Toy(), batches_of(), token_loss, **options)
    for model, changed, message in (
        (Toy(seed=1), {}, "got another fingerprint; delete it, or choose another snapshot_path"),
        (Toy(), {"weighting": "batch"}, "got another weighting"),
        (Toy(), {"data": "other"}, "got another data"),
        (nn.Linear(3, 3), {}, "got another parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            collect_global_gradient(model, batches_of(), token_loss, **options, **changed)
    with pytest.raises(ValueError, match="expected at least the 8 batches of the interrupted collection, got fewer"):
        collect_global_gradient(Toy(), batches_of(4), token_loss, **options)
    gradient = tmp_path / "gg.safetensors"
    collect_global_gradient(Toy(), batches_of(), token_loss, **options).save(gradient)
    with pytest.raises(ValueError, match="expected a snapshot of this collection, got another kind"):
        collect_global_gradient(Toy(), batches_of(), token_loss, snapshot_path=gradient)
    content = bytearray(path.read_bytes())
    content[-100] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"the sum '.*' is corrupt; delete the snapshot and start again"):
        collect_global_gradient(Toy(), batches_of(), token_loss, **options)
    content[-100] ^= 4
    path.write_bytes(content)
    more = collect_global_gradient(Toy(), batches_of(11), token_loss, "fp32", **options)  # more data: goes on
    assert more.digest == collect_global_gradient(Toy(), batches_of(11), token_loss, "fp32").digest


def test_interrupted_in_process(tmp_path: Path) -> None:
    """Protects Ctrl-C and out-of-memory: an exception in a batch, and the next call goes on from the last snapshot."""
    options = {"snapshot_path": tmp_path / "snapshot.safetensors", "snapshot_every": 1}
    whole = collect_global_gradient(Toy(), batches_of(), token_loss, "fp32")
    countdown = itertools.count()

    def interrupted(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, int]:
        if next(countdown) % 3 == 2:
            raise KeyboardInterrupt
        return token_loss(model, batch)

    attempts = 0
    while True:
        attempts += 1
        try:
            gg = collect_global_gradient(Toy(), batches_of(), interrupted, "fp32", **options)
            break
        except KeyboardInterrupt:
            continue
    assert attempts == 4 and gg.digest == whole.digest and gg.records == whole.records


# --- ranks ------------------------------------------------------------------------------------------------------------


def half(rank: int, world: int, folder: Path) -> None:
    gg = collect_global_gradient(Toy(), batches_of()[rank::world], token_loss, "fp32", group=dist.group.WORLD)
    gg.save(folder / f"rank{rank}.safetensors")


def test_ranks_accumulate_and_reduce_once(tmp_path: Path) -> None:
    """Protects linearity: two processes with half the data each hold the same file, which is the whole collection's
    mean, counts and noise estimate; one rank's own half is not."""
    run_ranks(half, 2, tmp_path)
    first, second = (tmp_path / f"rank{r}.safetensors" for r in (0, 1))
    assert first.read_bytes() == second.read_bytes()
    gg, whole = GlobalGradient.load(first), collect_global_gradient(Toy(), batches_of(), token_loss, "fp32")
    assert worst_error(gg, {n: whole[n].double() for n in whole}) < 1e-6
    assert (gg.provenance.batches, gg.provenance.tokens) == (8, whole.provenance.tokens)
    for name, record in gg.records.items():
        assert record.signal == pytest.approx(whole.records[name].signal, rel=1e-4)
        assert record.noise == pytest.approx(whole.records[name].noise, rel=1e-4)
    one_half = collect_global_gradient(Toy(), batches_of()[::2], token_loss, "fp32")
    assert worst_error(one_half, {n: whole[n].double() for n in whole}) > 1e-2


def test_reduce_alone_is_nothing() -> None:
    """Protects the single process: reduce() without a process group changes nothing, and DDP is refused with a fix."""
    model, batches = Toy(), batches_of(3)
    collector = GlobalGradientCollector(model)
    with collector:
        for batch in collector.remaining(batches):
            collector.backward(*token_loss(model, batch))
    collector.reduce()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gg = collector.finish("fp32")
    assert gg.digest == collect_global_gradient(model, batches, token_loss, "fp32").digest
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    with pytest.raises(ValueError, match=r"expected the bare model, got DistributedDataParallel; pass model\.module"):
        GlobalGradientCollector(wrapped)
