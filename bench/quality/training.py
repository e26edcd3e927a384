"""One run of the study: collect general statistics, fine-tune, evaluate, and write down what happened."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.quality import adapters, data, memory, model
from bench.quality.optimizers import GaLoreAdamW, GeneralStatistics, StudyAdamW
from bench.quality.setting import Setting

BATCH = 4  # domain sequences per step
PROBES = 4  # batches whose gradients' signs the calibration goes along
DIVERGED = 30.0  # nats per token that a run which ended in NaN is charged
TEST_DOCUMENTS, VALID_DOCUMENTS = 128, 64


def batches(windows: Tensor, seed: int) -> Iterator[Tensor]:
    """Windows one at a time, ``[1, SEQUENCE]``, reshuffled at every pass; the order depends on ``seed`` alone."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from windows[torch.randperm(len(windows), generator=generator)].unsqueeze(1)


def take(stream: Iterator[Tensor], count: int) -> list[Tensor]:
    return [next(stream) for _ in range(count)]


def named_parameters(network: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in network.named_parameters() if p.requires_grad}


def collect(network: torch.nn.Module, stream: Iterator[Tensor], count: int) -> GeneralStatistics:
    """Zero-learning-rate pass over ``count`` batches: eq. 1 and the second moment, exact fp32 sums over the count."""
    began = time.monotonic()
    parameters = named_parameters(network)
    total = {n: torch.zeros_like(p) for n, p in parameters.items()}
    squares = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for _ in range(count):
        model.loss_fn(network, torch.cat(take(stream, BATCH))).backward()
        for name, parameter in parameters.items():
            total[name] += parameter.grad
            squares[name].addcmul_(parameter.grad, parameter.grad)
            parameter.grad = None
    mean = {n: t / count for n, t in total.items()}  # eq. 1
    second_moment = {n: t / count for n, t in squares.items()}
    return GeneralStatistics(mean, second_moment, BATCH * (data.SEQUENCE - 1), time.monotonic() - began)


def general_windows(setting: Setting) -> Tensor:
    topics = frozenset(setting.topics.split(",")) if setting.topics else None
    return data.windows("general", setting.source, topics)


def base_statistics(network: torch.nn.Module, setting: Setting) -> GeneralStatistics:
    """Statistics at θ₀ for the collection that ``setting`` asks for; once per base model, then from the cache."""
    topics = setting.topics.replace(",", "+").replace(" ", "_") or "all"
    name = f"statistics-{model.BASE_STEPS}-{setting.source}-{topics}-{setting.batches}.pt"
    path = data.cache_folder() / name
    if not path.exists():
        statistics = collect(network, batches(general_windows(setting), seed=1234), setting.batches)
        data.replace_file(path, lambda temporary: torch.save(vars(statistics), temporary))
    return GeneralStatistics(**torch.load(path, weights_only=True))


def base_curvature(network: torch.nn.Module, setting: Setting) -> memory.Curvature:
    """Second order at θ₀ from the batches of ``base_statistics``; once per base model, then from the cache."""
    path = data.cache_folder() / f"curvature-{model.BASE_STEPS}-{setting.labels}-{setting.batches}.pt"
    if not path.exists():
        stream = batches(data.windows("general", "fresh"), seed=1234)
        rows = (torch.cat(take(stream, BATCH)) for _ in range(setting.batches))
        curvature = memory.collect(network, rows, setting.labels == "sampled")
        data.replace_file(path, lambda temporary: torch.save(vars(curvature), temporary))
    return memory.Curvature(**torch.load(path, weights_only=True))


def calibration(network: torch.nn.Module, setting: Setting, terms: dict[str, list[Any]]) -> float:
    """κ of ``terms`` at the base model on batches that come after the collection's; once, then from the cache."""
    name = f"{setting.labels}-{setting.batches}-{setting.memory_of}-{setting.memory_rank}-{setting.memory_rest}"
    path = data.cache_folder() / f"calibration-{model.BASE_STEPS}-{name}.json"
    if not path.exists():
        stream = batches(data.windows("general", "fresh"), seed=4321)
        probes = [torch.cat(take(stream, BATCH)) for _ in range(PROBES)]
        kappa = memory.calibration(network, terms, probes, torch.cat(take(stream, PROBES * BATCH)))
        data.replace_file(path, lambda temporary: temporary.write_text(json.dumps(kappa)))
    return float(json.loads(path.read_text()))


def anchor(network: torch.nn.Module, setting: Setting) -> memory.Anchor | None:
    """The second-order memory that ``setting`` asks for, at the weights that ``network`` has now."""
    if setting.memory == 0:
        return None
    curvature = base_curvature(network, setting)
    if setting.memory_of == "diagonal":
        terms: dict[str, list[Any]] = {n: [d] for n, d in curvature.diagonal.items()}
    else:
        terms = memory.truncated(curvature, setting.memory_rank, setting.memory_rest)
    weight = setting.memory * calibration(network, setting, terms)
    return memory.Anchor(terms, named_parameters(network), weight, setting.memory_every)


