"""The study of a real model (``python -m bench.real_model``): what it compares; its page shows the committed results.

No model is loaded here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from bench import real_model
from bench.real_model import BATCH, COLLECTED, DOMAIN, GENERAL, LONG, SEEDS, STEPS, Study
from dba_kernels.cli.demo.blocks import Blocks

STUDIES = Path(__file__).resolve().parent.parent / "bench" / "quality" / "README.md"


@pytest.fixture
def study() -> Study:
    """Blocks of one token each, numbered; those of the general corpus below 0."""
    made = Study.__new__(Study)
    held_out = torch.full((1, 1), 10**9)
    made.blocks = {
        DOMAIN: Blocks(1 + torch.arange(max(len(SEEDS) * STEPS, LONG) * BATCH).view(-1, 1), held_out),
        GENERAL: Blocks(-1 - torch.arange((COLLECTED + len(SEEDS) * STEPS) * BATCH).view(-1, 1), held_out),
    }
    return made


@pytest.mark.parametrize("replay", [1, 4])
def test_replay_adds_to_the_same_domain_blocks(study: Study, replay: int) -> None:
    """Every method sees the same domain blocks in the same order; replay sees others of the general text than ĝ_G."""
    collected = set(range(-COLLECTED * BATCH, 0))
    seen: set[int] = set()
    for seed in SEEDS:
        plain, mixed = list(study.batches(seed, STEPS, 0)), list(study.batches(seed, STEPS, replay))
        assert [len(ids) for ids in plain] == [BATCH] * STEPS and len(mixed) == STEPS
        for ids, more in zip(plain, mixed, strict=True):
            assert torch.equal(more[:BATCH], ids) and len(more) == BATCH + replay and (more[BATCH:] < 0).all()
        drawn = {int(i) for ids in mixed for i in ids}
        assert len(drawn) == STEPS * (BATCH + replay) and not drawn & (seen | collected)
        seen |= drawn


def test_finished_runs_are_not_repeated() -> None:
    """Protects the machine's time: a stored run is not run again, a lost one is."""
    done = real_model.load(real_model.RESULTS)
    assert real_model.missing(done) == []
    lost = next(iter(real_model.METHODS)), 1
    assert real_model.missing({run: losses for run, losses in done.items() if run != lost}) == [lost]


def test_readme_shows_the_committed_results() -> None:
    """Protects the page: its table is the one that the command prints from the committed results."""
    table = real_model.table(real_model.load(real_model.RESULTS)).replace("| -", "| −")
    assert table in STUDIES.read_text(encoding="utf-8")
