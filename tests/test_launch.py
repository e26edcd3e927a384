"""How the Triton launchers use the machine: launches, allocations, copies, recompilation, memory bounds."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from dba_kernels import DBAAdamW, GlobalGradient
from dba_kernels.formats import EncodedTensor
from dba_kernels.kernels import accumulate, coefficients, columns, common, quantize, similarity, step, tables
from dba_kernels.stepdata import UPDATED_PARTS, Coefficient, Hyper, StepScalars, StepSettings, Summary, TensorBatch

from .support import guard_pages
from .support.cases import Case, build, clone
from .support.operations import CountedOperations

SETTINGS = StepSettings(boost=0.2, total_steps=10, correction="cosine", max_grad_norm=1.0, reduce=True)
Launch = tuple[str, tuple[Any, ...], dict[str, Any]]


@contextlib.contextmanager
def recorded_launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """Launches are written down instead of being run."""
    launches: list[Launch] = []

    def record(self: GridExecutor, *arguments: Any, **options: Any) -> None:
        launches.append((self.fn.__name__, arguments, options))

    with monkeypatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", record)
        yield launches


UPLOAD = ["aten.lift_fresh.default", "aten.copy_.default"]
"""A list becomes a host buffer, and that is copied to a table."""


def specialisation(value: object) -> object:
    """What Triton compiles in of an argument: of a tensor its dtype and alignment, of anything else the value."""
    return (value.dtype, value.data_ptr() % 16) if isinstance(value, torch.Tensor) else value


def assert_same_specialisation(launches: list[Launch], others: list[Launch]) -> None:
    """The second launches find every kernel compiled by the first."""
    for (name, arguments, options), (other, other_arguments, other_options) in zip(launches, others, strict=True):
        assert name == other
        assert [specialisation(x) for x in arguments] == [specialisation(x) for x in other_arguments], name
        assert options == other_options, name


class Step:
    """One optimizer step on the level of the backend: similarity, coefficients, update."""

    def __init__(self, n: int):
        self.batch, self.grads, _ = build(
            Case(torch.bfloat16, "split16", "int8", "int8", torch.bfloat16, ((2, 64),) * n)
        )
        rows = n + 2

        def table(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        self.tables = {
            "sums": table(rows, 2),
            "global_sq": table(rows) + 1,
            "hyper": table(1, Hyper.COUNT) + 0.5,
            "group": torch.zeros(rows, dtype=torch.int64),
            "active": torch.tensor(self.batch.all("index")),
            "steps": torch.zeros(rows),
            "bias_corrections": table(rows, 2),
            "counters": torch.zeros(2, dtype=torch.int64),
            "coefficients": table(rows, Coefficient.COUNT),
            "report": table(rows, 2),
            "summary": table(Summary.COUNT),
        }

    def run(self) -> None:
        similarity.similarity(self.batch, self.grads, self.tables["sums"])
        coefficients.coefficients(StepScalars(**self.tables), SETTINGS)
        step.step(self.batch, self.grads, self.tables["coefficients"])


@pytest.mark.parametrize("n", [3, 300])
def test_codecs_launch_once_whatever_the_number_of_tensors(monkeypatch, n):
    """Protects the speed on many tensors: encoding and decoding are one launch each."""
    matrices = [torch.zeros(64, 64)] * n
    with recorded_launches(monkeypatch) as launches:
        encoded = quantize.encode_all(matrices, "int8")
        quantize.decode_all(encoded)
    assert [(name, options["DECODE"]) for name, _, options in launches] == [
        ("quantize_kernel", False),
        ("quantize_kernel", True),
    ]


@pytest.mark.parametrize("n", [3, 300])
def test_launches_do_not_depend_on_the_number_of_tensors(monkeypatch, n):
    """Protects the speed on many tensors: a step is four launches, for 3 as for 300."""
    one_step = Step(n)
    with recorded_launches(monkeypatch) as launches:
        one_step.run()
    assert [name for name, _, _ in launches] == ["reduce_kernel", "finish_kernel", "coefficients_kernel", "step_kernel"]


LAUNCHES = ["reduce_kernel", "finish_kernel", "coefficients_kernel", "step_kernel"]


class Training:
    """``DBAAdamW.step()`` as training with a GradScaler and clipping asks for it, on ``n`` matrices."""

    def __init__(self, n: int, dtype: torch.dtype = torch.bfloat16):
        self.params = {f"{i}.weight": torch.nn.Parameter(torch.randn(64, 64).to(dtype)) for i in range(n)}
        gg = GlobalGradient.from_tensors({name: p.detach() for name, p in self.params.items()}, format="int8")
        options = {"state_format": "int8", "param_format": "split16", "max_grad_norm": 1.0, "backend": "triton"}
        self.optimizer = DBAAdamW(self.params.items(), lr=1e-5, global_gradient=gg, total_steps=1000, **options)
        self.optimizer.found_inf, self.optimizer.grad_scale = torch.zeros(()), torch.ones(())
        for param in self.params.values():
            param.grad = torch.zeros_like(param)

    def step(self) -> list[str]:
        """The torch operations of one step."""
        with CountedOperations() as counted:
            self.optimizer.step()
        return counted.names


@pytest.mark.parametrize("n", [3, 300])
def test_whole_optimizer_step_is_four_launches(monkeypatch, n):
    """Similarity in two stages, coefficients, update: at the first step and at every other."""
    training = Training(n)
    with recorded_launches(monkeypatch) as launches:
        for _ in range(3):
            training.step()
    assert [name for name, _, _ in launches] == 3 * LAUNCHES


def test_ragged_tensors_and_misaligned_gradients_have_launches_of_their_own(monkeypatch):
    """Whatever the number of tensors: one launch for full tiles, one beside misaligned gradients, one with masks."""
    case = Case(torch.float32, "native", "fp32", "none", torch.float32, ((64, 64), (64, 64), (5000,)) * 20)
    batch, grads, table = build(case)
    grads[1::3] = [torch.zeros(64 * 64 + 1)[1:].view(64, 64) for _ in range(20)]
    with recorded_launches(monkeypatch) as launches:
        similarity.similarity(batch, grads, torch.zeros(len(table), 2, dtype=torch.float64))
        step.step(batch, grads, table)
    assert [name for name, _, _ in launches] == ["reduce_kernel"] * 3 + ["finish_kernel"] + ["step_kernel"] * 3
    access = [(options["MASKED"], options["VECTOR"], options["GRAD_VECTOR"]) for _, _, options in launches[-3:]]
    assert sorted(access) == [(False, 4, 1), (False, 4, 4), (True, 1, 1)]


def test_every_launch_states_fused_multiply_adds(monkeypatch):
    """The compiler's default may change; the agreement with the reference was measured with them."""
    one_step = Step(2)
    with recorded_launches(monkeypatch) as launches:
        one_step.run()
        quantize.decode_all(quantize.encode_all([torch.zeros(64, 64)], "int8"))
        accumulate.accumulate([torch.zeros(8)], [torch.zeros(8)], 1.0, torch.zeros(1, dtype=torch.float64))
    kernels = {"reduce_kernel", "finish_kernel", "coefficients_kernel", "step_kernel", "quantize_kernel", "add_kernel"}
    assert {name for name, _, _ in launches} == kernels
    assert all(options["enable_fp_fusion"] for _, _, options in launches)


