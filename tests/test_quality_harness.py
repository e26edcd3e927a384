"""The study's harness: optimizers against torch, statistics, storage of results, bootstrap and matching.

No model is trained and no data package is read here; the study itself is ``python -m bench.quality``.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import dba_kernels
from bench.quality import adapters, analysis, choose, data, grid, results, stages, training
from bench.quality.optimizers import GaLoreAdamW, GeneralStatistics, StudyAdamW, gamma, similarity
from bench.quality.setting import Setting
from dba_kernels.cli.output import InputError

STEPS = 20


def quadratic(seed: int = 0) -> tuple[dict[str, torch.nn.Parameter], dict[str, torch.Tensor]]:
    """Two parameters and the targets that their loss pulls them to."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (6, 8), "vector": (5,)}
    parameters = {n: torch.nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}
    return parameters, {n: torch.randn(s, generator=generator) for n, s in shapes.items()}


def statistics(seed: int = 7) -> GeneralStatistics:
    generator = torch.Generator().manual_seed(seed)
    mean = {"matrix": torch.randn(6, 8, generator=generator), "vector": torch.randn(5, generator=generator)}
    return GeneralStatistics(mean, {n: g**2 + 0.1 for n, g in mean.items()}, tokens=10)


def train(optimizer, parameters, targets, steps=STEPS) -> None:
    for _ in range(steps):
        loss = sum(((p - targets[n]) ** 2).sum() for n, p in parameters.items())
        loss.backward()
        optimizer.step()
        for parameter in parameters.values():
            parameter.grad = None


def study(**options) -> dict[str, torch.nn.Parameter]:
    parameters, targets = quadratic()
    setting = Setting("recipes", "test", 0.05, steps=STEPS, **options)
    train(StudyAdamW(parameters, setting, statistics()), parameters, targets)
    return parameters


def oracle(boosted: bool, corrected: bool, annealed: bool = True) -> dict[str, torch.nn.Parameter]:
    """DBA from torch's own parts: AdamW with one group per tensor, its lr scaled by α, its gradient replaced."""
    parameters, targets = quadratic()
    optimizer = torch.optim.AdamW([{"params": [p]} for p in parameters.values()], lr=0.05, weight_decay=0.0)
    mean = statistics().mean
    for step in range(STEPS):
        sum(((p - targets[n]) ** 2).sum() for n, p in parameters.items()).backward()
        share = min(0.5, 1.0 - step / STEPS) if boosted else 0.0
        for group, (name, parameter) in zip(optimizer.param_groups, parameters.items(), strict=True):
            cosine = torch.nn.functional.cosine_similarity(parameter.grad.flatten(), mean[name].flatten(), dim=0)
            alpha = 1 - cosine.item() if corrected else 1.0
            group["lr"] = 0.05 * (1 - step / STEPS if annealed else 1) * alpha
            parameter.grad = torch.lerp(parameter.grad, mean[name], share)
        optimizer.step()
        optimizer.zero_grad()
    return parameters


def gap(left, right) -> float:
    return max((left[n] - right[n]).abs().max().item() for n in left)


@pytest.mark.parametrize("boosted", [False, True])
@pytest.mark.parametrize("corrected", [False, True])
def test_dba_rows_are_adamw_on_the_boosted_gradient(boosted, corrected) -> None:
    """Protects the study's rows: they follow eqs. 2 to 8 written out, and notice a switched part."""
    options = {"boost": float(boosted), "correction": "cosine" if corrected else "none"}
    assert gap(study(**options), oracle(boosted, corrected)) < 1e-6
    # Negative control: the same check with one part switched must fail.
    assert gap(study(**options), oracle(boosted, not corrected)) > 1e-3
    assert gap(study(**options), oracle(not boosted, corrected)) > 1e-3


@pytest.mark.filterwarnings("ignore:boost:UserWarning", "ignore:lr:UserWarning")
@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("correction", ["cosine", "none", "agem", "pcgrad"])
def test_rows_agree_with_the_library(correction, scope) -> None:
    """Protects the study: its optimizer goes where the library's goes, for each correction and scope."""
    parameters, targets = quadratic()
    stored = dba_kernels.GlobalGradient.from_tensors(statistics().mean, format="fp32")
    optimizer = dba_kernels.DBAAdamW(
        parameters.items(), lr=0.05, weight_decay=0.0, global_gradient=stored, total_steps=STEPS, boost=1.0,
        boost_max=0.5, correction=correction, correction_scope=scope, correction_bounds=(0.0, 2.0),
    )  # fmt: skip
    schedule = dba_kernels.annealing_schedule(optimizer, total_steps=STEPS)
    for _ in range(STEPS):
        train(optimizer, parameters, targets, steps=1)
        schedule.step()
    assert gap(study(boost=1.0, correction=correction, scope=scope), parameters) < 1e-5
    assert gap(study(boost=0.3, boost_max=0.3), parameters) > 1e-3  # negative control: another boost


