"""One run of the study: start, fine-tune, score, and write down what happened. Everything goes through the library."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bench.regime import data, model
from bench.regime.setting import Setting
from dba_kernels import DBAAdamW, GlobalGradient, annealing_schedule, collect_global_gradient
from dba_kernels.cli.models import cache_dir

BATCH = 8  # domain answers per step
COLLECTED = 48  # batches of the collection, and steps of training once on general answers
FIRST_LR = 3e-5  # of training once
SCORED = {"test": 96, "valid": 48}  # items of each set
CHOICES = 48  # items of each set with options whose accuracy is measured


class Study:
    """A model, its base weights and the encoded sets; shared by the runs of one process."""

    def __init__(self, name: str, folder: Path | None = None) -> None:
        self.name, self.folder = name, folder or cache_dir() / "regime"
        self.model, self.tokenizer = model.load(name)
        self.padding = self.tokenizer.pad_token_id or 0
        self.base_digest = model.digest(self.model)
        self.base = {n: p.detach().clone() for n, p in model.trainable(self.model).items()}

    # --- data ---------------------------------------------------------------------------------------------------------

    def stream(self, name: str, seed: int) -> Iterator[data.Tokens]:
        """Training answers of one set, reshuffled at every pass; the order depends on ``seed`` alone."""
        found, draw = data.items(name, "train"), random.Random(f"{name}/{seed}")
        while True:
            draw.shuffle(found)
            for item in found:
                yield data.encode(self.tokenizer, item)

    def general(self, setting: Setting, seed: int) -> Iterator[data.Tokens]:
        """The general sets in turn, one answer each: all weigh the same whatever their size."""
        names = setting.general.split(",") if setting.general else data.SEEN
        streams = [self.stream(name, seed) for name in names]
        while True:
            yield from (next(stream) for stream in streams)

    def collected(self, setting: Setting) -> list[dict[str, torch.Tensor]]:
        """The batches that the memory sees; no run draws its replay from the same seed."""
        answers = self.general(setting, seed=10_000)
        return [data.collate([next(answers) for _ in range(BATCH)], self.padding) for _ in range(COLLECTED)]

    def batches(self, setting: Setting, domain: str) -> Iterator[dict[str, torch.Tensor]]:
        own, general, added = self.stream(domain, setting.seed), self.general(setting, 20_000 + setting.seed), 0
        for step in range(1, setting.steps + 1):
            extra = math.floor(step * BATCH * setting.replay) - added
            added += extra
            rows = [next(own) for _ in range(BATCH)] + [next(general) for _ in range(extra)]
            yield data.collate(rows, self.padding)

    # --- what is computed once ----------------------------------------------------------------------------------------

    def start(self, setting: Setting) -> None:
        """Put the weights to where the run starts: the base model, or that trained once on general answers."""
        self._set(self.base)
        if not setting.first:
            return
        path = self.folder / f"first-{self.name}-{self.base_digest}-{setting.general or 'all'}.safetensors"
        if not path.exists():
            optimizer = DBAAdamW(model.trainable(self.model).items(), lr=FIRST_LR, weight_decay=0.0)
            self._train(optimizer, iter(self.collected(setting)), COLLECTED, anneal=True)
            self._keep(path, {n: p.detach() for n, p in model.trainable(self.model).items()})
        self._set(load_file(path))

    def memory(self, setting: Setting) -> GlobalGradient:
        """ĝ_G, and the curvature where the run has an anchor, at the weights where the run starts."""
        curvature = setting.rank if setting.anchor else None
        kind = "first" if setting.first else "base"
        name = f"memory-{self.name}-{self.base_digest}-{kind}-{curvature or 0}-{setting.general or 'all'}.safetensors"
        path = self.folder / name
        if not path.exists():
            options: dict[str, Any] = {} if curvature is None else {"curvature": curvature}
            path.parent.mkdir(parents=True, exist_ok=True)
            batches = self.collected(setting)
            collect_global_gradient(self.model, batches, model.loss_fn, save_to=path, data="general", **options)
        return GlobalGradient.load(path)

    def _set(self, weights: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, param in model.trainable(self.model).items():
                param.copy_(weights[name])
                param.grad = None

    def _keep(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)

    # --- one run ------------------------------------------------------------------------------------------------------

    def _train(
        self,
        optimizer: torch.optim.Optimizer,
        batches: Iterator[dict[str, torch.Tensor]],
        steps: int,
        anneal: bool,
        network: Any = None,
    ) -> int:
        """Returns the number of answer tokens seen."""
        schedule = annealing_schedule(optimizer, total_steps=steps) if anneal else None
        seen = 0
        for batch in batches:
            loss, targets = model.loss_fn(network or self.model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if schedule is not None:
                schedule.step()
            seen += targets
        return seen

    def finetune(self, setting: Setting) -> dict[str, Any]:
        """Train from the setting's start; returns what it cost."""
        self.start(setting)
        boosted = setting.boosted or setting.anchor != 0.0
        began = time.monotonic()
        memory = self.memory(setting) if boosted else None
        collection = time.monotonic() - began
        began, seen, figures = time.monotonic(), 0, {}
        for domain in setting.domain.split("+"):
            batches = self.batches(setting, domain)
            if setting.adapter_rank:
                seen += self._train_adapter(setting, batches)
                continue
            params = model.trainable(self.model)
            options: dict[str, Any] = {}
            if memory is not None:
                options = dict(global_gradient=memory, total_steps=setting.steps, boost=setting.boost)
                options |= dict(correction=setting.correction)
                options |= dict(anchor=setting.anchor) if setting.anchor else {}
            optimizer: torch.optim.Optimizer
            if setting.galore_rank:
                from bench.regime.rivals import GaLore

                optimizer = GaLore(params.values(), lr=setting.lr, rank=setting.galore_rank)
            else:
                optimizer = DBAAdamW(params.items(), lr=setting.lr, weight_decay=0.0, **options)
            seen += self._train(optimizer, batches, setting.steps, setting.anneal)
            figures = optimizer.metrics() if isinstance(optimizer, DBAAdamW) else {}
        return {
            "seconds": round(time.monotonic() - began, 1),
            "collection_seconds": round(collection, 1),
            "answer_tokens": seen,
            "metrics": {name: round(value, 6) for name, value in figures.items()},
        }

    def _train_adapter(self, setting: Setting, batches: Iterator[dict[str, torch.Tensor]]) -> int:
        """LoRA on every linear layer of the blocks (Hu et al. 2021), merged at the end."""
        from peft import LoraConfig, get_peft_model

        names = {n.rsplit(".", 1)[-1] for n, m in self.model.named_modules() if isinstance(m, torch.nn.Linear)}
        config = LoraConfig(
            r=setting.adapter_rank,
            lora_alpha=2 * setting.adapter_rank,
            target_modules=sorted(names - {"lm_head"}),
            lora_dropout=0.0,
        )
        frozen = list(model.trainable(self.model).values())
        torch.manual_seed(setting.seed)
        network = get_peft_model(self.model, config)
        params = [p for p in network.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=setting.lr, weight_decay=0.0)
        seen = self._train(optimizer, batches, setting.steps, setting.anneal)
        self.model = network.merge_and_unload()
        for param in frozen:
            param.requires_grad_(True)
        return seen

    def score(self, setting: Setting, part: str, accuracy: bool) -> dict[str, Any]:
        """Per set: each item's summed loss in millinats, its answer tokens, and right choices where it has options."""
        result: dict[str, Any] = {}
        for name in (*setting.domain.split("+"), *data.SEEN, *data.UNSEEN):
            chosen = data.items(name, part, SCORED[part])
            answers = [data.encode(self.tokenizer, item) for item in chosen]
            found = model.answer_losses(self.model, answers, self.padding)
            result[name] = {
                "millinats": [round(1000 * loss) for loss, _ in found],
                "tokens": [tokens for _, tokens in found],
            }
            if accuracy and chosen[0].options:
                result[name]["right"] = self._right(chosen[:CHOICES])
        return result

    def _right(self, chosen: list[data.Item]) -> list[int]:
        """1 where the answer is the option of the least loss per token, else 0."""
        answers = [data.encode(self.tokenizer, item, option) for item in chosen for option in item.options]
        losses = iter(model.answer_losses(self.model, answers, self.padding))
        found = []
        for item in chosen:
            per_token = {option: loss / tokens for option in item.options for loss, tokens in [next(losses)]}
            found.append(int(min(per_token, key=lambda option: per_token[option]) == item.answer))
        return found

    def run(self, settings: list[Setting], accuracy: bool) -> list[dict[str, Any]]:
        """Fine-tune once for settings that share a training and score each; one record per setting, in order."""
        cost: dict[str, Any] = {}
        if settings[0].steps:
            cost = self.finetune(settings[0].training())
        else:
            self.start(settings[0])
        tuned = {n: p.detach().clone() for n, p in model.trainable(self.model).items()}
        self.start(dataclasses.replace(settings[0], adapter_rank=0))
        origin = {n: p.detach().clone() for n, p in model.trainable(self.model).items()}
        records = []
        for setting in settings:
            self._set({n: torch.lerp(origin[n], tuned[n], setting.interpolate) for n in origin})
            record = {"key": setting.key(), "base": self.base_digest, "setting": setting.fields(), "cost": cost}
            scores = {part: self.score(setting, part, accuracy and part == "test") for part in SCORED}
            records.append(record | scores)
        return records
