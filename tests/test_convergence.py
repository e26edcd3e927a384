"""``bench.convergence``: what the storage of bf16 weights costs in training, and its negative control."""

from __future__ import annotations

import pytest
import torch

from bench import convergence
from bench.models import llama


@pytest.fixture(scope="module")
def final_losses() -> dict[str, float]:
    """Loss of a tiny model after 60 steps on one batch that it can learn by heart, for the rows of this library."""
    torch.manual_seed(0)
    network = llama()
    tokens = torch.randint(0, network.config.vocab_size, (8, 16), generator=torch.Generator().manual_seed(0))
    result = {}
    for name, (dtype, make) in convergence.ROWS.items():
        if "AdamW8bit" not in name:
            stored = convergence.train(network, dtype, make, convergence.next_token_loss, [tokens] * 60)
            assert all(p.dtype == dtype for p in stored.values())
            with torch.no_grad():
                loss = convergence.next_token_loss(convergence.forward(network, stored), tokens)
            result[name] = loss.item()
    return result


def test_split_weights_train_as_fp32_weights_do(final_losses: dict[str, float]) -> None:
    """bf16 weights with remainders reach fp32's loss; without them (the control) they end further from it."""
    fp32, split16, split8, native = final_losses.values()
    assert abs(split16 - fp32) < 0.1 * abs(native - fp32)
    assert abs(split8 - fp32) < 0.5 * abs(native - fp32)


def test_padding_counts_nowhere() -> None:
    """Rows padded with -100 have the loss of the unpadded ones."""
    network = llama()
    predict = convergence.forward(network, dict(network.named_parameters()))
    tokens = torch.randint(0, network.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(tokens, (0, 4), value=-100)
    torch.testing.assert_close(
        convergence.next_token_loss(predict, padded), convergence.next_token_loss(predict, tokens)
    )


def test_the_first_row_is_the_yardstick() -> None:
    """Differences are taken from torch's optimizer on fp32 weights."""
    name, (dtype, make) = next(iter(convergence.ROWS.items()))
    assert dtype == torch.float32 and name.startswith("torch")
    assert isinstance(make([("w", torch.nn.Parameter(torch.zeros(2)))], 1e-3), torch.optim.AdamW)
