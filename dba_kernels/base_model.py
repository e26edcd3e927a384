"""Which model a global gradient belongs to: parameter names without wrappers' prefixes, a fingerprint of weights."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .descriptions import SHAPE, Check, check_fields
from .distributed import Sharding, local

SAMPLES = 16
"""Weights per tensor in a fingerprint."""

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_fpw_module", "base_layer"}
_GOLDEN = 0x9E3779B97F4A7C15  # 2⁶⁴ / golden ratio: multiples of it spread evenly whatever the tensor's row length

PATTERNS: Check = (
    (lambda value: isinstance(value, str) and re.fullmatch("([0-9a-f]{4})*", value) is not None),
    "four hexadecimal digits per sample",
)

Groups = list[dict[str, Any]]
"""``optimizer.param_groups``."""

Fingerprint = dict[str, dict[str, Any]]
"""``{name: {"shape": [...], "bf16": hex}}``: four hex digits, the bits of one bf16-rounded weight, per sample."""


def normalize_name(name: str) -> str:
    """The parameter's name in the bare model.

    Drops ``module.`` (DataParallel, DDP) and PEFT's ``base_model.model.`` at the front, and ``_orig_mod.`` (compile),
    ``_checkpoint_wrapped_module.``, ``_fsdp_wrapped_module.`` and PEFT's ``.base_layer`` anywhere. PEFT keeps a frozen
    ``lm_head.original_module`` beside the ``lm_head.modules_to_save.<adapter>`` that it trains: the latter is the bare
    model's ``lm_head``, the former keeps its own name.

    Example:
        >>> normalize_name("module._orig_mod.base_model.model.lm_head.base_layer.weight")
        'lm_head.weight'
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    if "modules_to_save" in parts[:-2]:
        at = parts.index("modules_to_save")
        del parts[at : at + 2]
    while len(parts) > 1:
        if parts[0] == "module":
            del parts[0]
        elif parts[:2] == ["base_model", "model"] and len(parts) > 2:
            del parts[:2]
        else:
            break
    return ".".join(parts)


