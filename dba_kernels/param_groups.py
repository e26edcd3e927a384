"""What a parameter group must hold, whoever wrote it: the constructor, a group of its own, or a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .formats import check_iterable, check_type


def check_hyperparameters(index: int, saved: Mapping[str, Any]) -> None:
    """Refuse a saved group of another kind of optimizer.

    Raises:
        ValueError: it lacks what AdamW's groups hold.
    """
    if missing := [key for key in ("lr", "betas", "eps", "weight_decay") if key not in saved]:
        raise ValueError(
            f"param_groups[{index}]: expected AdamW's hyperparameters, got no {missing[0]!r}; the state was saved by "
            "another kind of optimizer: begin with a fresh one"
        )


def checked_params(params: Any) -> Any:
    """What ``torch.optim.Optimizer`` can iterate over; it checks the rest.

    Raises:
        TypeError: it is something else.
    """
    return check_iterable("params", params, "parameters, (name, parameter) pairs or groups of them")


def checked_flag(name: str, value: Any) -> bool:
    """``value``, if it is a truth value.

    Raises:
        TypeError: it is something else.
    """
    check_type(name, value, (bool, int))
    return bool(value)


def checked_state_dict(state_dict: Any) -> Any:
    """``state_dict``, if it is built as those of optimizers are.

    Raises:
        TypeError, ValueError: naming what is not.
    """
    check_type("state_dict", state_dict, Mapping)
    for key, kind in (("state", Mapping), ("param_groups", (list, tuple))):
        if key not in state_dict:
            raise ValueError(f"state_dict: expected an optimizer's, with 'state' and 'param_groups', got no {key!r}")
        check_type(f"state_dict[{key!r}]", state_dict[key], kind)
    for i, group in enumerate(state_dict["param_groups"]):
        check_type(f"state_dict['param_groups'][{i}]", group, Mapping)
        check_type(f"state_dict['param_groups'][{i}]['params']", group.get("params"), (list, tuple))
    return state_dict