def test_low_rank_is_decoded_once_and_multiplied_into_one_buffer(monkeypatch):
    """Per parameter and step two matmuls and three launches; from the second step on nothing is allocated or copied."""
    params = {f"{i}.weight": torch.nn.Parameter(torch.randn(64, 96)) for i in range(3)}
    gg = GlobalGradient.from_tensors({name: p.detach() for name, p in params.items()}, format="int8", rank=4)
    optimizer = DBAAdamW(params.items(), lr=1e-5, global_gradient=gg, total_steps=1000, backend="triton")
    for param in params.values():
        param.grad = torch.zeros_like(param)
    with recorded_launches(monkeypatch) as launches:
        optimizer.step()
        first = len(launches)
        with CountedOperations() as counted:
            optimizer.step()
    names = [name for name, _, _ in launches]
    assert names[:first].count("quantize_kernel") == 3  # one launch per parameter decodes both of its factors
    assert names[first:] == ["reduce_kernel", "finish_kernel"] * 3 + ["coefficients_kernel"] + ["step_kernel"] * 3
    assert counted.names == ["aten.mm.out"] * 6


def test_optimizer_step_without_reduction_is_two_launches(monkeypatch):
    """Protects plain AdamW: a step that needs no reduction launches none."""
    param = torch.nn.Parameter(torch.randn(64, 64))
    param.grad = torch.zeros_like(param)
    optimizer = DBAAdamW([param], backend="triton")
    with recorded_launches(monkeypatch) as launches:
        optimizer.step()
    assert [name for name, _, _ in launches] == LAUNCHES[2:]


