"""What wraps a model or its optimizer outside a Trainer: Accelerate, PEFT, torch.compile, GradScaler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import fsdp2_switch_optimizer_parameters
from peft import LoraConfig, get_peft_model
from transformers import Trainer, get_scheduler

from dba_kernels import DBAAdamW, GlobalGradient
from dba_kernels.integrations.transformers import DBACallback, dba_adamw

from .support.tiny_llama import batches, difference, examples, make_global, make_model, plain_loop, weights
from .support.trainer import BATCH, LR, STEPS, arguments

ACCUMULATION = 2

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


# --- Accelerate -------------------------------------------------------------------------------------------------------


def swap_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """What ``prepare`` does for FSDP2, which Accelerate has on GPUs only: placeholders, then new tensors in place."""
    mapping = {}
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            mapping[param.data_ptr()] = torch.nn.Parameter(param.detach().clone())
            setattr(module, name, mapping[param.data_ptr()])
    for group in optimizer.param_groups:
        for i, param in enumerate(group["params"]):
            group["params"][i] = torch.empty(1)
            group["params"][i].data_ptr = param.data_ptr()
    fsdp2_switch_optimizer_parameters(optimizer, mapping)


def optimizer_and_schedule(model: torch.nn.Module, stored: Path) -> tuple[DBAAdamW, Any]:
    options = {"global_gradient": stored, "total_steps": STEPS, "max_grad_norm": 1.0}
    optimizer = DBAAdamW(model.named_parameters(), lr=LR, weight_decay=0.0, **options)
    return optimizer, get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=STEPS)


def accelerated(stored: Path, swap: bool, accumulation: int = ACCUMULATION) -> torch.nn.Module:
    """The loop that Accelerate's documentation shows: everything is called at every micro-batch."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = make_model()
    optimizer, scheduler = optimizer_and_schedule(model, stored)
    loader = torch.utils.data.DataLoader(examples(STEPS * BATCH * ACCUMULATION), batch_size=BATCH)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    if swap:
        swap_tensors(model, optimizer)
    model.train()
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert optimizer.optimizer.metrics()["steps"] == STEPS * ACCUMULATION // accumulation
    return model


def accumulated_by_hand(stored: Path) -> torch.nn.Module:
    model = make_model()
    optimizer, scheduler = optimizer_and_schedule(model, stored)
    for i, batch in enumerate(batches(examples(STEPS * BATCH * ACCUMULATION), BATCH), start=1):
        (model(**batch).loss / ACCUMULATION).backward()
        if i % ACCUMULATION == 0:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return model


@pytest.mark.parametrize("swap", [False, True], ids=["as prepared", "tensors swapped"])
def test_accelerate_is_the_plain_loop(swap: bool, stored: Path) -> None:
    """To the bit: wrapped ``step`` does nothing until gradients are complete, and T counts optimizer steps."""
    assert torch.equal(weights(accelerated(stored, swap)), weights(accumulated_by_hand(stored)))


def test_accelerate_without_accumulation_is_told_apart(stored: Path) -> None:
    """Negative control of the test above."""
    apart = difference(accelerated(stored, False, accumulation=1), accumulated_by_hand(stored), make_model())
    assert apart > 1e-2


# --- PEFT -------------------------------------------------------------------------------------------------------------

LORA = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=True)


def make_lora(**options: Any) -> torch.nn.Module:
    model = make_model()
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**LORA, **options))


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def run_steps(model: torch.nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    model.train()
    for batch in batches(examples(STEPS * BATCH), BATCH):
        model(**batch).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()


def peft_run(gg: GlobalGradient) -> dict[str, torch.nn.Parameter]:
    """Adapters and a fully trained head in one optimizer."""
    model = make_lora(modules_to_save=["lm_head"])
    optimizer = DBAAdamW(
        trainable(model).items(), lr=LR, global_gradient=gg, total_steps=STEPS, correction="none", missing="adamw"
    )
    with pytest.warns(UserWarning, match="8 of 9 trainable parameters have none and get plain AdamW's update"):
        run_steps(model, optimizer)
    return trainable(model)


def peft_by_hand(gg: GlobalGradient) -> dict[str, torch.nn.Parameter]:
    """The adapters by torch's AdamW, the head alone by DBA under the bare model's name."""
    model = make_lora(modules_to_save=["lm_head"])
    params = trainable(model)
    head = params[HEAD]
    adapters = torch.optim.AdamW([param for param in params.values() if param is not head], lr=LR)
    head_alone = GlobalGradient.from_tensors({"lm_head.weight": gg["lm_head.weight"]}, "fp32")
    dba = DBAAdamW([("lm_head.weight", head)], lr=LR, global_gradient=head_alone, total_steps=STEPS, correction="none")
    run_steps(model, adapters, dba)
    return params


HEAD = "base_model.model.lm_head.modules_to_save.default.weight"


def furthest(got: dict, expected: dict, names: list[str]) -> float:
    return max((got[name] - expected[name]).abs().max().item() for name in names)


def test_lora_adapters_get_adamw_and_saved_modules_dba() -> None:
    """Adapters as torch's AdamW trains them, to one fp32 rounding per step of values below 0.25; the head as by DBA."""
    gg = make_global(format="fp32")
    got, expected = peft_run(gg), peft_by_hand(gg)
    adapters = [name for name in got if name != HEAD]
    assert furthest(got, expected, adapters) < STEPS * 2.0**-26
    assert furthest(got, expected, [HEAD]) < STEPS * 2.0**-26


def test_an_unbound_head_is_told_apart() -> None:
    """Negative control: the head by AdamW, as if its name had not been recognised, is elsewhere."""
    gg = make_global(format="fp32")
    got = peft_run(gg)
    model = make_lora(modules_to_save=["lm_head"])
    run_steps(model, torch.optim.AdamW(trainable(model).values(), lr=LR))
    assert furthest(got, trainable(model), [HEAD]) > LR


def test_lora_in_the_trainer(stored: Path, tmp_path: Path) -> None:
    """The factory takes the adapters alone; missing="adamw" is asked for, not assumed."""
    args = arguments(tmp_path)

    def lora_trainer(**options: Any) -> Trainer:
        kwargs = dba_adamw(args, stored, **options)
        trainer = Trainer(make_lora(), args, train_dataset=examples(STEPS * BATCH), optimizer_cls_and_kwargs=kwargs)
        DBACallback.attach(trainer)
        return trainer

    with pytest.raises(ValueError, match=r"lora_A.* are missing.*pass missing='adamw'"):
        lora_trainer().train()
    trainer = lora_trainer(missing="adamw")
    with pytest.warns(UserWarning, match="8 of 8 trainable parameters have none and get plain AdamW's update"):
        trainer.train()
    model = make_lora()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=LR, weight_decay=0.1)  # no adapter is a norm or a bias
    plain_loop(model, optimizer, [[b] for b in batches(examples(STEPS * BATCH), BATCH)], STEPS, max_grad_norm=1.0)
    got, expected = trainable(trainer.model), trainable(model)
    assert furthest(got, expected, list(expected)) < STEPS * 2.0**-26
    assert furthest(got, trainable(make_lora()), list(expected)) > LR  # it did train


