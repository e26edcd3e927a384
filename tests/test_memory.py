"""The bytes that ``bench.memory`` counts, on a small model, and the limits by arithmetic on the demo model's shapes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from bench import memory
from bench.models import SMOLLM2_135M, llama
from dba_kernels.cli.sizes import Sizes

OURS = list(memory.OURS)


def counted(row: str, spoil: list[torch.Tensor] | None = None) -> tuple[memory.Held, Sizes]:
    before = [place for tensor in memory.alive() if (place := memory.span(tensor)) is not None]
    model = llama(vocab_size=512, hidden_size=128, intermediate_size=256, tie_word_embeddings=True).to(torch.bfloat16)
    ids = torch.arange(16)[None]
    if spoil is not None:
        spoil.append(torch.zeros(10_000))
    held = memory.measure(row, model, lambda: model(input_ids=ids, labels=ids, use_cache=False).loss, before)
    return held, sizes_of(row, model)


def sizes_of(row: str, model: torch.nn.Module) -> Sizes:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return Sizes(shapes, torch.bfloat16, curvature=memory.RANK if row.endswith("anchor") else None)


def by_shapes(row: str, sizes: Sizes) -> float:
    formats, stored = memory.OURS[row], row.split()[-1]
    param_format, state_format = formats.get("param_format", "split16"), formats.get("state_format", "fp32")
    return sizes.total(param_format, state_format, sizes.globals.get(stored, 0)) / sizes.parameters


@pytest.mark.parametrize("row", OURS)
def test_live_storages_are_what_the_shapes_say(row: str) -> None:
    """Protects the memory table: what is alive after a step is what the shapes say, and hardly more."""
    held, sizes = counted(row)
    assert held.weights == held.gradients == 2.0
    tied = 5e-3 if row.endswith("anchor") else 1e-6  # an embedding's second term, which the shapes do not tell
    assert held.total - held.other == pytest.approx(by_shapes(row, sizes), rel=tied)
    assert 0 <= held.other < 0.1  # buffers of the model, tables of the step: small, and fixed in size


def test_mixed_precision_holds_sixteen_bytes() -> None:
    """Protects the baseline: torch's mixed precision is counted with its 16 bytes."""
    held, _ = counted("torch mixed")
    assert held.total - held.other == pytest.approx(16, abs=1e-3)


def test_a_forgotten_buffer_is_counted() -> None:
    """Control: 40,000 bytes that nobody owns appear under "other"."""
    clean, sizes = counted(OURS[0])
    leaked, _ = counted(OURS[0], spoil=[])
    assert leaked.other - clean.other == pytest.approx(40_000 / sizes.parameters, rel=0.05)


def test_overlapping_views_are_counted_once() -> None:
    """Protects the count: bytes that several tensors share count once, tensors without memory not at all."""
    whole = torch.zeros(100)
    taken: list[tuple[int, int]] = []
    assert memory.covered([whole, whole[10:20], whole.view(10, 10)], taken) == 400
    assert memory.covered([whole[:5]], taken) == 0
    assert memory.covered([torch.zeros(3, device="meta")], taken) == 0


@pytest.mark.parametrize(("row", "limit"), memory.LIMITS.items())
def test_the_limits_hold_for_the_shapes_of_the_demo_model(row: str, limit: float) -> None:
    """SmolLM2-135M by its configuration alone."""
    with torch.device("meta"):
        model = llama(**SMOLLM2_135M)
    sizes = sizes_of(row, model)
    assert sizes.parameters == 134_515_008
    assert by_shapes(row, sizes) <= limit
    assert by_shapes("defaults int8", sizes) > limit  # control