def test_constant_rate_is_torch_adamw() -> None:
    """Protects the baseline: without annealing the study's AdamW is torch's."""
    parameters, targets = quadratic()
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=0.05, weight_decay=0.0)
    train(optimizer, parameters, targets)
    assert gap(study(anneal=False), parameters) < 1e-6
    assert gap(study(), parameters) > 1e-3


def test_gamma_and_cosine() -> None:
    """Protects eqs. 2 and 4 in the study: γ is clamped and falls to 0, φ is 0 for zero norms."""
    setting = Setting("recipes", "DBA", 1e-3, steps=100, boost=0.8)
    assert [gamma(setting, t) for t in (0, 50, 75, 100)] == pytest.approx([0.5, 0.4, 0.2, 0.0])
    assert similarity(-2.0, 4.0, 1.0) == -1.0
    assert similarity(0.0, 0.0, 1.0) == 0.0


def test_agem_removes_the_conflicting_part() -> None:
    """Protects the A-GEM row: what is left of the gradient is orthogonal to the general one."""
    parameters, _ = quadratic()
    general = statistics()
    optimizer = StudyAdamW(parameters, Setting("recipes", "A-GEM", 0.05, correction="agem"), general)
    for name, parameter in parameters.items():
        parameter.grad = -general.mean[name] + 0.1
    coefficients = optimizer._coefficients()
    for name, parameter in parameters.items():
        a, b, _ = coefficients[name]
        dot = ((a * parameter.grad + b * general.mean[name]) * general.mean[name]).sum().item()
        assert abs(dot) < 1e-4 * general.mean[name].square().sum().item()


def test_decoupled_anchor_holds_weights_and_its_absence_does_not() -> None:
    """Protects the anchor row: a strong anchor holds the weights, none does not."""
    start, _ = quadratic()
    held, free = study(anchor=1e6), study()
    assert gap(start, held) < 1e-3 < 0.1 < gap(start, free)


def test_boost_of_update_has_the_stated_share() -> None:
    """Protects the update boost: its share of the update's norm is γ."""
    parameters, _ = quadratic()
    general = statistics()
    setting = Setting("recipes", "x", 1.0, steps=10, boost=0.3, boost_max=0.3, boost_of="update")
    optimizer = StudyAdamW(parameters, setting, general)
    update, denominator = torch.randn(6, 8), torch.rand(6, 8) + 0.5
    mixed = update.clone()
    optimizer._boost_update("matrix", mixed, denominator)
    added = mixed - 0.7 * update
    assert added.norm().item() == pytest.approx(0.3 * update.norm().item(), rel=1e-5)


def test_galore_at_full_rank_moves_like_adam_in_its_basis() -> None:
    """Protects the GaLore row: the change has the chosen rank, and other tensors still learn."""
    parameters, targets = quadratic()
    start = {n: p.detach().clone() for n, p in parameters.items()}
    setting = Setting("recipes", "GaLore", 0.05, steps=STEPS, galore_rank=2)
    train(GaLoreAdamW(parameters, setting), parameters, targets)
    assert torch.linalg.matrix_rank(parameters["matrix"].detach() - start["matrix"], atol=1e-4) == 2
    assert ((parameters["vector"] - targets["vector"]).norm() < (start["vector"] - targets["vector"]).norm()).item()


def test_adapters_start_at_the_model_and_merge_into_it() -> None:
    """Protects the LoRA row: adapters change nothing at first, and merging keeps what they learned."""
    network = torch.nn.Module()
    network.model = torch.nn.Module()
    network.model.layers = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False))])
    x = torch.randn(2, 4)
    before = network.model.layers[0](x)
    adapters.attach(network, rank=2, seed=0)
    torch.testing.assert_close(network.model.layers[0](x), before)
    with torch.no_grad():
        network.model.layers[0][0].b += 1.0
    tuned = network.model.layers[0](x)
    adapters.merge(network)
    torch.testing.assert_close(network.model.layers[0](x), tuned)
    assert [n for n, _ in network.named_parameters()] == ["model.layers.0.0.weight"]
    assert (tuned - before).abs().max() > 1e-2