def stored(mean: dict[str, Tensor], storage: str) -> dict[str, Tensor]:
    """The mean gradient as it reads back from a storage format; vectors stay fp32.

    ``int8`` and ``int4``: symmetric absmax scale per group of 64 along the row. ``rank<r>``: truncated SVD.
    """
    if storage == "fp32":
        return mean
    return {n: g if g.ndim < 2 else _stored_matrix(g, storage) for n, g in mean.items()}


def _stored_matrix(matrix: Tensor, storage: str) -> Tensor:
    if storage.startswith("rank"):
        u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
        rank = int(storage.removeprefix("rank"))
        return u[:, :rank] * sigma[:rank] @ vh[:rank]
    limit = {"int8": 127, "int4": 7}[storage]
    groups = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % 64)).unflatten(1, (-1, 64))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / limit
    return ((groups / scale).round() * scale).flatten(1)[:, : matrix.shape[1]]


def finetune(network: torch.nn.Module, setting: Setting) -> dict[str, Any]:
    """Train ``network`` in place; returns costs and diagnostics."""
    general = base_statistics(network, setting) if setting.needs_general() else None
    if general is not None:
        general.mean = stored(general.mean, setting.storage)
        if setting.shrink:
            general.shrink(setting.batches)
    memory_of_base = anchor(network, setting)
    if setting.adapter_rank:
        adapters.attach(network, setting.adapter_rank, setting.seed)
    parameters = named_parameters(network)
    if setting.galore_rank:
        optimizer: GaLoreAdamW | StudyAdamW = GaLoreAdamW(parameters, setting)
    else:
        optimizer = StudyAdamW(parameters, setting, general, memory_of_base)
    domain = batches(data.windows(setting.domain, "train"), setting.seed)
    replayed = batches(data.windows("general", "fresh"), 1000 + setting.seed)
    collected = batches(general_windows(setting), 2000 + setting.seed)
    per_step = BATCH * setting.replay / (1 - setting.replay)
    general_rows, refresh_seconds = 0, 0.0
    began = time.monotonic()
    for step in range(setting.steps):
        if general is not None and step and step % math.ceil(setting.steps / setting.refresh) == 0:
            fresh = collect(network, collected, setting.batches // setting.refresh)
            general.mean, refresh_seconds = fresh.mean, refresh_seconds + fresh.seconds
        extra = math.floor((step + 1) * per_step) - math.floor(step * per_step)
        general_rows += extra
        rows = torch.cat(take(domain, BATCH) + take(replayed, extra))
        model.loss_fn(network, rows).backward()
        optimizer.step()
    if setting.adapter_rank:
        adapters.merge(network)
    cosines = getattr(optimizer, "cosines", [])
    return {
        "seconds": round(time.monotonic() - began, 1),
        "refresh_seconds": round(refresh_seconds, 1),
        "collection_seconds": round(general.seconds, 1) if general else 0.0,
        "domain_tokens": setting.steps * BATCH * data.SEQUENCE,
        "general_tokens": general_rows * data.SEQUENCE,
        "anchor": round(memory_of_base.weight, 4) if memory_of_base else None,
        "predicted_rise": round(memory_of_base.predicted_rise(parameters), 4) if memory_of_base else None,
        "mean_cosine": round(sum(cosines) / len(cosines), 4) if cosines else None,
    }


def measure(network: torch.nn.Module, domain: str) -> dict[str, Any]:
    """Test documents one by one (mean loss in millinats, hits, predicted tokens), validation in total."""
    result: dict[str, Any] = {}
    for side, corpus in (("domain", domain), ("general", "general")):
        test = model.evaluate(network, data.evaluation(corpus, "test", TEST_DOCUMENTS))
        valid = model.evaluate(network, data.evaluation(corpus, "valid", VALID_DOCUMENTS))
        tokens = test["tokens"]
        result[side] = {
            "millinats": [round(1000 * min(x / n, DIVERGED)) for x, n in zip(test["loss"], tokens, strict=True)],
            "hits": test["hits"],
            "valid_loss": round(sum(valid["loss"]) / sum(valid["tokens"]), 5),
            "valid_accuracy": round(sum(valid["hits"]) / sum(valid["tokens"]), 5),
        }
    return result


def run(settings: list[Setting]) -> list[dict[str, Any]]:
    """Fine-tune once for settings that share a training and evaluate each; one record per setting, in order."""
    torch.set_num_threads(1)
    network = model.load_base()
    origin = {n: p.detach().clone() for n, p in named_parameters(network).items()}
    training = {"seconds": 0.0} if settings[0].steps == 0 else finetune(network, settings[0].training())
    tuned = {n: p.detach().clone() for n, p in named_parameters(network).items()}
    squared = sum((tuned[n] - origin[n]).square().sum().item() for n in origin)
    training["distance"] = round(math.sqrt(squared), 3)
    records, base = [], model.base_digest()
    for setting in settings:
        with torch.no_grad():
            for name, parameter in named_parameters(network).items():
                parameter.copy_(torch.lerp(origin[name], tuned[name], setting.interpolate))
        record = {"key": setting.key(), "base": base, "setting": setting.fields(), "training": training}
        records.append(record | measure(network, setting.domain))
    return records