def test_optimizer_step_runs_no_operation_but_its_launches(monkeypatch):
    """From the second step on nothing is allocated, copied or read back, except what really changed."""
    training = Training(3)
    with recorded_launches(monkeypatch):
        assert "aten.empty.memory_format" in training.step()  # the first step allocates: the count sees it
        assert training.step() == []
        training.optimizer.param_groups[0]["lr"] *= 0.9
        assert training.step() == UPLOAD
        for param in training.params.values():
            param.grad = param.grad.clone()
        assert training.step() == UPLOAD


def test_grad_scaler_reads_nothing_back(monkeypatch):
    """``GradScaler.step`` with fp16 gradients leaves found_inf where it is; an ordinary optimizer makes it look."""

    def operations(optimizer: torch.optim.Optimizer) -> list[str]:
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.ones(()))
        with CountedOperations() as counted:
            scaler.step(optimizer)
        return counted.names

    training = Training(3, torch.float16)
    with recorded_launches(monkeypatch) as launches:
        training.step()
        names = operations(training.optimizer)
    assert [name for name, _, _ in launches] == 2 * LAUNCHES
    assert "aten._amp_foreach_non_finite_check_and_unscale_.default" in names
    assert "aten._local_scalar_dense.default" not in names
    control = torch.optim.SGD(Training(1, torch.float32).params.values())
    assert "aten._local_scalar_dense.default" in operations(control)


def test_optimizer_step_compiles_nothing_new(monkeypatch):
    """With all that changes between steps changed, every launch has the arguments of the first step."""
    training = Training(3)
    with recorded_launches(monkeypatch) as launches:
        training.step()
        training.optimizer.param_groups[0].update(lr=3e-6, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.0)
        training.optimizer.grad_scale = torch.tensor(512.0)
        for param in training.params.values():
            param.grad = torch.ones_like(param)
        training.step()
    assert_same_specialisation(launches[:4], launches[4:])


def test_nothing_but_launches_from_the_second_step_on(monkeypatch):
    """Protects the host: from the second step on, torch is asked for nothing besides the launches."""
    one_step = Step(5)
    with recorded_launches(monkeypatch):
        one_step.run()
        with CountedOperations() as counted:
            one_step.run()
    assert counted.names == []


def test_moved_gradients_cost_one_copy_of_their_addresses(monkeypatch):
    """Protects the host: new gradient addresses cost one copy and no read-back."""
    one_step = Step(5)
    with recorded_launches(monkeypatch):
        one_step.run()
        one_step.grads = [grad.clone() for grad in one_step.grads]
        with CountedOperations() as counted:
            one_step.run()
    assert [name for name in counted.names if "copy" in name] == ["aten.copy_.default"]
    assert "aten._local_scalar_dense.default" not in counted.names
    addresses = tables.tables_of(one_step.batch).grads.table.tolist()
    assert addresses == [grad.data_ptr() for grad in one_step.grads]


def test_a_read_back_would_be_counted():
    """Negative control: a read-back is seen by the counter that the tests above rely on."""
    with CountedOperations() as counted:
        torch.ones(1).item()
    assert "aten._local_scalar_dense.default" in counted.names


def test_nothing_that_changes_is_compiled_in(monkeypatch):
    """From one step to the next all arguments are the same: a kernel's cache key cannot change."""
    one_step = Step(5)
    with recorded_launches(monkeypatch) as launches:
        one_step.run()
        one_step.tables["hyper"] *= 0.9
        one_step.tables["coefficients"] += 1.0
        one_step.grads = [grad.clone() for grad in one_step.grads]
        one_step.run()
    first = launches[:4]
    assert_same_specialisation(first, launches[4:])
    one_step.tables["summary"] = one_step.tables["summary"].float()  # control: a dtype is compiled in
    with recorded_launches(monkeypatch) as launches:
        one_step.run()
    with pytest.raises(AssertionError):
        assert_same_specialisation(first, launches)


def entry_of(shape: tuple[int, ...], grouped: bool = True, address: int = 4096, offset: int = 0) -> tables.Entry:
    entry = tables.Entry(shape, grouped)
    entry.stream(columns.PARAM, address)
    entry[columns.OFFSET.value] = offset
    return entry


ENTRIES = {
    "aligned": [entry_of(s) for s in ((0, 64), (1, 1), (1, 8192), (1, 8193), (24, 1024), (3, 8191))],
    "misaligned": [entry_of((24, 1024), address=4100), entry_of((5000,), grouped=False, address=4100)],
    "straddling": [entry_of((24, 1024), offset=2**32 - at) for at in (1, 1024, 5000, 24 * 1024, 30 * 1024)],
}