def test_storage_formats_lose_what_they_should() -> None:
    """Protects the format rows: errors lie in the order of the formats' bytes."""
    matrix = {"w": torch.randn(16, 100, generator=torch.Generator().manual_seed(0)), "v": torch.randn(5)}
    error = {
        s: ((training.stored(matrix, s)["w"] - matrix["w"]).norm() / matrix["w"].norm()).item()
        for s in ("fp32", "int8", "int4", "rank4", "rank16")
    }
    assert error["fp32"] == 0 and error["rank16"] < 1e-5
    assert error["int8"] < 0.01 < error["int4"] < 0.15 < error["rank4"] < 1


def test_keys_are_stable_and_ignore_the_method_name() -> None:
    """Protects stored results: a key depends on what decides a run and on nothing else."""
    setting = Setting("recipes", "AL", 1e-3)
    assert setting.key() == dataclasses.replace(setting, method="other").key()
    assert setting.key() != dataclasses.replace(setting, seed=1).key()
    assert setting.fields() == {"domain": "recipes", "method": "AL", "lr": 1e-3, "seed": 0}
    assert Setting(**json.loads(json.dumps(setting.fields()))) == setting


def test_grid_has_no_accidental_duplicates_and_groups_interpolations() -> None:
    """Protects the machine's time: nothing is trained twice, and what shares weights shares a training."""
    settings = stages.stage("sweep")
    assert len({s.key() for s in settings}) == len(settings)
    groups = grid.trainings(settings, done=[])
    assert sum(map(len, groups)) == len(settings) > len(groups)
    assert not {s.domain for s in settings} & set(data.CONFIRMING)
    assert grid.trainings(settings, done=[s.key() for s in settings]) == []


def record(key: str, domain: str = "recipes") -> dict:
    return {"key": key, "base": "b", "setting": {"domain": domain}}


def test_results_survive_a_torn_line(tmp_path) -> None:
    """Protects stored results: a line that a kill tore is dropped, a broken file is an error."""
    results.append([record("a"), record("b")], tmp_path)
    path = tmp_path / "recipes.jsonl"
    path.write_bytes(path.read_bytes() + b'{"key":"c","set')
    assert list(results.load("recipes", tmp_path)) == ["a", "b"]
    results.append([record("d")], tmp_path)
    assert list(results.load("recipes", tmp_path)) == ["a", "b", "d"]
    path.write_text("{}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 1"):
        results.load("recipes", tmp_path)


def test_results_of_another_base_model_are_refused(tmp_path) -> None:
    """Protects the comparison: results of another base model are refused."""
    results.append([record("a"), record("b")], tmp_path)
    assert results.done(["recipes", "medical"], "b", tmp_path) == {"a", "b"}
    with pytest.raises(ValueError, match="--output FOLDER"):
        results.done(["recipes"], "other", tmp_path)


def test_bootstrap_interval_covers_and_excludes() -> None:
    """Protects the intervals: one over noise contains 0, one over an effect does not."""
    generator = np.random.default_rng(0)
    weight = generator.integers(20, 127, 200).astype(float)
    mean, low, high = analysis.interval(generator.normal(0.1, 0.2, 200), weight)
    assert low < mean < high and low > 0
    _, low, high = analysis.interval(generator.normal(0.0, 0.2, 200), weight)
    assert low < 0 < high


def test_matching_interpolates_between_learning_rates() -> None:
    """Protects the matched comparison: it interpolates between learning rates and never beyond them."""
    weights = analysis.Weights(np.ones(3), np.ones(2))

    def at(domain: float, general: float) -> analysis.Point:
        one = np.ones(1)
        return analysis.Point(np.full(3, domain), np.full(2, general), one * domain, one * general, one)

    curve = [at(5.0, 4.0), at(4.0, 4.2), at(3.0, 5.0)]
    assert analysis.matched(curve, 3.5, weights) == pytest.approx(np.full(2, 4.6))
    assert analysis.matched(curve, 2.99, weights) == pytest.approx(np.full(2, 5.0))
    assert analysis.matched(curve, 2.5, weights) is None


def test_harmonic_mean() -> None:
    """Protects the joint score, zeros included."""
    assert choose.harmonic(0.2, 0.6) == pytest.approx(0.3)
    assert choose.harmonic(0.0, 0.0) == 0.0


def test_missing_package_names_the_command(monkeypatch) -> None:
    """Protects a bare installation: a missing data package is reported with the command that installs it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"bench/data-packages\.txt"):
        next(data.recipes())


def test_splits_are_fixed() -> None:
    """The split is part of the results: changing the hash would mix training text into the reported one."""
    drawn = [data.split_of("general", f"document {i}") for i in range(1000)]
    assert {s: drawn.count(s) for s in set(drawn)} == {"base": 641, "fresh": 212, "test": 85, "valid": 62}
