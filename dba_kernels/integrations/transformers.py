"""DBA in the Hugging Face ``Trainer``, and in every trainer that derives from it (TRL's ``SFTTrainer``, Axolotl's).

::

    from dba_kernels.integrations.transformers import DBACallback, dba_adamw

    trainer = Trainer(model, args, train_dataset=dataset,
                      optimizer_cls_and_kwargs=dba_adamw(args, "global_gradient.safetensors"))
    DBACallback.attach(trainer)
    trainer.train()

Learning rate, betas, ε and weight decay come from ``args`` (``TrainingArguments``, ``SFTConfig``), read when the
optimizer is made, so that every trial of a hyper-parameter search trains with its own. Their schedule, linear to 0 by
default, is annealing learning. The number of steps T comes from the Trainer when it starts.

Trainers that do not take ``optimizer_cls_and_kwargs`` (``Seq2SeqTrainer``, TRL's DPO, GRPO and KTO) have it all the
same::

    trainer = DPOTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.optimizer_cls_and_kwargs = dba_adamw(trainer.args, "global_gradient.safetensors")
    DBACallback.attach(trainer)

**Clipping.** ``TrainingArguments.max_grad_norm`` is 1.0 by default, so the Trainer clips; leave it so. It computes the
norm at every step in any case, so ``DBAAdamW(max_grad_norm=…)`` would spare nothing here. Both at once are refused.

**Resuming.** ``trainer.train(resume_from_checkpoint=…)`` continues to the same bits. The checkpoint keeps the global
gradient's path and digest, not its data: the same file must be given again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback

from dba_kernels import DBAAdamW, GlobalGradient

PREFIX = "dba_"
"""Of the optimizer's figures in the Trainer's logs, where ``grad_norm`` is taken."""


def dba_adamw(args: Any, global_gradient: Any = None, **options: Any) -> tuple[type, dict[str, Any]]:
    """The Trainer's ``optimizer_cls_and_kwargs``.

    Args:
        args: the ``TrainingArguments`` that the Trainer gets; gives ``lr``, ``betas``, ``eps`` and ``weight_decay``, as
            they are when the Trainer makes the optimizer.
        global_gradient: a ``GlobalGradient``, its path, or None for plain AdamW.
        options: any other argument of ``DBAAdamW``; they go before those of ``args``.

    Raises:
        ValueError: both ``args`` and ``options`` clip, or DeepSpeed or FSDP1 would flatten the parameters.

    Example:
        >>> import types
        >>> args = types.SimpleNamespace(learning_rate=1e-5, weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.999,
        ...                              adam_epsilon=1e-8, max_grad_norm=1.0, deepspeed=None)
        >>> factory, kwargs = dba_adamw(args, state_format="int8")
        >>> factory.__name__, kwargs["training_args"] is args, kwargs["state_format"]
        ('DBAAdamWFactory', True, 'int8')
    """
    _check_clipping(args, options.get("max_grad_norm"))
    if global_gradient is not None:
        _check_sharding(args)
    return DBAAdamWFactory, {"training_args": args, "global_gradient": global_gradient, **options}


class DBAAdamWFactory:
    """What :func:`dba_adamw` names: ``DBAAdamWFactory()(model, **kwargs)`` → the optimizer over ``model``.

    The Trainer calls it so, because it is no ``Optimizer`` subclass; Axolotl passes its training arguments as well.
    """

    def __call__(
        self, model: torch.nn.Module, args: Any = None, *, training_args: Any = None, **kwargs: Any
    ) -> DBAAdamW:
        """Named groups by the Trainer's rule: no weight decay for biases and norms.

        Args:
            model: its trainable parameters are optimized. Frozen ones that the global gradient knows come along (they
                never have a gradient) unless ``missing="adamw"``, so that a name too many is still noticed.
            args, training_args: the training arguments, of the caller or of :func:`dba_adamw`, for what ``kwargs``
                leave out.
            kwargs: those of ``DBAAdamW``. ``total_steps`` is ``"later"`` unless given: :class:`DBACallback` sets it.
        """
        args = training_args if args is None else args
        if args is not None:
            _check_clipping(args, kwargs.get("max_grad_norm"))
            kwargs = {**_from_arguments(args), **kwargs}
        gg = kwargs.get("global_gradient")
        if gg is not None:
            gg = kwargs["global_gradient"] = gg if isinstance(gg, GlobalGradient) else GlobalGradient.load(gg)
            kwargs.setdefault("total_steps", "later")
        known = gg if gg is not None and kwargs.get("missing", "error") == "error" else ()
        groups = _groups(model, kwargs.pop("weight_decay", 0.0), known)
        return DBAAdamW(groups, **kwargs)


class DBACallback(TrainerCallback):
    """Gives the optimizer the run's number of steps, and the Trainer's logs the optimizer's ``metrics()``.

    ``DBACallback.attach(trainer)`` puts it before the reporters (Weights & Biases, TensorBoard, …) that the Trainer has
    made by itself, so that they see the figures. As ``callbacks=[DBACallback()]`` it stands behind those: then only
    ``state.log_history``, the progress bar and later callbacks have them.

    At every log of the training loss, which waits for the device anyway: ``dba_gamma``, ``dba_cosine_mean``,
    ``dba_correction_mean``, ``dba_skipped_steps``, …; see ``DBAAdamW.metrics``. ``dba_grad_norm`` is measured by the
    optimizer, after the Trainer has clipped.

    Raises:
        ValueError: when training begins: the optimizer is not a ``DBAAdamW``, or both it and the Trainer clip.
    """

    @classmethod
    def attach(cls, trainer: Any) -> None:
        """Add one to ``trainer``, first in line; :func:`dba_adamw` then reads the trainer's own arguments, if it copied
        those that it was given."""
        trainer.callback_handler.callbacks.insert(0, cls())
        factory, kwargs = getattr(trainer, "optimizer_cls_and_kwargs", None) or (None, {})
        if factory is DBAAdamWFactory and "training_args" in kwargs:
            trainer.optimizer_cls_and_kwargs = factory, {**kwargs, "training_args": trainer.args}

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        ours = _unwrapped(optimizer)
        _check_clipping(args, ours.method.settings.max_grad_norm)
        done = ours.metrics().get("steps", 0)
        if done and state.global_step == 0:
            warnings.warn(
                f"optimizer: expected a fresh one at step 0, got one that has done {done:.0f} steps, so gamma goes on "
                "from there; set trainer.optimizer = None to start again",
                stacklevel=2,
            )
        ours.set_total_steps(state.max_steps)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if logs is None or "loss" not in logs:  # an evaluation, or the summary at the end
            return
        figures = {PREFIX + name: value for name, value in _unwrapped(optimizer).metrics().items()}
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)  # the Trainer has kept a copy of the logs already


def _from_arguments(args: Any) -> dict[str, Any]:
    return {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
    }


def _groups(model: torch.nn.Module, weight_decay: float, known: Any) -> list[dict[str, Any]]:
    """Groups of (name, parameter): decayed, not decayed; an empty one is left out."""
    from transformers import Trainer  # heavy; whoever calls this has imported it

    rule: Any = Trainer.get_decay_parameter_names  # the Trainer's own, which reads nothing of the Trainer
    decayed = set(rule(None, model))

    def members(decay: bool) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, param in model.named_parameters():
            if (name in decayed) == decay and (param.requires_grad or name in known):
                yield name, param

    groups = [{"params": list(members(decay)), "weight_decay": weight_decay * decay} for decay in (True, False)]
    return [group for group in groups if group["params"]]


def _check_clipping(args: Any, fused: float | None) -> None:
    if fused is not None and args.max_grad_norm:
        raise ValueError(
            f"max_grad_norm: expected clipping in one place, got TrainingArguments(max_grad_norm={args.max_grad_norm}) "
            f"(1.0 is its default) and DBAAdamW(max_grad_norm={fused}); drop the latter, or set the former to 0"
        )


def _check_sharding(args: Any) -> None:
    fsdp = getattr(args, "fsdp_plugin_args", None) or {}
    flattening = "ZeRO" if getattr(args, "deepspeed", None) else "FSDP1" if fsdp.get("fsdp_version") == 1 else None
    if flattening is not None:
        raise ValueError(
            f"sharding: expected none that flattens parameters, got {flattening}; no stored gradient fits its flat "
            "tensors: use DDP, or FSDP2 (fsdp=True, fsdp_config={'version': 2})"
        )


def _unwrapped(optimizer: Any) -> DBAAdamW:
    """The optimizer within Accelerate's wrapper."""
    inner = optimizer
    while not isinstance(inner, DBAAdamW) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, DBAAdamW):
        raise ValueError(
            f"optimizer: expected DBAAdamW, got {type(inner).__name__}; pass the Trainer "
            "optimizer_cls_and_kwargs=dba_adamw(args, …), or leave DBACallback out"
        )
    return inner
