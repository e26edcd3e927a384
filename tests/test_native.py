"""The native library itself: where it is found, instruction sets, threads, fork, the fused step.

Agreement with the reference is in test_<stem>.py. ``csrc/sanitize.sh`` runs all of it under the sanitizers.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from bench.bench_coefficients import fresh_scalars
from dba_kernels import DBAAdamW, ops
from dba_kernels.native import coefficients, library, similarity, step
from dba_kernels.reference import coefficients as reference_coefficients
from dba_kernels.reference import remainder
from dba_kernels.reference import similarity as reference_similarity
from dba_kernels.reference import step as reference_step
from dba_kernels.stepdata import Coefficient, StepScalars, StepSettings

from .support.cases import Case, build, clone, size_cases, written
from .support.step_agreement import assert_agrees

if library.why_not() is not None:
    pytest.skip(f"the native library does not load: {library.why_not()}", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent
LARGE = ((300, 700), (512, 256), (20, 20), (9_001, 7), (3, 40_000))
"""Several units, tasks and waves; ragged rows, rows shorter than a group, rows longer than a unit."""


def _step_bytes(case: Case, threads: int) -> list[torch.Tensor]:
    """Everything that one step of ``case`` writes, with ``threads`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        batch, grads, table = build(case)
        sums = torch.zeros(len(table), 2, dtype=torch.float64)
        similarity.similarity(batch, grads, sums)
        step.step(batch, grads, table)
    finally:
        torch.set_num_threads(before)
    return [sums, *written(batch)]


def _same_bits(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    def raw(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.flatten().view(torch.uint8)

    return all(torch.equal(raw(x), raw(y)) for x, y in zip(a, b, strict=True))


INT8 = Case(torch.bfloat16, "split8", "int8", "int8", torch.bfloat16, LARGE, seed=21)
FP32 = Case(torch.float32, "native", "fp32", "int4", torch.float32, LARGE, seed=22)


# --- instruction sets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*size_cases(), INT8, FP32], ids=str)
@pytest.mark.parametrize("isa", library.usable_isas())
def test_every_instruction_set_agrees_with_the_reference(isa, case):
    """Protects every CPU: each instruction set that runs here agrees with the reference, at all sizes."""
    with library.use_isa(isa):
        assert library.isa() == isa
        assert_agrees(step.step, case)


HOT = [
    Case(dtype, kind, state, stored, torch.bfloat16, LARGE, seed=41)
    for dtype, kind in ((torch.float32, "native"), (torch.bfloat16, "split16"), (torch.bfloat16, "split8"))
    for state in ("fp32", "int8")
    for stored in ("none", "int8", "int4")
]
"""Formats whose step is compiled in one stage for gradients of the parameter's dtype; others go through a block."""


@pytest.mark.parametrize("case", HOT, ids=str)
@pytest.mark.parametrize("isa", library.usable_isas())
def test_one_stage_and_two_give_the_same_bits(isa, case):
    """Protects the choice of kernel, which is one of speed alone: equal gradients in bf16 and fp32 take both ways."""
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        batch, grads, table = build(case)
        with library.use_isa(isa):
            step.step(batch, [grad.to(dtype) for grad in grads], table)
        results.append(written(batch))
    assert _same_bits(*results)


def _python(code: str, **environment: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def _copy_package(to: Path) -> None:
    without = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "dba_kernels", to / "dba_kernels", ignore=without)


def test_environment_variable_forces_the_instruction_set():
    """Protects debugging: ``DBA_KERNELS_ISA`` chooses the instruction set."""
    code = "from dba_kernels.native import library; print(library.isa())"
    assert _python(code, DBA_KERNELS_ISA="scalar").stdout.strip() == "scalar"


def test_environment_variable_with_nonsense_is_a_reason_not_a_crash():
    """Protects who mistypes ``DBA_KERNELS_ISA``: the backend says why it cannot run."""
    done = _python("from dba_kernels.native import library; print(library.why_not())", DBA_KERNELS_ISA="mmx")
    assert "DBA_KERNELS_ISA: expected one of scalar" in done.stdout and "got 'mmx'" in done.stdout


WITHOUT_EDITABLE = (
    "import sys; sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__module__.startswith('_editable')]\n"
)
"""The finder of an editable install answers before sys.path is looked at; these tests are about other installs."""

# --- finding the library ----------------------------------------------------------------------------------------------


def test_missing_library_is_a_reason_with_its_fix(tmp_path):
    """A checkout without a build: the import works and says what to do."""
    _copy_package(tmp_path)
    code = (
        f"{WITHOUT_EDITABLE}sys.path[:0] = [{str(tmp_path)!r}]\n"
        "from importlib import metadata\n"
        "def missing(name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.distribution = missing\n"
        "from dba_kernels.native import library; print(library.__file__, library.why_not())"
    )
    done = _python(code)
    assert str(tmp_path) in done.stdout, done.stderr
    assert "was not built" in done.stdout and "C++17 compiler" in done.stdout


def test_shadowing_checkout_finds_the_installed_library(tmp_path):
    """``dba_kernels/`` of a checkout hides the installed package; the distribution still knows where the library is."""
    site = tmp_path / "site"
    (site / "dba_kernels").mkdir(parents=True)
    shutil.copy(library.load()._name, site / "dba_kernels" / library.LIBRARY)
    info = site / "dba_kernels-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dba-kernels\nVersion: 0.1.0\n")
    checkout = tmp_path / "checkout"
    _copy_package(checkout)
    code = (
        f"{WITHOUT_EDITABLE}sys.path[:0] = [{str(checkout)!r}, {str(site)!r}]\n"
        "from dba_kernels.native import library; print(library.__file__, library.load()._name)"
    )
    done = _python(code)
    assert done.stdout.split() == [
        str(checkout / "dba_kernels" / "native" / "library.py"),
        str(site / "dba_kernels" / library.LIBRARY),
    ], done.stderr


def test_library_of_another_version_is_refused(monkeypatch):
    """Protects memory: a library with another interface is refused before it is called."""
    monkeypatch.setattr(library, "ABI", library.ABI + 1)
    library.load.cache_clear()
    try:
        assert "expected interface version" in library.why_not()
    finally:
        monkeypatch.undo()
        library.load.cache_clear()
    assert library.why_not() is None


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [INT8, FP32], ids=str)
def test_same_bits_for_any_number_of_threads(case):
    """Protects repeatability: the number of threads does not change a bit."""
    expected = _step_bytes(case, 1)
    assert all(_same_bits(expected, _step_bytes(case, threads)) for threads in (2, 3, 8))


def test_control_the_comparison_of_bits_sees_one_bit():
    """Negative control: one flipped bit is noticed."""
    first, second = _step_bytes(INT8, 1), _step_bytes(INT8, 1)
    second[-1].view(torch.uint8)[0] ^= 1
    assert not _same_bits(first, second)


def test_flush_to_zero_of_the_caller_changes_nothing():
    """torch.set_flush_denormal acts on the calling thread alone; the library's threads must all compute alike."""
    tiny = Case(torch.float32, "native", "fp32", "fp32", torch.float32, ((64, 1024),), seed=23)

    def prepare() -> tuple:
        batch, grads, table = build(tiny)
        table[:, Coefficient.STEP_SIZE] = 0
        for tensor in (*grads, *written(batch)):
            tensor.mul_(2.0**-126)
        return batch, grads, table

    expected, *arguments = prepare()
    step.step(expected, *arguments)
    flushed, *arguments = prepare()
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush subnormals")
    try:
        step.step(flushed, *arguments)
    finally:
        torch.set_flush_denormal(False)
    assert _same_bits(written(expected), written(flushed))


def test_calls_from_several_python_threads():
    """The pool serves one call at a time; the others run on their own thread, with the same bits."""
    expected = _step_bytes(INT8, 2)
    results: list[bool] = []
    workers = [
        threading.Thread(target=lambda: results.extend(_same_bits(expected, _step_bytes(INT8, 2)) for _ in range(5)))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == [True] * 20


def test_survives_fork():
    """A child process has none of the pool's threads: it must make its own, and compute the same.

    The child calls the library alone: torch's own OpenMP pool does not survive a fork.
    """
    expected = _step_bytes(INT8, 2)[-1]
    batch, grads, table = build(INT8)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def child() -> None:
        step.step(batch, grads, table)
        queue.put(batch.tensors[-1].exp_avg_sq_scale.numpy().tobytes())

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        process = context.Process(target=child)
        process.start()
        assert queue.get(timeout=30) == expected.numpy().tobytes()
        process.join(timeout=30)
    finally:
        torch.set_num_threads(before)
    assert process.exitcode == 0
    assert torch.equal(_step_bytes(INT8, 2)[-1], expected)  # and the parent's pool still works


# --- the fused step ---------------------------------------------------------------------------------------------------


def _tables(n: int, has_global: list[bool], generator: torch.Generator) -> StepScalars:
    """n parameters in two groups."""
    wide = torch.float64
    hyper = torch.tensor([[1e-3, 0.9, 0.99, 1e-8, 1e-2, 1.0], [1e-4, 0.8, 0.999, 1e-6, 0.0, -1.0]], dtype=wide)
    global_sq = torch.where(torch.tensor(has_global), torch.rand(n, generator=generator, dtype=wide) + 10, -1.0)
    return fresh_scalars(hyper, torch.arange(n) % 2, global_sq)


def _model() -> tuple[list, list, StepScalars]:
    """Three batches of different formats, one without a global gradient; one tensor of several tasks."""
    cases = (
        Case(torch.bfloat16, "split16", "int8", "int8", torch.bfloat16, (*LARGE, (1100, 1024)), seed=31),
        Case(torch.float32, "native", "fp32", "fp32", torch.float32, ((64,), (5000,)), seed=32),
        Case(torch.float32, "native", "fp32", "none", torch.bfloat16, ((128, 65), (0, 64)), seed=33),
    )
    batches, grads, count, has_global = [], [], 0, []
    for case in cases:
        batch, part, _ = build(case)
        for i, tensor in enumerate(batch.tensors):
            tensor.index = count + i
        count += len(case.shapes)
        has_global += [case.global_format != "none"] * len(case.shapes)
        batches.append(batch)
        grads.append(part)
    return batches, grads, _tables(count, has_global, torch.Generator().manual_seed(5))


def _everything(batches: list, tables: StepScalars | None) -> list[torch.Tensor]:
    own = [] if tables is None else vars(tables).values()
    return [*own, *(tensor for batch in batches for tensor in written(batch))]


SETTINGS = {
    "plain": StepSettings(),
    "clip alone": StepSettings(max_grad_norm=0.1, reduce=True),
    "cosine": StepSettings(0.2, 100, 0.5, "cosine", reduce=True),
    "cosine and clip": StepSettings(0.2, 100, 0.5, "cosine", max_grad_norm=0.1, reduce=True),
    "global scope": StepSettings(0.2, 100, 0.5, "cosine", "global", reduce=True),
    "agem": StepSettings(0.0, 0, 0.5, "agem", reduce=True),
    "pcgrad": StepSettings(0.0, 0, 0.5, "pcgrad", "global", reduce=True),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_fused_step_equals_its_parts_bit_for_bit(settings):
    """Protects the one call per step: it computes what its three parts compute, bit for bit."""
    batches, grads, tables = _model()
    for batch, part in zip(batches, grads, strict=True):
        if settings.reduce:
            similarity.similarity(batch, part, tables.sums)
    coefficients.coefficients(tables, settings)
    for batch, part in zip(batches, grads, strict=True):
        step.step(batch, part, tables.coefficients)
    fused_batches, fused_grads, fused_tables = _model()
    step.fused_step(fused_batches, fused_grads, fused_tables, settings)
    assert _same_bits(_everything(batches, tables), _everything(fused_batches, fused_tables))


@pytest.mark.parametrize("where", [0, 3, 5, 8])
def test_fused_step_with_a_non_finite_gradient_changes_nothing(where):
    """Wherever it stands, the first tensor or the last: nothing but the counter of skipped steps may move."""
    batches, grads, tables = _model()
    flat = [grad for part in grads for grad in part]
    flat[where].view(-1)[-1] = float("nan")
    before = [tensor.clone() for tensor in _everything(batches, None)]
    step.fused_step(batches, grads, tables, SETTINGS["cosine"])
    assert _same_bits(before, _everything(batches, None))
    assert tables.counters.tolist() == [0, 1] and tables.steps.sum() == 0


def test_fused_step_agrees_with_the_reference():
    """Protects the one call per step: coefficients and weights agree with the reference."""
    batches, grads, tables = _model()
    expected, expected_grads, expected_tables = _model()
    step.fused_step(batches, grads, tables, SETTINGS["cosine and clip"])
    for batch, part in zip(expected, expected_grads, strict=True):
        reference_similarity.similarity(batch, part, expected_tables.sums)
    reference_coefficients.coefficients(expected_tables, SETTINGS["cosine and clip"])
    torch.testing.assert_close(tables.coefficients, expected_tables.coefficients, rtol=1e-5, atol=1e-12)
    for batch, part in zip(expected, expected_grads, strict=True):
        reference_step.step(batch, part, tables.coefficients)
    for mine, theirs in zip(batches, expected, strict=True):
        for a, b in zip(mine.all("param"), theirs.all("param"), strict=True):
            rtol = 2**-7 if a.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(a.float(), b.float(), rtol=rtol, atol=1e-6)


# --- input that must be refused ---------------------------------------------------------------------------------------


def test_gradient_of_another_shape_is_refused():
    """Protects memory: a gradient of another shape is refused by position."""
    batch, grads, table = build(FP32)
    grads[1] = grads[1][:-1]
    with pytest.raises(ValueError, match=r"grads\[1\]: expected .* of shape \(512, 256\)"):
        step.step(batch, grads, table)


def test_parameter_that_is_not_contiguous_is_refused():
    """Protects memory: a strided parameter is refused by position."""
    batch, grads, table = build(FP32)
    batch.tensors[0].param = batch.tensors[0].param.T.contiguous().T
    with pytest.raises(ValueError, match=r"tensors\[0\]\.param: expected contiguous"):
        step.step(batch, grads, table)


def test_gradient_that_is_not_contiguous_is_read_right():
    """Protects strided gradients: they give the bits that contiguous ones give."""
    batch, grads, table = build(FP32)
    expected = clone(batch)
    step.step(expected, grads, table)
    step.step(batch, [grad.T.contiguous().T if grad.dim() == 2 else grad for grad in grads], table)
    assert _same_bits(written(batch), written(expected))


def test_moved_parameters_are_noticed():
    """``p.data = other`` swaps the memory under the same tensor: the cached addresses must not be used."""
    batch, grads, table = build(FP32)
    step.step(batch, grads, table)
    param = batch.tensors[0].param
    old, kept = param.clone(), param.data
    param.data = kept.clone()
    step.step(batch, grads, table)
    assert torch.equal(kept, old) and not torch.equal(param, old)


def test_library_is_plain_c():
    """No torch headers, no Python: only libc, libstdc++ and the like are needed."""
    if shutil.which("ldd") is None:
        pytest.skip("ldd is not installed")
    needed = subprocess.run(["ldd", library.load()._name], capture_output=True, text=True).stdout
    assert "torch" not in needed and "python" not in needed and isinstance(library.load(), ctypes.CDLL)


def test_nothing_moves_at_learning_rate_zero():
    """lr 0 with an infinite second moment: the reference leaves the weight alone, and so must the folded step size."""
    param = torch.nn.Parameter(torch.ones(64, 64))
    param.grad = torch.full_like(param, 1e20)
    DBAAdamW([param], lr=0.0, weight_decay=0.1, backend="native").step()
    assert torch.equal(param, torch.ones(64, 64))


HALVES = [(d, f) for d in (torch.bfloat16, torch.float16) for f in ("native", "split16", "split8", "master")]


@pytest.mark.parametrize("isa", library.usable_isas())
@pytest.mark.parametrize(("dtype", "param_format"), [(torch.float32, "native"), *HALVES], ids=str)
def test_displacement_is_the_references(isa: str, dtype: torch.dtype, param_format: str) -> None:
    """Protects what an anchor pulls at: every bit of θ − θ₀, remainders included, for any length and thread count."""
    generator, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    for n, threads in ((0, 1), (1, 1), (63, 2), (64, 1), (129, 1), (3 * 8192 + 5, 2), (600_001, 2)):
        value = torch.randn(n, generator=generator)
        param, rest = value.to(dtype), None
        if param_format != "native":
            words = torch.randint(0, 256, (n,), generator=generator)
            param, rest = remainder.split(value, dtype, param_format, words)
        origin = (value + 1e-3 * torch.randn(n, generator=generator)).to(dtype)
        wanted = remainder.displacement(param, rest, origin, param_format)
        torch.set_num_threads(threads)
        with library.use_isa(isa):
            got = ops.displacement(param, rest, origin, param_format, "native")
        torch.set_num_threads(before)
        assert got.dtype == torch.float32 and torch.equal(got.view(torch.int32), wanted.view(torch.int32))
        if rest is not None and n:  # negative control: the remainder counts
            assert not torch.equal(got, param.float() - origin.float())