@pytest.mark.parametrize("entries", ENTRIES.values(), ids=ENTRIES)
def test_chunks_cover_every_tile_once(entries):
    """Protects disjoint writes, and the sums of a tensor, whose partial ones lie side by side."""
    covered = [torch.zeros(-(-entry.positions // 1024), dtype=torch.int64) for entry in entries]
    cut = tables.chunk_table(entries)
    for tensor, first, tiles, _, _ in cut:
        covered[tensor][first : first + tiles] += 1
    assert all((count == 1).all() for count in covered)
    assert [slot for *_, slot, _ in cut] == list(range(len(cut)))
    assert sorted(cut) == cut


def test_tiles_are_masked_where_they_must_be():
    """Ragged ends, padded rows, misaligned storage and tiles that straddle 2³²; nothing else."""
    assert entry_of((24, 1024)).spans() == [(0, 24, False)]
    assert entry_of((1, 8193)).spans() == [(0, 8, False), (8, 9, True)]
    assert entry_of((3, 8191)).spans() == [(0, 24, True)]
    assert entry_of((24, 1024), address=4100).spans() == [(0, 24, True)]
    assert entry_of((24, 1024), offset=2**32 - 5000).spans() == [(0, 4, False), (4, 5, True), (5, 24, False)]
    assert entry_of((24, 1024), offset=2**32 - 4096).spans() == [(0, 24, False)]


def test_small_models_are_cut_small():
    """A model of few tiles is spread over many programs; a large one reads its tables once per eight tiles."""
    assert [tables.chunk_tiles(tiles) for tiles in (1, 2047, 4096, 8191, 16384, 10**6)] == [1, 1, 2, 3, 8, 8]


@pytest.mark.parametrize(
    ("n", "block", "warps"), [(1, 64, 1), (64, 64, 1), (65, 128, 2), (600, 1024, 16), (9000, 1024, 16)]
)
def test_the_coefficients_take_as_many_parameters_at_a_time_as_there_are(n, block, warps):
    """Protects the kernel's length: one turn of its loops for most models, and no idle warps for small ones."""
    options = coefficients.block(n)
    assert (options["BLOCK"], options["num_warps"]) == (block, warps)


@pytest.mark.parametrize("size", [1, 1024, 5000])
def test_gradients_in_a_flat_buffer_keep_full_tiles(size):
    """One odd bias shifts every gradient after it: those are read element by element, but in full tiles."""
    shapes = ((3,), (64, 64), (size,))
    case = Case(torch.float32, "native", "fp32", "none", torch.bfloat16, shapes)
    batch, grads, table = build(case)
    flat = torch.cat([grad.flatten() for grad in grads])
    views = [part.view(shape) for part, shape in zip(flat.split([3, 4096, size]), shapes, strict=True)]
    other = clone(batch)
    step.step(batch, grads, table)
    step.step(other, views, table)
    assert all(torch.equal(a, b) for a, b in zip(batch.all("param"), other.all("param"), strict=True))
    routed = tables.tables_of(other).chunks
    assert {row[0] for row in routed["narrow"].tolist()} == ({1} if size < 1024 else {1, 2})
    assert all(tiles == 1 for _, _, tiles, _ in routed["masked"].tolist())  # ragged ends alone
    step.step(other, grads, table)  # and back again
    assert "narrow" not in tables.tables_of(other).chunks


@pytest.mark.parametrize("size", [1, 63, 1023, 1024, 1025, 8191, 8192, 8193, 20000])
@pytest.mark.parametrize("aligned", [True, False])
def test_every_element_is_written_once(size, aligned):
    """Protects disjoint writes: each element is added to once, at any size and alignment, and none beside it."""
    storage = torch.zeros(size + 1)
    total = storage[:size] if aligned else storage[1:]
    accumulate.accumulate([total], [torch.ones(size)], 1.0, torch.zeros(1, dtype=torch.float64))
    assert (total == 1.0).all()
    assert storage.sum() == size


def test_grouped_tiles_cover_every_element_once():
    """Ragged rows: exp_avg starts at 0 and β₁ = 0 would hide a second write, so weight decay counts the writes."""
    case = Case(torch.float32, "native", "fp32", "int8", torch.float32, ((40, 130), (3, 1000), (9, 64), (200, 7)))
    batch, grads, table = build(case)
    table[:] = 0.0
    table[:, Coefficient.LR_WEIGHT_DECAY] = 0.5
    table[:, Coefficient.EPS] = 1.0
    for param in batch.all("param"):
        param.fill_(1.0)
    step.step(batch, grads, table)
    assert all((param == 0.5).all() for param in batch.all("param"))


def virtual(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros of address space: pages exist once they are written."""
    no_reserve = 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize, flags=flags), dtype=dtype).view(1, numel)


def test_offsets_beyond_32_bits():
    """The last chunks of a tensor of 2³¹ elements and a few, against those elements as a tensor of their own."""
    tail = tables.MOST_TILES * common.TILE.value + 5000
    numel = 2**31 + tail
    case = Case(torch.bfloat16, "split8", "int8", "int8", torch.bfloat16, ((1, tail),))
    small, (small_grad,), table = build(case)
    (part,) = small.tensors
    part.offset = 2**31

    def grown(tail_of: torch.Tensor, scales: bool) -> torch.Tensor:
        whole = virtual(2**31 // (64 if scales else 1) + tail_of.numel(), tail_of.dtype)
        whole[:, -tail_of.numel() :] = tail_of
        return whole

    parts = {name: grown(getattr(part, name), name.endswith("scale")) for name in UPDATED_PARTS}
    stored = part.global_grad
    whole_stored = EncodedTensor("int8", (1, numel), grown(stored.codes, False), grown(stored.scales, True))
    whole = dataclasses.replace(part, **parts, global_grad=whole_stored, offset=0)
    huge = dataclasses.replace(small, tensors=[whole], cache={})
    grad = virtual(numel, torch.bfloat16)
    grad[:, -tail:] = small_grad

    launched = tables.tables_of(huge)
    launched.refresh([grad])  # chunks are laid out anew for new addresses, and stay while these do
    launched.chunks = {path: chunks[chunks[:, 1] >= 2**31 // 1024].clone() for path, chunks in launched.chunks.items()}
    assert {path: len(chunks) for path, chunks in launched.chunks.items()} == {"aligned": 2, "masked": 1}
    launched.partials.zero_()
    sums = torch.zeros(2, len(table), 2, dtype=torch.float64)
    similarity.similarity(huge, [grad], sums[0])
    similarity.similarity(small, [small_grad], sums[1])
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-6, atol=0)
    assert sums.abs().sum() > 0
    step.step(huge, [grad], table)
    step.step(small, [small_grad], table)
    for name in UPDATED_PARTS:
        small_part, whole_part = getattr(part, name), getattr(whole, name)
        assert torch.equal(whole_part[:, -small_part.numel() :], small_part), name


# --- refusals ---------------------------------------------------------------------------------------------------------


def small_batch() -> tuple[TensorBatch, list[torch.Tensor], torch.Tensor]:
    return build(Case(torch.float32, "native", "fp32", "none", torch.float32, ((4, 64), (2, 64))))


def test_strided_parameter_is_refused():
    """Protects memory: a strided parameter, which kernels would misread, is refused by position."""
    batch, grads, table = small_batch()
    batch.tensors[1].param = torch.zeros(64, 2).T
    with pytest.raises(ValueError, match=r"tensors\[1\]\.param.*contiguous"):
        step.step(batch, grads, table)


def test_strided_gradient_is_refused():
    """Protects memory: a strided gradient, which kernels would misread, is refused by position."""
    batch, grads, table = small_batch()
    grads[0] = torch.zeros(64, 4).T
    with pytest.raises(ValueError, match=r"grads\[0\].*contiguous"):
        step.step(batch, grads, table)


def test_mixed_gradient_dtypes_are_refused():
    """Protects memory: gradients of another dtype than the first are refused by position."""
    batch, grads, table = small_batch()
    grads[1] = grads[1].bfloat16()
    with pytest.raises(ValueError, match=r"grads\[1\]: expected torch.float32 like grads\[0\], got torch.bfloat16"):
        step.step(batch, grads, table)


def test_wrong_format_of_a_global_gradient_is_refused():
    """Protects memory: codes of another format than the batch's are refused by position."""
    batch, grads, table = build(Case(shapes=((4, 64),), global_format="int8"))
    batch.global_format = "int4"
    with pytest.raises(ValueError, match=r"tensors\[0\]\.global_grad: expected format 'int4', got 'int8'"):
        step.step(batch, grads, table)


# --- memory bounds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("triton", "one"), ("native",)], ids=str)
def test_guard_pages(arguments, request):
    """All of the interpreter's matrix: ``python -m tests.support.guard_pages triton``."""
    if arguments[0] == "native":
        request.getfixturevalue("native")
    assert guard_pages.run(*arguments) == 0


def test_guard_pages_kill_an_overrun():
    """Negative control: reading one element past the end kills the process."""
    assert guard_pages.run("overrun") == -signal.SIGSEGV