# --- torch.compile ----------------------------------------------------------------------------------------------------


def compiled_run(stored: Path, compiled: bool, **options: Any) -> torch.nn.Module:
    model = make_model()
    trained = torch.compile(model, backend="eager") if compiled else model
    names = [name for name, _ in trained.named_parameters()]
    assert all(name.startswith("_orig_mod.") for name in names) == compiled
    options = {"global_gradient": stored, "total_steps": STEPS} | options
    optimizer = DBAAdamW(trained.named_parameters(), lr=LR, **options)
    plain_loop(trained, optimizer, [[b] for b in batches(examples(4 * BATCH), BATCH)], STEPS)
    return model


def test_compiled_model_is_bound_by_the_bare_names(stored: Path) -> None:
    """To the bit: dynamo's graph run as it stands; an inductor's kernels would round otherwise."""
    got, expected = (weights(compiled_run(stored, compiled)) for compiled in (True, False))
    assert torch.equal(got, expected)
    assert not torch.equal(got, weights(compiled_run(stored, False, boost=0.1)))


# --- GradScaler -------------------------------------------------------------------------------------------------------


def fp16_run(
    stored: Path, unscale_first: bool, poisoned_step: int | None = None, wrapped: bool = False, **options: Any
) -> tuple[torch.nn.Module, DBAAdamW, torch.amp.GradScaler]:
    """With ``wrapped``, Accelerate's optimizer calls the scaler, as the Trainer's does on a GPU under ``fp16=True``."""
    model = make_model()
    options = {"global_gradient": stored, "total_steps": STEPS, "max_grad_norm": 1.0} | options
    optimizer = DBAAdamW(model.named_parameters(), lr=LR, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    accelerate = None
    if wrapped:
        Accelerator(cpu=True)
        accelerate = AcceleratedOptimizer(optimizer, scaler=scaler)
    for step, batch in enumerate(batches(examples(STEPS * BATCH), BATCH)):
        with torch.autocast("cpu", torch.float16):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        if step == poisoned_step:
            model.lm_head.weight.grad[0, 0] = torch.inf
        if unscale_first:
            scaler.unscale_(optimizer)
        if accelerate is None:
            scaler.step(optimizer)
            scaler.update()
        else:
            accelerate.step()
        optimizer.zero_grad()
    return model, optimizer, scaler


def test_fp16_with_a_scaler(stored: Path) -> None:
    """Unscaled inside the step or before it: the same bits, since the scale is a power of two."""
    inside, before = (fp16_run(stored, unscale_first)[0] for unscale_first in (False, True))
    assert torch.equal(weights(inside), weights(before))
    assert not torch.equal(weights(inside), weights(fp16_run(stored, False, max_grad_norm=0.9)[0]))
    for unscale_first in (False, True):
        assert torch.equal(weights(inside), weights(fp16_run(stored, unscale_first, wrapped=True)[0]))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("unscale_first", [False, True])
def test_an_overflow_skips_one_step(unscale_first: bool, wrapped: bool, stored: Path) -> None:
    """Protects fp16 training: an overflow skips exactly one step, and the scale halves."""
    model, optimizer, scaler = fp16_run(stored, unscale_first, poisoned_step=2, wrapped=wrapped)
    assert scaler.get_scale() == 2.0**9
    assert weights(model).isfinite().all()
    assert optimizer.metrics()["steps"] == STEPS - 1
