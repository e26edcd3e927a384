"""The stages of the study: which settings each runs, in the order that answers the most important question first."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable

from bench.quality import data
from bench.quality.choose import choice
from bench.quality.grid import (
    ABLATION_DOMAIN,
    ABLATION_LRS,
    BETWEEN,
    FAMILIES,
    LRS,
    MAIN,
    SEEDS,
    SENSITIVITY,
    SENSITIVITY_LR,
    SWEPT,
    SWEPT_LRS,
    TUNED,
    base,
    family,
)
from bench.quality.setting import Setting

STAGES = ("first", "sweep", "seeds", "confirm", "ablations", "sensitivity")


def stage(name: str) -> list[Setting]:
    """The settings of one of ``STAGES`` or of ``core``."""
    match name:
        case "first":  # how low a learning rate still teaches
            low = ("AL", "DBA", "AdamW", "seeded v")
            return [base(ABLATION_DOMAIN), *(s for m in low for s in family(m, ABLATION_DOMAIN, LRS[:1]))]
        case "sweep":
            swept = [s for d, lr in itertools.product(TUNED, SWEPT_LRS) for m in SWEPT for s in family(m, d, (lr,))]
            return [s for d in TUNED for s in (base(d), *family("AL", d, BETWEEN))] + swept
        case "seeds":
            return [s for d in TUNED for s in chosen_settings(d, SWEPT)]
        case "confirm":
            return [s for d in data.CONFIRMING for s in (base(d), *chosen_settings(d, SWEPT))]
        case "ablations":
            rest = [m for m in FAMILIES if m not in SWEPT]
            return [s for lr in ABLATION_LRS for m in rest for s in family(m, ABLATION_DOMAIN, (lr,))]
        case "sensitivity":
            return [s for m in SENSITIVITY for s in family(m, ABLATION_DOMAIN, (SENSITIVITY_LR,))]
        case "core":
            return [base(ABLATION_DOMAIN), *chosen_settings(ABLATION_DOMAIN, MAIN)]
    raise ValueError(f"stage {name!r}: expected core or one of {', '.join(STAGES)}")


def chosen_settings(domain: str, methods: Iterable[str]) -> list[Setting]:
    """Each method at its chosen setting (see ``choose.py``) for every seed."""
    settings = []
    for seed, method in itertools.product(SEEDS, methods):
        setting = choice(method, domain)
        if setting is not None:
            settings.append(dataclasses.replace(setting, seed=seed))
    return settings
