"""The Hugging Face Trainer and TRL's, end to end, against the plain loop over the same batches."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback

from dba_kernels import DBAAdamW, GlobalGradient
from dba_kernels.integrations.transformers import DBAAdamWFactory, DBACallback, dba_adamw

from .support.tiny_llama import difference, examples, make_model, weights
from .support.trainer import BATCH, LR, STEPS, arguments, by_hand, make_trainer, train

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


FUSED = {"max_grad_norm": 1.0}
CASES: dict[str, tuple[dict, dict]] = {  # what the user's script and the plain loop say
    "fp32": ({}, {}),
    "accumulation": ({"gradient_accumulation_steps": 2}, {"accumulation": 2}),
    "bf16 autocast": ({"bf16": True}, {"bf16": True}),
    "bf16 weights, int8 state": (
        {"dtype": torch.bfloat16, "optimizer": {"state_format": "int8"}},
        {"dtype": torch.bfloat16, "state_format": "int8"},
    ),
    "clipping inside the step": ({"max_grad_norm": 0, "optimizer": FUSED}, {"clip": None, **FUSED}),
}


@pytest.mark.parametrize("case", CASES)
def test_trainer_is_the_plain_loop(case: str, stored: Path, tmp_path: Path) -> None:
    """To the bit: the same operations in the same order on one thread."""
    in_script, in_loop = CASES[case]
    trainer = train(tmp_path, stored, **in_script)
    model, losses = by_hand(stored, **in_loop)
    assert torch.equal(weights(trainer.model), weights(model))
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("wrong", [{"total_steps": 1000}, {"boost": 0.0}, {"correction": "none"}, {"clip": None}])
def test_another_run_is_told_apart(wrong: dict, stored: Path, tmp_path: Path) -> None:
    """Negative control: each part of what the integration hands over changes the weights."""
    trainer = train(tmp_path, stored)
    model, _ = by_hand(stored, **wrong)
    apart = difference(trainer.model, model, make_model())
    assert apart > 1e-3


def test_without_a_global_gradient_it_is_the_trainers_adamw(tmp_path: Path) -> None:
    """Against ``optim="adamw_torch"``: apart by what fp32 rounding does to ulp-sized updates."""
    ours = train(tmp_path, None).model
    theirs = Trainer(make_model(), arguments(tmp_path, optim="adamw_torch"), train_dataset=examples(STEPS * BATCH))
    theirs.train()
    other, _ = by_hand(None, betas=(0.8, 0.999))
    apart = [difference(model, theirs.model, make_model()) for model in (ours, other)]
    assert apart[0] < 1e-4 and apart[1] > 1e-2


def test_where_one_clips_does_not_matter(stored: Path, tmp_path: Path) -> None:
    """Before the step, as the Trainer does by default, or inside it: equal to the rounding of the clipped gradients."""
    before = train(tmp_path, stored)
    inside = train(tmp_path, stored, **CASES["clipping inside the step"][0])
    apart = difference(inside.model, before.model, make_model())
    assert 0 < apart < 1e-4
    assert min(entry["grad_norm"] for entry in before.state.log_history if "loss" in entry) > 1.0  # it did clip


def test_clipping_twice_is_refused(stored: Path, tmp_path: Path) -> None:
    """Protects the gradient: clipping by the Trainer and in the step is refused, early or at the first step."""
    args = arguments(tmp_path)
    message = r"max_grad_norm: expected clipping in one place, got TrainingArguments\(max_grad_norm=1.0\).*DBAAdamW"
    with pytest.raises(ValueError, match=message):
        dba_adamw(args, stored, max_grad_norm=0.5)
    model = make_model()
    optimizer = DBAAdamW(model.named_parameters(), lr=LR, max_grad_norm=0.5)
    trainer = Trainer(model, args, train_dataset=examples(4), optimizers=(optimizer, None), callbacks=[DBACallback()])
    with pytest.raises(ValueError, match=message):
        trainer.train()


@pytest.mark.parametrize(
    "name, sharding", [("ZeRO", {"deepspeed": "zero.json"}), ("FSDP1", {"fsdp_config": {"version": 1}})]
)
def test_flattened_parameters_are_refused(name: str, sharding: dict, stored: Path, tmp_path: Path) -> None:
    """Protects names: sharding that flattens parameters is refused, and what works is not."""
    args = arguments(tmp_path)
    if "deepspeed" in sharding:
        args.deepspeed = sharding["deepspeed"]  # the constructor would want DeepSpeed installed
    else:
        args = arguments(tmp_path, fsdp=True, **sharding)
    with pytest.raises(
        ValueError, match=rf"sharding: expected none that flattens parameters, got {name}; .* use DDP, or FSDP2"
    ):
        dba_adamw(args, stored)
    dba_adamw(args)  # plain AdamW has no names to fit
    dba_adamw(arguments(tmp_path, fsdp=True), stored)  # FSDP2 is the default


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    """Protects the callback's user: with another optimizer it says so and does not do nothing."""
    trainer = Trainer(make_model(), arguments(tmp_path), train_dataset=examples(4), callbacks=[DBACallback()])
    with pytest.raises(ValueError, match=r"optimizer: expected DBAAdamW, got AdamW; .*dba_adamw\(args, …\)"):
        trainer.train()


