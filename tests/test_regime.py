"""The study of the paper's regime (``bench.regime``): what enters a comparison, without its models and its data."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from bench.regime import analysis, data, grid, model, training
from bench.regime.setting import Setting
from dba_kernels import DBAAdamW
from tests.support.tiny_llama import make_model


class Letters:
    """A tokenizer of single characters."""

    pad_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = False, verbose: bool = False) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [2 + ord(c) % 60 for c in text]}


RECORDS: dict[str, Any] = {
    "choices": {
        "passage": "P",
        "question": "Q?",
        "options": "A. one\nB. two\nlines\nC. three",
        "answer": "B. two\nlines",
    },
    "spellings": {"question": "Q?", "answer": ["first", "second"]},
    "label": {"question": "Q?", "passage": "P", "label": False},
    "summary": {"document": "D", "summary": "S"},
}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("choices", data.Item("P", "Q?", "two\nlines", ("one", "two\nlines", "three"), "P")),
        ("spellings", data.Item("", "Q?", "first", (), "Q?")),
        ("label", data.Item("P", "Q?", "no", ("yes", "no"), "P")),
        ("summary", data.Item("D", "What happened, in one sentence?", "S", (), "D")),
    ],
)
def test_records_of_every_kind_become_items(kind: str, expected: data.Item) -> None:
    """Options lose their letters, labels become yes and no, the first of several spellings is the answer."""
    assert data._item(RECORDS[kind]) == expected


@pytest.mark.parametrize(
    "record",
    [{"question": "Q?"}, {"question": "Q?", "label": None}, {"question": "Q?", "options": "A. x", "answer": "B. y"}],
)
def test_records_without_a_label_are_left_out(record: dict[str, Any]) -> None:
    """Unlabelled test splits, and answers that are none of the options, teach and score nothing."""
    assert data._item(record) is None


def test_a_passage_is_on_one_side_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Items are split by passage: no passage of the training items is ever scored."""
    rows = [{"passage": f"P{i % 40}", "question": f"Q{i}?", "answer": "x"} for i in range(400)]
    monkeypatch.setattr(data, "_records", lambda _: iter(rows))
    parts = {part: {item.context for item in data.items("BoolQ", part)} for part in ("train", "valid", "test")}
    assert all(parts.values()) and sum(map(len, parts.values())) == 40
    assert len(set().union(*parts.values())) == 40


def test_only_answers_are_targets() -> None:
    """Labels cover the answer's tokens and nothing of the prompt or the padding."""
    items = [data.Item("", "Q?", "abc", (), "Q?"), data.Item("P" * 500, "Q" * 500, "d" * 100, (), "P")]
    tokens = [data.encode(Letters(), item) for item in items]
    batch = data.collate(tokens, padding=0)
    assert [t.targets for t in tokens] == [4, data.ANSWER_TOKENS]  # a space leads each answer
    assert (batch["labels"] != data.IGNORED).sum(1).tolist() == [4, data.ANSWER_TOKENS]
    assert len(tokens[1].ids) == data.CONTEXT_TOKENS + data.QUESTION_TOKENS + data.ANSWER_TOKENS
    assert batch["attention_mask"].sum(1).tolist() == [len(t.ids) for t in tokens]


def small_model() -> LlamaForCausalLM:
    network = make_model(vocab_size=64).eval()
    network.get_input_embeddings().weight.requires_grad_(False)
    network.get_output_embeddings().weight.requires_grad_(False)
    return network


def test_loss_is_the_models_own_over_answers() -> None:
    """Logits at answer positions alone give the loss that the model computes from all of them."""
    network = small_model()
    items = [data.encode(Letters(), data.Item("ctx", f"question {i}", "answer" * (i + 1), (), "")) for i in range(3)]
    batch = data.collate(items, padding=0)
    loss, targets = model.loss_fn(network, batch)
    assert targets == sum(item.targets for item in items)
    torch.testing.assert_close(loss, network(**batch).loss)
    sums = model.answer_losses(network, items, 0, batch_size=2)
    assert math.isclose(sum(total for total, _ in sums) / targets, loss.item(), rel_tol=1e-5)


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> training.Study:
    """The study on a model of one layer and on made-up sets."""

    def items(name: str, part: str, count: int | None = None) -> list[data.Item]:
        options = ("yes", "no") if name in ("law", "BoolQ") else ()
        found = [data.Item("", f"{name} {part} {i}", "yes" if i % 2 else "no", options, str(i)) for i in range(12)]
        return found[:count]

    monkeypatch.setattr(data, "items", items)
    monkeypatch.setattr(model, "load", lambda _: (small_model(), Letters()))
    monkeypatch.setattr(training, "COLLECTED", 3)
    monkeypatch.setattr(training, "SCORED", {"test": 4, "valid": 2})
    monkeypatch.setattr(training, "CHOICES", 2)
    return training.Study("gemma", tmp_path)


METHODS = ("AL", "replay 1:1", "DBA, paper's boost", "general first, then AL", "LoRA", "GaLore")