def named_once(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """``{normalized name: tensor}``.

    Raises:
        ValueError: two tensors end up with one name.
    """
    result: dict[str, torch.Tensor] = {}
    for name, tensor in named_tensors:
        bare = normalize_name(name)
        if bare in result and result[bare] is not tensor:
            raise ValueError(f"parameter {name!r}: expected unique names, got a second {bare!r}; rename one of them")
        result[bare] = tensor
    return result


def fingerprint(named_params: Iterable[tuple[str, torch.Tensor]]) -> Fingerprint:
    """Names, shapes and some bf16-rounded weights of a model, at indices that depend on the tensor's size alone.

    Args:
        named_params: ``model.named_parameters()``; frozen ones count, the gradient depends on them too.
    """
    params = named_once(named_params)
    samples = _samples(params)
    return {
        name: {"shape": list(param.shape), "bf16": "".join(f"{bits & 0xFFFF:04x}" for bits in samples[name])}
        for name, param in params.items()
    }


def check_fingerprint(what: str, found: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse what :func:`fingerprint` cannot have made of a model with tensors of these shapes.

    Raises:
        ValueError: naming the parameter.
    """
    for name, entry in found.items():
        its = f"{what} of {name!r}"
        numel = math.prod(check_fields(its, entry, {"shape": SHAPE, "bf16": PATTERNS})["shape"])
        if len(entry["bf16"]) != 4 * min(SAMPLES, numel):
            raise ValueError(f"{its}: expected {min(SAMPLES, numel)} samples, got {len(entry['bf16']) / 4:g}")
        if name in shapes and tuple(entry["shape"]) != shapes[name]:
            raise ValueError(f"{its}: expected shape {shapes[name]}, as its tensor has, got {tuple(entry['shape'])}")


def _samples(params: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    """bf16 patterns, as signed 16-bit integers, at ``floor(frac(k · golden) · numel)`` for k = 0 … SAMPLES−1.

    Of DTensors, each rank reads what it holds; one sum over the ranks joins them.
    """
    sharding = Sharding(params.items())
    samples = []
    for param, rows in zip(params.values(), sharding.rows, strict=True):
        numel = param.numel()
        part = local(param.detach()).reshape(-1)
        places = [(k * _GOLDEN % 2**64) * numel >> 64 for k in range(min(SAMPLES, numel))]
        index = torch.tensor(places, dtype=torch.int64, device="cpu")
        if rows is None:
            here = torch.full(index.shape, sharding.leads, device="cpu")
        else:
            index -= rows[0] * (numel // param.shape[0] if numel else 0)
            here = (index >= 0) & (index < part.numel())
        bits = torch.zeros_like(index)
        bits[here] = part[index[here].to(part.device)].to(torch.bfloat16).view(torch.int16).long().cpu()
        samples.append(bits)
    if sharding.communicates:
        lengths = [len(bits) for bits in samples]
        joined = sharding.sum_(torch.cat(samples).to(sharding.mesh.device_type))
        samples = list(joined.cpu().split(lengths))
    return {name: bits.tolist() for name, bits in zip(params, samples, strict=True)}


def _values(patterns: list[int]) -> torch.Tensor:
    return torch.tensor(patterns, dtype=torch.int16, device="cpu").view(torch.bfloat16).double()


def check_weights(expected: Fingerprint, params: Mapping[str, torch.Tensor]) -> None:
    """Compare the sampled weights of every parameter that the fingerprint knows.

    One bf16 ulp of difference is allowed, or 2⁻²⁴ where fp16 has no finer step: fp32 → fp16 → bf16 rounds twice.

    Raises:
        ValueError: naming the tensor that is furthest off.
    """
    worst, worst_name, differing, compared = 0.0, "", 0, 0
    params = {name: param for name, param in params.items() if name in expected}
    samples = _samples(params)
    for name in params:
        _check_shape(name, tuple(expected[name]["shape"]), params[name])
        digits = expected[name]["bf16"]
        stored = [int(digits[i : i + 4], 16) for i in range(0, len(digits), 4)]
        want = _values([bits - 0x10000 if bits > 0x7FFF else bits for bits in stored])
        got = _values(samples[name])
        _, exponent = torch.frexp(torch.maximum(want.abs(), got.abs()))  # |x| in [2^(e-1), 2^e): ulp 2^(e-8)
        allowed = torch.ldexp(torch.ones_like(want), exponent - 8).clamp(min=2.0**-24)
        excess = ((got - want).abs() / allowed).nan_to_num(nan=torch.inf)
        compared += excess.numel()
        differing += int((excess > 1).sum())
        if excess.numel() and excess.max() > max(worst, 1.0):
            at = int(excess.argmax())
            worst, worst_name, pair = float(excess[at]), name, (float(want[at]), float(got[at]))
    if worst_name:
        raise ValueError(
            f"parameter {worst_name!r}: expected weight {pair[0]:.6g} (to one bf16 ulp), got {pair[1]:.6g}; "
            f"{differing} of {compared} sampled weights differ, so this is not the model that the global gradient was "
            "collected on: load that one, or collect again (a resumed run has moved weights: load "
            "the optimizer's state before its first step)"
        )


def names_of(groups: Groups) -> list[str]:
    """The parameters' names as they were given, wrappers' prefixes included.

    Raises:
        ValueError: a group holds other parameters than were named.
    """
    names: list[str] = []
    for i, group in enumerate(groups):
        unnamed = [f"param_groups[{i}][{j}]" for j in range(len(group["params"]))]
        names += group.get("param_names", unnamed)
        if len(names) != sum(len(g["params"]) for g in groups[: i + 1]):
            raise ValueError(
                f"param_groups[{i}]: expected {len(group['param_names'])} parameters, as named when the optimizer was "
                f"made, got {len(group['params'])}; DeepSpeed ZeRO puts one flattened tensor in their place, in which "
                "rows and norms of single parameters are lost: use FSDP2 (torch.distributed.fsdp.fully_shard) or DDP"
            )
    return names


def check_param_names(own: list[str] | None, saved: list[str] | None) -> None:
    """Refuse names of another order, where both are known.

    Raises:
        ValueError: naming the first that differs.
    """
    if own and saved and len(own) == len(saved):
        for name, saved_name in zip(own, saved, strict=True):
            if normalize_name(name) != normalize_name(saved_name):
                raise ValueError(
                    f"param_names: expected {name!r}, the state was saved with {saved_name!r} in its place; make "
                    "the optimizer with the parameters in the same order and groups"
                )


def check_names(
    shapes: Mapping[str, tuple[int, ...]], params: Mapping[str, torch.Tensor], missing: str, extra: str
) -> None:
    """Compare names and shapes of a stored gradient with a model's; see ``GlobalGradient.check_model``."""
    for name, param in params.items():
        if name in shapes:
            _check_shape(name, shapes[name], param)
    lacking = [name for name, param in params.items() if param.requires_grad and name not in shapes]
    if lacking and missing == "error":
        raise ValueError(
            f"parameter {lacking[0]!r}: expected a global gradient, got none ({_count(lacking, params)} are missing"
            f"{_hint(lacking[0], shapes)}); collect it with the same parameters trainable, freeze it, or "
            "pass missing='adamw' to the optimizer"
        )
    left = [name for name in shapes if name not in params]
    if left and extra == "error":
        raise ValueError(
            f"global gradient of {left[0]!r}: expected a parameter of that name, got none ({_count(left, shapes)} have "
            f"no parameter{_hint(left[0], params)}); pass all of model.named_parameters() of the model it was "
            "collected on"
        )


def _check_shape(name: str, expected: tuple[int, ...], param: torch.Tensor) -> None:
    if tuple(param.shape) != expected:
        raise ValueError(
            f"parameter {name!r}: expected shape {expected} as in the global gradient, got {tuple(param.shape)}; "
            "load the model that it was collected on, or collect again"
        )


def _count(some: list[str], all_of: Mapping[str, Any]) -> str:
    return f"{len(some)} of {len(all_of)}"


def _hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; the closest name is {close[0]!r}" if close else ""