def test_a_forgotten_callback_is_said(stored: Path, tmp_path: Path) -> None:
    """Protects who forgets the callback: the first step says what is missing."""
    args = arguments(tmp_path)
    trainer = Trainer(
        make_model(), args, train_dataset=examples(4), optimizer_cls_and_kwargs=dba_adamw(args, str(stored))
    )
    with pytest.raises(ValueError, match=r"total_steps: expected the number .*DBACallback"):
        trainer.train()


def test_training_again_with_a_used_optimizer_is_said(tmp_path: Path) -> None:
    """As in a notebook: the Trainer keeps its optimizer, whose boost has decayed to nothing."""
    gg = GlobalGradient.from_tensors({name: torch.ones_like(p) for name, p in make_model().named_parameters()})
    trainer = train(tmp_path, gg, optimizer={"boost": 0.4})
    with pytest.warns(UserWarning, match=r"got one that has done 6 steps.*set trainer.optimizer = None"):
        trainer.train()
    assert trainer.state.log_history[-2]["dba_gamma"] == 0.0
    trainer.optimizer = None
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="optimizer: expected a fresh one")
        trainer.train()
    assert trainer.state.log_history[-2]["dba_gamma"] == pytest.approx(0.4 / 6, rel=1e-6)


class Reporter(TrainerCallback):
    """As Weights & Biases': the Trainer puts it before the user's callbacks."""

    def __init__(self) -> None:
        self.seen: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.seen.append(dict(logs))


@pytest.mark.parametrize("attached", [True, False])
def test_metrics_reach_logs_and_reporters(attached: bool, stored: Path, tmp_path: Path) -> None:
    """γ follows eq. 2 with the Trainer's number of steps; reporters see it where the callback was attached."""
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=2, eval_strategy="epoch")
    data, reporter = examples(8), Reporter()
    trainer = Trainer(
        make_model(),
        args,
        train_dataset=data,
        eval_dataset=data[:2],
        optimizer_cls_and_kwargs=dba_adamw(args, stored, boost=0.4),
        callbacks=[reporter] if attached else [reporter, DBACallback()],
    )
    if attached:
        DBACallback.attach(trainer)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["dba_gamma"] for entry in history] == pytest.approx([0.4 * (1 - t / 8) for t in range(8)], rel=1e-6)
    assert [entry["dba_steps"] for entry in history] == list(range(1, 9))
    assert all(-1 <= entry["dba_cosine_mean"] <= 1 for entry in history)
    assert all("dba_gamma" not in entry for entry in trainer.state.log_history if "loss" not in entry)
    assert sum("dba_gamma" in logs for logs in reporter.seen) == (8 if attached else 0)


def test_axolotl_passes_the_arguments_too(stored: Path, tmp_path: Path) -> None:
    """``factory()(model, training_args, **kwargs)``: the arguments fill in what the keywords leave out."""
    args = arguments(tmp_path, adam_beta2=0.95)
    optimizer = DBAAdamWFactory()(make_model(), args, global_gradient=str(stored), lr=2e-5)
    decayed, rest = optimizer.param_groups
    assert (decayed["lr"], decayed["betas"], decayed["weight_decay"], rest["weight_decay"]) == (
        2e-5,
        (0.9, 0.95),
        0.1,
        0,
    )
    assert optimizer.awaits_total_steps


def test_frozen_parameters_come_along_and_stay(stored: Path, tmp_path: Path) -> None:
    """A frozen embedding has a stored gradient and no step; a stored name that no parameter has is still refused."""
    model = make_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    args = arguments(tmp_path)
    trainer = Trainer(
        model, args, train_dataset=examples(STEPS * BATCH), optimizer_cls_and_kwargs=dba_adamw(args, stored)
    )
    DBACallback.attach(trainer)
    trainer.train()
    untouched = make_model()
    assert torch.equal(model.model.embed_tokens.weight, untouched.model.embed_tokens.weight)
    assert not torch.equal(model.lm_head.weight, untouched.lm_head.weight)

    gg = GlobalGradient.load(stored)
    more = GlobalGradient.from_tensors({**{name: gg[name] for name in gg}, "pooler.weight": torch.ones(2, 2)})
    optimizer = DBAAdamWFactory()(make_model(), global_gradient=more, total_steps=STEPS, lr=LR)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=r"'pooler.weight': expected a parameter of that name"):
        optimizer.step()


def test_a_search_trains_every_trial_with_its_own_arguments(stored: Path, tmp_path: Path) -> None:
    """Protects a hyper-parameter search: rate, betas, eps and decay are read when the optimizer is made, not before."""
    trainer = make_trainer(tmp_path, stored, max_steps=1)
    for lr, beta, eps, decay in ((1e-6, 0.8, 1e-7, 0.0), (3e-6, 0.95, 1e-6, 0.2)):
        args = trainer.args
        args.learning_rate, args.adam_beta1, args.adam_epsilon, args.weight_decay = lr, beta, eps, decay
        trainer.optimizer = None
        trainer.train()
        optimizer = trainer.optimizer
        while not isinstance(optimizer, DBAAdamW):
            optimizer = optimizer.optimizer
        for group in optimizer.param_groups:
            assert (group["initial_lr"], group["betas"][0], group["eps"]) == (lr, beta, eps)
        assert max(group["weight_decay"] for group in optimizer.param_groups) == decay