@pytest.mark.parametrize("method", METHODS)
def test_a_run_trains_scores_and_leaves_the_base_as_it_was(study: training.Study, method: str) -> None:
    """Every method starts from the same weights whatever ran before it, and its record has every set's scores."""
    setting = dataclasses.replace(next(grid.family(method, "gemma", "law")), steps=2, lr=1e-3)
    (first,) = study.run([setting], accuracy=True)
    study.run([Setting("gemma", "law", "AL", 1e-2, steps=2)], accuracy=False)
    (again,) = study.run([setting], accuracy=True)
    assert first["test"] == again["test"]
    assert set(first["test"]) == {"law", *data.SEEN, *data.UNSEEN} and "right" in first["test"]["BoolQ"]
    (base,) = study.run([grid.base("gemma", "law")], accuracy=True)
    assert base["test"] != first["test"]


def test_interpolation_reaches_both_ends(study: training.Study) -> None:
    """WiSE-FT at 0 scores as the start, at 1 as the tuned model."""
    setting = Setting("gemma", "law", "AL", 1e-3, steps=2)
    ends = [dataclasses.replace(setting, interpolate=share) for share in (0.0, 1.0)]
    start, tuned = study.run(ends, accuracy=False)
    (base,) = study.run([grid.base("gemma", "law")], accuracy=False)
    assert start["test"] == base["test"] != tuned["test"]


def test_replay_and_collection_see_different_orders(study: training.Study) -> None:
    """Replay adds as many general answers as asked for to the same domain answers."""
    plain = list(study.batches(Setting("gemma", "law", "", 0.0, steps=4), "law"))
    mixed = list(study.batches(Setting("gemma", "law", "", 0.0, steps=4, replay=0.25), "law"))
    assert [len(b["input_ids"]) for b in mixed] == [10] * 4
    for few, more in zip(plain, mixed, strict=True):
        width = few["labels"].shape[1]
        assert torch.equal(few["labels"], more["labels"][:8, :width])


def test_the_optimizer_of_a_run_is_the_librarys(study: training.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boost and correction of a setting reach ``DBAAdamW``, with the number of steps."""
    seen: list[dict[str, Any]] = []

    class Spy(DBAAdamW):
        def __init__(self, params: Any, **options: Any) -> None:
            seen.append(options)
            super().__init__(params, **options)

    monkeypatch.setattr(training, "DBAAdamW", Spy)
    setting = dataclasses.replace(next(grid.family("DBA, paper's boost", "gemma", "law")), steps=2)
    study.run([setting], accuracy=False)
    assert seen[-1]["boost"] == "paper" and seen[-1]["correction"] == "cosine" and seen[-1]["total_steps"] == 2


def record(setting: Setting, domain: float, general: float) -> dict[str, Any]:
    def scores(loss: float) -> dict[str, Any]:
        return {"millinats": [round(2000 * loss)] * 4, "tokens": [2] * 4}

    part = {setting.domain: scores(domain)} | {name: scores(general) for name in (*data.SEEN, *data.UNSEEN)}
    return {"key": setting.key(), "base": "b", "setting": setting.fields(), "cost": {}, "test": part, "valid": part}


def test_joint_score_is_a_harmonic_mean_of_normalised_scores() -> None:
    """The base model scores 1; a gain on one side does not pay for an equal loss on the other."""
    assert analysis.joint(2.0, 3.0, (2.0, 3.0)) == pytest.approx(1.0)
    half, double = 2.0 + math.log(2), 3.0 - math.log(2)
    assert analysis.joint(half, double, (2.0, 3.0)) == pytest.approx(2 * 0.5 * 2 / 2.5)


def test_choice_is_made_on_validation_and_general_loss_at_equal_domain_loss() -> None:
    """The best joint score stands for a method; curves are compared where they reach the same domain loss."""
    base = grid.base("gemma", "law")
    found = {s.key(): record(s, *losses) for s, losses in [(base, (4.0, 3.0))]}
    losses = {3e-5: (3.0, 3.8), 1.5e-5: (3.2, 3.2), 8e-6: (3.6, 3.1)}
    for setting in grid.family("AL", "gemma", "law"):
        found[setting.key()] = record(setting, *losses[setting.lr])
    chosen = analysis.choice("AL", "gemma", "law", found)
    assert chosen is not None and chosen.lr == 1.5e-5
    assert analysis.general_at("AL", "gemma", "law", 3.1, found) == pytest.approx(3.5)
    assert analysis.general_at("AL", "gemma", "law", 2.9, found) is None
    own, other = [found[chosen.key()]], [found[base.key()]]
    assert analysis.difference(own, other, data.SEEN)[0] == pytest.approx(0.2)


def test_keys_name_what_decides_a_result() -> None:
    """The method's name does not enter; every option does; settings that share a training run once."""
    one = Setting("gemma", "law", "AL", 3e-5)
    assert one.key() == dataclasses.replace(one, method="other").key() != dataclasses.replace(one, seed=1).key()
    ends = [dataclasses.replace(one, interpolate=share) for share in (0.5, 0.7, 1.0)]
    assert grid.trainings(ends, []) == [ends] and grid.trainings(ends, [one.key()]) == [ends[:2]]
